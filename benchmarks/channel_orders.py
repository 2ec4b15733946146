#!/usr/bin/env python3
"""What blocks of weights could keep if channels had another order, fitted to the weights or gradients of a network.

    python benchmarks/channel_orders.py DATA        # writes benchmarks/results/channel_orders.json; needs scipy

A dense small-resnet of width 32 is trained on DATA/cifar10.npz, one pass over the images after the other. After each,
and before the first, for the absolute weights and for the absolute gradient of a batch (what RigL drops and grows by):
the share of their sum that lies in the best blocks at a density, and in as many of the best single weights. Channels
are taken in the order they have; in the best order found for each layer by itself, which would cost a gather of its
input and one of its output in each pass; and in the best one found where layers share channels, as those do that add
to one another, which costs nothing.

Orders are found by turns: blocks are chosen for the orders, then, one set of channels at a time, the order for the
blocks, by an assignment of channels to places that is the best one (scipy's linear_sum_assignment). Neither turn can
lower the share. Starts are the order that is there and three random ones; the best of the four ends counts.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timing import environment, write_results
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_moon.app import models
from sparse_moon.topology import blocks_of

RESULTS = Path(__file__).resolve().parent / "results"
DENSITIES, BLOCKS = (0.1, 0.05), (8, 16, 32)
STARTS, TURNS = 4, 10

Channels = Mapping[str, tuple[str, str]]
"""Names of the channels of a layer's output and input, by its name."""


def shared(names: list[str]) -> Channels:
    """Of a small-resnet: all blocks of a stage add to the same channels."""
    found = {}
    for name in names:
        _, stage, block, layer, *_ = name.split(".")
        own, before = f"stage {stage}", f"stage {int(stage) - (block == '0' and stage != '0')}"
        between = f"inside {stage}.{block}"
        found[name] = {"conv1": (between, before), "conv2": (own, between)}.get(layer, (own, before))
    return found


def alone(names: list[str]) -> Channels:
    """As if each layer could have orders of its own."""
    return {name: (f"{name} out", f"{name} in") for name in names}


def sums(scores: np.ndarray, rows: np.ndarray, columns: np.ndarray, block: int) -> np.ndarray:
    """Of scores (O, I, taps) in blocks, where channels are at these places."""
    ordered = scores[np.argsort(rows)][:, np.argsort(columns)]
    outputs, inputs, taps = scores.shape
    return ordered.reshape(outputs // block, block, inputs // block, block, taps).sum((1, 3))


def chosen(found: np.ndarray, density: float) -> np.ndarray:
    """Which blocks are kept: those of the largest sums."""
    grid = found.shape[0], found.shape[1] * found.shape[2]
    kept = np.zeros(found.size, dtype=bool)
    kept[np.argsort(-found, axis=None, kind="stable")[: blocks_of(density, grid)]] = True
    return kept.reshape(found.shape)


def gains(scores: np.ndarray, kept: np.ndarray, other: np.ndarray, block: int) -> np.ndarray:
    """(O, places): what each output would add at each place, the inputs being at theirs."""
    outputs, inputs, taps = scores.shape
    by_group = scores[:, np.argsort(other)].reshape(outputs, inputs // block, block, taps).sum(2)
    return np.repeat(np.einsum("ogt,pgt->op", by_group, kept.astype(scores.dtype)), block, axis=1)


def best_share(
    scores: Mapping[str, np.ndarray], channels: Channels, block: int, density: float, starts: int, turns: int
) -> float:
    """The largest share found of all scores that lies in the kept blocks."""
    sizes = {}
    for name, (out, in_) in channels.items():
        sizes |= {out: scores[name].shape[0], in_: scores[name].shape[1]}
    random, best = np.random.default_rng(0), 0.0
    total = sum(float(some.sum()) for some in scores.values())

    def all_sums() -> dict[str, np.ndarray]:
        return {name: sums(scores[name], places[out], places[in_], block) for name, (out, in_) in channels.items()}

    for start in range(starts):
        places = {name: random.permutation(size) if start else np.arange(size) for name, size in sizes.items()}
        for _ in range(turns):
            for name in sizes:
                kept = {layer: chosen(found, density) for layer, found in all_sums().items() if name in channels[layer]}
                gain = np.zeros((sizes[name], sizes[name]))
                for layer, blocks in kept.items():
                    out, in_ = channels[layer]
                    if name == out:
                        gain += gains(scores[layer], blocks, places[in_], block)
                    if name == in_:
                        turned = scores[layer].transpose(1, 0, 2), blocks.transpose(1, 0, 2)
                        gain += gains(*turned, places[out], block)
                places[name] = linear_sum_assignment(-gain)[1]
        kept_sum = sum(float(found[chosen(found, density)].sum()) for found in all_sums().values())
        best = max(best, kept_sum / total)
    return best


def rows_of(what: str, passes: int, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Shares for each block and density."""
    rows = []
    for block in BLOCKS:
        scores = {
            name: t.detach().abs().flatten(2).double().numpy()
            for name, t in tensors.items()
            if not (t.shape[0] % block or t.shape[1] % block)
        }
        names = [*scores]
        for density in DENSITIES:
            single = sum(
                float(np.sort(some, axis=None)[-round(density * some.size) :].sum()) for some in scores.values()
            )
            row = {
                "scores": what, "passes": passes, "block": block, "density": density,
                "single_weights": single / sum(float(some.sum()) for some in scores.values()),
                "as_they_are": best_share(scores, alone(names), block, density, starts=1, turns=0),
                "shared_order": best_share(scores, shared(names), block, density, STARTS, TURNS),
                "order_a_layer": best_share(scores, alone(names), block, density, STARTS, TURNS),
            }  # fmt: skip
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "channel_orders.json")
    arguments = parser.parse_args()
    found = environment(torch.device("cpu"))
    with np.load(arguments.data / "cifar10.npz") as file:
        images = torch.from_numpy(file["x_train"]).float().div_(127.5).sub_(1)
        labels = torch.from_numpy(file["y_train"]).long()
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = models.build("small-resnet", 10, in_channels=3, image_size=32, width=32)
    model.to(memory_format=torch.channels_last)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name.startswith("stages")}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    rows = []
    for passes in range(arguments.passes + 1):
        F.cross_entropy(model(images[:512]), labels[:512]).backward()
        rows += rows_of("weights", passes, {name: layer.weight for name, layer in layers.items()})
        rows += rows_of("gradient", passes, {name: layer.weight.grad for name, layer in layers.items()})
        optimizer.zero_grad()
        for batch in torch.randperm(len(images)).split(128) if passes < arguments.passes else ():
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    write_results(arguments.out, {**found, "model": "small-resnet, width 32", "rows": rows})


if __name__ == "__main__":
    main()
