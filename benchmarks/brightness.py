#!/usr/bin/env python3
"""How much of what the runs of compare.py tell apart is brightness.

    python benchmarks/brightness.py mnist DATA

The logits of a ReLU network grow with its input, so that an image that is brighter than the training images may well be
the surer one. This evaluates every finished run of benchmarks/results/DATASET whose checkpoint is there on its OOD sets
once as they are and once dimmed: each image that is brighter than the training images are on average is scaled to their
mean. Writes brightness.json beside the runs: AUROC (ID positive) by run, set and score. DATA as in compare.py.
"""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from timing import environment, write_results
from torch import Tensor

from sparse_moon.app import run_folder
from sparse_moon.app.evaluate import evaluate_model, load_run
from sparse_moon.app.experiment import row_label
from sparse_moon.app.images import Images
from sparse_moon.app.run_data import load_ood_sets

RESULTS = Path(__file__).resolve().parent / "results"
SCORES = ["msp", "energy", "gen"]  # those that fit nothing


class Dimmed(Images):
    """Images scaled to at most a mean ``brightness`` in [0, 255]."""

    def __init__(self, images: Images, brightness: float) -> None:
        self.images, self.brightness = images, brightness
        self.shape, self.labels = images.shape, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def stream(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in self.images.stream(order):
            mean = batch.float().mean((1, 2, 3), keepdim=True)
            yield (batch * (self.brightness / mean.clamp_min(self.brightness))).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("--out", type=Path, help="folder of the runs, default benchmarks/results/DATASET")
    arguments = parser.parse_args()
    out = (arguments.out or RESULTS / arguments.dataset).resolve()
    os.chdir(arguments.data)
    rows = []
    for folder in sorted(path.parent for path in out.glob(f"*/{run_folder.RESULTS}")):
        if not (folder / run_folder.CHECKPOINT).exists():
            continue
        run = load_run(folder, device="cpu")
        sets = load_ood_sets(run.config, run.dataset)
        brightness = 255 * float(run.dataset.mean.mean())
        sets |= {f"{name}, dimmed": Dimmed(images, brightness) for name, images in sets.items()}
        figures, _ = evaluate_model(run.predictor, run.config, run.dataset, sets, SCORES)
        auroc = {name: {score: round(figures["ood"][name][score]["auroc"], 4) for score in SCORES} for name in sets}
        rows.append({"run": row_label(run.config), "seed": run.config.seed, "auroc": auroc})
        print(folder.name, {name: by_score["msp"] for name, by_score in auroc.items()}, flush=True)
    write_results(out / "brightness.json", {**environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
