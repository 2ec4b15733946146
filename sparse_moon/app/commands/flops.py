"""``sparse-moon flops``."""

import json
from dataclasses import fields

import torch

from sparse_moon import flops
from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.app import models
from sparse_moon.app.parsers import Namespace
from sparse_moon.nn import layer_densities
from sparse_moon.options import MethodOptions
from sparse_moon.settings import options_of


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
    method = ALGORITHMS.find(arguments.method)
    asked = MethodOptions(**{option.name: arguments[option.name] for option in fields(MethodOptions)})
    options = options_of(method.Options, asked, vars(arguments))
    choice = {"pattern": arguments.pattern, "exclude": arguments.exclude or ()}
    method.check_options(options, arguments.sparsity)
    densities = layer_densities(model, arguments.sparsity, arguments.allocation, **choice)
    built = method.start_sparsity(options, arguments.sparsity, model, densities)
    report = flops.flops_report(
        model, (channels, height, width), sparsity=arguments.sparsity, allocation=arguments.allocation,
        **choice, method=arguments.method, interval=arguments.interval, update_fraction=arguments.stop,
        built_sparsity=built, growth=method.growth(options, arguments.drop_fraction, arguments.stop),
        num_classes=arguments.classes, examples=arguments.examples, epochs=arguments.epochs,
        batch_size=arguments.batch_size, refresh=arguments.refresh,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if arguments.json else flops.format_report(report))
