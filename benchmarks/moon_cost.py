#!/usr/bin/env python3
"""What MOON costs, whole: loss and output, averaging, and the batch-norm pass, an epoch and over a training.

    python benchmarks/moon_cost.py              # on an idle machine, about half an hour on two cores
    python benchmarks/moon_cost.py --quick      # a small network for a minute, to try it; writes nothing

Trains RigL alone and RigL with MOON from beginning to end, of the settings of a preset but for images and epochs, on
random images. Their steps take turns, so that what else the machine does meets both: loading, forward and backward
pass, optimizer, topology updates. What MOON does at the ends of epochs (the vote) and of the training (average and
batch-norm pass) is timed as it runs. Evaluation, which both do alike, is left out.

Writes benchmarks/results/moon_cost.json: the measured training, and what its parts make of the paper's 100 epochs of
50,000 images, with one batch-norm pass as here, and with one after each of 20 late epochs as in the released code.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from scipy.special import stdtrit
from timing import environment, median_ms, write_results
from torch import Tensor

from sparse_moon.app.cli import presets
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.trainer import Trainer
from sparse_moon.memory import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results" / "moon_cost.json"
PAPER = {"images": 50_000, "epochs": 100, "warmup_epochs": 5, "voting_epochs": 20}


@dataclass
class Spent:
    """Seconds of a training: of its steps, of what each epoch ends with, and of what the training ends with."""

    steps: list[list[float]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    finish: float = 0.0

    @property
    def total(self) -> float:
        return sum(map(sum, self.steps)) + sum(self.ends) + self.finish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(presets()), default="moon-cifar10", help="preset of the settings")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--images", type=int, default=12_800, help="of 3 x 32 x 32")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    keep_freed_memory()
    content = yaml.safe_load(presets()[arguments.config].read_text()) | {"sparsity": arguments.sparsity, "ood": None}
    content |= {"epochs": arguments.epochs, "warmup_epochs": None}
    images = arguments.images
    if arguments.quick:
        images, content = 1280, content | {"model": "small-resnet", "width": 16, "epochs": 10, "interval": 10}
    with tempfile.TemporaryDirectory() as folder:
        moon = TrainConfig.from_dict(content | {"dataset": write_images(Path(folder), images), "data_root": None})
        configs = {"rigl": replace(moon, reliability="none"), "moon": moon}
        trainers = {name: Trainer(config, load_dataset(config)) for name, config in configs.items()}
        spent = train_in_turns(trainers)
    result = figures(trainers["moon"], spent, images)
    report(result)
    if not arguments.quick:
        about = {"preset": arguments.config, "sparsity": arguments.sparsity, "images": images, "epochs": moon.epochs}
        write_results(arguments.out, {**environment(torch.device("cpu")), **about, **result})


def write_images(folder: Path, count: int) -> str:
    """Random images in the shape of CIFAR-10's; the path of their file."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10
    path = folder / "random.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    return str(path)


def train_in_turns(trainers: dict[str, Trainer]) -> dict[str, Spent]:
    """Train all of them to their ends, a step of each in turn, who begins changing from step to step."""
    spent = {name: Spent() for name in trainers}
    totals = torch.zeros(3)
    for epoch in range(next(iter(trainers.values())).config.epochs):
        batches: dict[str, Iterator[tuple[Tensor, Tensor]]] = {}
        for name, trainer in trainers.items():
            trainer.parallel.train()
            batches[name] = trainer.batches.epoch(epoch)
            spent[name].steps.append([])
        order = list(trainers)
        for _ in range(len(trainers[order[0]].batches)):
            for name in order:
                step, source = trainers[name]._step, batches[name]
                spent[name].steps[-1].append(seconds(lambda step=step, source=source: step(*next(source), totals)))
            order.reverse()
        for name, trainer in trainers.items():
            trainer.epoch += 1
            reliability, model = trainer.reliability, trainer.model
            spent[name].ends.append(seconds(lambda r=reliability, m=model, e=epoch: r.end_epoch(m, e + 1)))
        print(f"epoch {epoch + 1}: " + ", ".join(f"{n} {sum(s.steps[-1]):.1f} s" for n, s in spent.items()), flush=True)
    for name, trainer in trainers.items():
        spent[name].finish = seconds(trainer.finish)
    return spent


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def figures(trainer: Trainer, spent: dict[str, Spent], images: int) -> dict[str, Any]:
    """The measured training, and what its parts make of the paper's; shares are of the time of RigL alone."""
    rigl, moon = spent["rigl"], spent["moon"]
    warmup, votes_from = trainer.reliability.loss.warmup_epochs, trainer.reliability.first_vote
    rows = []
    for i, (ours, theirs) in enumerate(zip(rigl.steps, moon.steps, strict=True)):
        more = statistics.median(b - a for a, b in zip(ours, theirs, strict=True)) / statistics.median(ours)
        rows.append({"epoch": i + 1, "rigl_s": round(sum(ours), 3), "moon_s": round(sum(theirs), 3),
                     "vote_s": round(moon.ends[i] - rigl.ends[i], 5), "step_more": round(more, 5)})  # fmt: skip
    vote_s = statistics.median(row["vote_s"] for row in rows[votes_from - 1 :])
    pass_s = moon.finish - rigl.finish
    loss_s = loss_more_s(trainer)
    base = sum(map(sum, rigl.steps))
    measured = {
        "rigl_s": round(rigl.total, 2), "moon_s": round(moon.total, 2), "moon_more": share(moon.total / rigl.total - 1),
        "steps_more": share(sum(map(sum, moon.steps)) / base - 1),
        "steps_more_by_medians": {
            "warm-up": interval([row["step_more"] for row in rows[:warmup]]),
            "later": interval([row["step_more"] for row in rows[warmup:]]),
        },
        "loss_apart": share(loss_s * len(trainer.batches) * len(rows) / base),
        "votes": share((sum(moon.ends) - sum(rigl.ends)) / base), "batch_norm_pass": share(pass_s / base),
        "vote_s": vote_s, "batch_norm_pass_s": round(pass_s, 3), "warmup_epochs": warmup,
        "voting_epochs": len(rows) - votes_from + 1,
    }  # fmt: skip
    epoch_s = statistics.median(row["rigl_s"] for row in rows) * PAPER["images"] / images
    whole_s, pass_s = PAPER["epochs"] * epoch_s, pass_s * PAPER["images"] / images
    parts = {
        "loss_apart": share(loss_s * len(trainer.batches) * PAPER["images"] / images / epoch_s),
        "votes": share(PAPER["voting_epochs"] * vote_s / whole_s),
        "batch_norm_once": share(pass_s / whole_s),
        "batch_norm_each_late_epoch": share(PAPER["voting_epochs"] * pass_s / whole_s),
    }
    together = {
        f"whole_{name}": share(parts["loss_apart"] + parts["votes"] + parts[f"batch_norm_{name}"])
        for name in ("once", "each_late_epoch")
    }
    return {"measured": measured, "paper": {**PAPER, **parts, **together}, "rows": rows}


def loss_more_s(trainer: Trainer) -> float:
    """Seconds a batch that MOON's loss and output take more than cross-entropy, apart from the rest of a step."""
    size, classes, loss = trainer.config.batch_size, trainer.dataset.num_classes, trainer.reliability.loss
    target = torch.randint(classes, (size,))
    known, all_ = (torch.randn(size, outputs, requires_grad=True) for outputs in (classes, classes + 1))
    times = median_ms(
        {"moon": lambda _: loss(all_, target).backward(), "rigl": lambda _: F.cross_entropy(known, target).backward()},
        torch.device("cpu"), seconds=1.0, least=200,
    )  # fmt: skip
    return 1e-3 * (times["moon"] - times["rigl"])


def share(value: float) -> float:
    return round(value, 6)


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean over epochs with the reach of its 95 % confidence interval, which a single epoch does not have."""
    reach = None
    if len(values) > 1:
        reach = share(float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / len(values) ** 0.5)
    return {"mean": share(statistics.mean(values)), "reach": reach}


def report(result: dict[str, Any]) -> None:
    measured, paper = result["measured"], result["paper"]
    print(
        f"measured: {measured['moon_more']:+.2%} over the training (steps {measured['steps_more']:+.2%}, votes "
        f"{measured['votes']:+.3%}, batch-norm pass {measured['batch_norm_pass']:+.2%})"
    )
    for name, found in measured["steps_more_by_medians"].items():
        reach = "" if found["reach"] is None else f" ± {found['reach']:.2%}"
        print(f"a step, {name}: {found['mean']:+.2%}{reach} (95 % interval over the epochs)")
    print(
        f"{paper['epochs']} epochs of {paper['images']} images: loss {paper['loss_apart']:+.3%} (timed apart), votes "
        f"{paper['votes']:+.3%}, batch norm once {paper['batch_norm_once']:+.2%}, after each late epoch "
        f"{paper['batch_norm_each_late_epoch']:+.2%}; whole {paper['whole_once']:+.2%}, or "
        f"{paper['whole_each_late_epoch']:+.2%}"
    )


if __name__ == "__main__":
    main()
