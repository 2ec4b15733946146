"""``sparse-moon flops``."""

import json

import torch
from jsonargparse import Namespace

from sparse_moon import flops
from sparse_moon.app import models
from sparse_moon.app.config import START_SPARSITY


def run(arguments: Namespace) -> None:
    """Count the FLOPs of a model that is never trained."""
    try:
        channels, height, width = (int(n) for n in arguments.input.split(","))
    except ValueError:
        raise ValueError(f"--input must be channels,height,width such as 3,224,224, got {arguments.input!r}") from None
    if height != width:
        raise ValueError(f"--input must be square, got {height} x {width}")
    with torch.device("meta"):  # counting needs shapes, no memory
        model = models.build(
            arguments.model, arguments.classes, in_channels=channels, image_size=height, width=arguments.width
        )
    built = arguments.start_sparsity
    if built is None:
        built = START_SPARSITY.get(arguments.method)
    if arguments.method == "top-kast":
        built = 1.0 - (1.0 - arguments.sparsity) / arguments.forward_share
    report = flops.flops_report(
        model, (channels, height, width), sparsity=arguments.sparsity, allocation=arguments.allocation,
        pattern=arguments.pattern, exclude=arguments.exclude or (), method=arguments.method,
        interval=arguments.interval, update_fraction=arguments.stop, built_sparsity=built,
        num_classes=arguments.classes,
        examples=arguments.examples, epochs=arguments.epochs, batch_size=arguments.batch_size,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if arguments.json else flops.format_report(report))
