#!/usr/bin/env python3
"""DICE over its sparsity p, of finished runs: AUROC and FPR95, and the variance of a logit that Lemma 2 speaks of.

    python benchmarks/dice_sweep.py DATA RUN [RUN ...]        # writes benchmarks/results/dice_DATASET.json

At p = 0 it is the energy. Near and far are means over the sets of each group. DATA is the folder that the runs' data
was named from, as for compare.py, which trains such runs.
"""

import argparse
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from timing import environment, write_results

from sparse_moon.app.evaluate import FinishedRun, load_run
from sparse_moon.app.experiment import row_label
from sparse_moon.app.ood_groups import by_group
from sparse_moon.app.run_data import load_ood_sets, plain_batches
from sparse_moon.ood import DICE, Energy, collect, fit_detectors
from sparse_moon.ood.metrics import ood_metrics

RESULTS = Path(__file__).resolve().parent / "results"
SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/dice_DATASET.json")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.runs]
    out = None if arguments.out is None else arguments.out.resolve()
    os.chdir(arguments.data)
    found = environment(torch.device("cpu"))
    runs = [load_run(folder) for folder in folders]
    datasets = {run.config.dataset for run in runs}
    if len(datasets) > 1:
        raise SystemExit(f"expected runs of one data set, got {sorted(datasets)}")
    rows = [row for run in runs for row in sweep(run)]
    out = out or RESULTS / f"dice_{datasets.pop()}.json"
    write_results(out, {**found, "rows": rows})


def sweep(run: FinishedRun) -> list[dict[str, Any]]:
    """A row each p."""
    config, data = run.config, run.dataset
    dice = DICE(Energy(data.num_classes))
    head = config.make_reliability().head(run.predictor)
    fit_detectors(run.predictor, [dice], plain_batches(data.train, data, config), head=head)
    ood_sets = load_ood_sets(config, data)
    sets, groups = {"id": data.test, **ood_sets}, by_group(config.dataset, ood_sets)
    outputs = {
        name: collect(run.predictor, plain_batches(images, data, config), head=head) for name, images in sets.items()
    }
    rows = []
    for p in SPARSITIES:
        detector = dice.with_p(p)
        scores = {name: detector.score(some) for name, some in outputs.items()}
        row: dict[str, Any] = {"run": row_label(config), "seed": config.seed, "p": p}
        for group in ("near", "far"):
            names = groups[group]
            figures = [ood_metrics(scores["id"], scores[name]) for name in names]
            for key in ("auroc", "fpr95"):
                row[f"{group}_{key}"] = round(fmean(each[key] for each in figures), 4)
            row[f"{group}_variance"] = float(f"{fmean(detector.output_variance(outputs[n])[1] for n in names):.4g}")
        row["id_variance"] = float(f"{detector.output_variance(outputs['id'])[1]:.4g}")
        rows.append(row)
        print(*(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
