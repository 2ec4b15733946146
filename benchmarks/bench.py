"""What is measured and how it is put down: rows of figures, layers, networks, and one invocation of the benchmark."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timing import ceilings, command_line, environment, graphed, median_ms, write_results
from torch import Tensor, nn

from sparse_moon.app import models

GRAPHED = 8  # repetitions in a CUDA graph
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Row:
    """One measured ratio. Times in milliseconds; ``max_error`` relative to the largest exact entry."""

    section: str
    case: str
    pattern: str
    sparsity: float
    dtype: str
    device: str
    pass_: str
    ms: float
    baseline: str
    baseline_ms: float
    speedup: float
    flops: float | None = None
    floor_ms: float | None = None
    max_error: float | None = None
    chosen: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Fields with times to four digits, ``pass_`` as ``pass``."""
        fields = {key.rstrip("_"): value for key, value in asdict(self).items()}
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in fields.items()}


@dataclass(frozen=True)
class Case:
    """A layer and its input."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


def conv(
    channels: int, out: int, size: int, kernel: int = 3, stride: int = 1, batch: int = 128, groups: int = 1
) -> Case:
    suffix = f"_s{stride}" * (stride > 1) + f"_g{groups}" * (groups > 1)
    return Case(
        f"conv{kernel}x{kernel}{suffix}_{channels}_{out}_{size}x{size}_b{batch}",
        lambda: nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        (batch, channels, size, size),
    )


def linear(inputs: int, outputs: int, batch: int) -> Case:
    return Case(f"linear_{inputs}_{outputs}_b{batch}", lambda: nn.Linear(inputs, outputs, bias=False), (batch, inputs))


MAIN_CASES = [
    conv(64, 64, 32), conv(128, 128, 16), conv(256, 256, 8), conv(512, 512, 4),
    linear(4096, 4096, 256), linear(1024, 1024, 128), linear(768, 3072, 2048),
]  # fmt: skip
OTHER_CASES = [
    conv(64, 128, 32, stride=2), conv(64, 128, 32, kernel=1, stride=2), conv(256, 64, 32, kernel=1),
    conv(64, 256, 32, kernel=1), conv(64, 64, 32, kernel=5), conv(64, 64, 32, kernel=7),
    conv(128, 128, 16, batch=1), conv(512, 512, 4, batch=1), conv(128, 128, 16, batch=8), linear(1024, 1024, 1),
]  # fmt: skip
# sizes at which a large GPU is busy
CUDA_CASES = [linear(4096, 4096, 4096), conv(256, 256, 16, batch=256), conv(512, 512, 16, batch=256)]
OTHER_CUDA_CASES = [
    linear(1024, 1024, 4096), linear(1024, 4096, 8192), conv(64, 64, 32, batch=256), conv(128, 128, 16, batch=256),
    conv(512, 512, 4, batch=256), conv(256, 1024, 16, kernel=1, batch=256), conv(256, 512, 16, stride=2, batch=256),
]  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A model and its training batch."""

    name: str
    image_shape: tuple[int, ...]
    batch: int = 128
    classes: int = 10
    steps_per_epoch: int = 390
    convolutional: bool = True
    sparse_layout: torch.memory_format = torch.contiguous_format
    """In which its sparse step is the faster one on a CPU."""
    width: int | None = None
    """Other than the network's own."""

    @property
    def label(self) -> str:
        return self.name if self.width is None else f"{self.name}_w{self.width}"

    def build(self, outputs: int) -> nn.Module:
        channels, size = self.image_shape[:2]
        return models.build(self.name, outputs, in_channels=channels, image_size=size, width=self.width)


NETWORKS = [
    Network("resnet18", (3, 32, 32)), Network("wrn-22-2", (3, 32, 32)), Network("mlp", (1, 28, 28), convolutional=False)
]  # fmt: skip
# whose steps are timed where --case names them
OTHER_NETWORKS = [
    Network("small-resnet", (1, 28, 28), width=16),
    Network("small-resnet", (3, 32, 32), width=32),
    Network("resnet18", (3, 32, 32), width=32),
    Network("torchvision:resnet50", (3, 96, 96), 16, 100, sparse_layout=torch.channels_last),
    Network("torchvision:mobilenet_v2", (3, 96, 96), 32, 100, sparse_layout=torch.channels_last),
    Network("timm:vit_small_patch16_224", (3, 224, 224), 32, 100, convolutional=False),
]


class WrongResult(Exception):
    """What has not passed its comparison with float64 or a reference; nothing of it is timed."""


class Bench:
    """Settings, ceilings and rows of one invocation. With ``--json`` the file is written anew after each case.

    Args:
        arguments: of the command line.
        keeps_freed_memory: whether the C library keeps what is freed.
    """

    def __init__(self, arguments: argparse.Namespace, keeps_freed_memory: bool) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.seconds = 0.15 if arguments.quick else 1.0
        self.rows: list[Row] = []
        self.peaks: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.ceilings = {} if arguments.compile_only else ceilings(self.device, seconds=self.seconds)
        self._end = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
        self._head = {
            **environment(self.device),
            "command": command_line(sys.argv[1:]),
            "keeps_freed_memory": keeps_freed_memory,
            "ceilings": self.ceilings,
        }

    def seconds_left(self) -> float:
        """Of ``--seconds``."""
        return self._end - time.monotonic()

    def save(self) -> None:
        """Write what there is to the results file, if one was asked for."""
        if self.arguments.json is None:
            return
        more = {"peaks": self.peaks, "notes": self.notes, "failures": self.failures}
        kept = {name: value for name, value in more.items() if value or name == "peaks"}
        write_results(self.arguments.json, {**self._head, **kept, "rows": [row.as_json() for row in self.rows]})

    def note(self, what: dict[str, Any]) -> None:
        """Put down more of a case than rows hold."""
        self.notes.append(what)
        print(f"        {what}", flush=True)
        self.save()

    def case(self, name: str, run: Callable[..., None], *what: Any) -> None:
        """One case, ``run(bench, *what)``: what goes wrong in it is put down, and the next one follows."""
        try:
            run(self, *what)
        except Exception as error:  # whatever a case raises is its finding
            self.fail(name, error)

    def fail(self, case: str, error: Exception) -> None:
        """Put down a case that gave no figures."""
        self.failures[case] = f"{type(error).__name__}: {error}"[:1000]
        print(f"        {case} failed: {self.failures[case]}", flush=True)
        self.save()

    def main_cases(self) -> list[Case]:
        return CUDA_CASES if self.device.type == "cuda" else MAIN_CASES

    def other_cases(self) -> list[Case]:
        return OTHER_CUDA_CASES if self.device.type == "cuda" else OTHER_CASES

    def times(self, candidates: dict[str, Callable[[int], Any]]) -> dict[str, float]:
        if not self.arguments.graph:
            return median_ms(candidates, self.device, seconds=self.seconds)
        graphs = {name: graphed(run, GRAPHED) for name, run in candidates.items()}
        return {name: time / GRAPHED for name, time in median_ms(graphs, self.device, seconds=self.seconds).items()}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{row.section:<8}{row.case:<36}{row.pattern:<13}{row.sparsity:>5.2f} {row.dtype} {row.pass_:<8}"
            f"{row.ms:>10.3f} ms  "
            f"{row.speedup:>6.2f}x  {row.baseline} ({row.baseline_ms:.3f} ms)"
            + (f"  chose {row.chosen}" if row.chosen else ""),
            flush=True,
        )
        self.save()

    def floor_ms(self, flops: float, bytes_: float, dtype: torch.dtype = torch.float32) -> float:
        """Time that the operations, or else the bytes, need at the measured ceilings."""
        rate = self.ceilings["gflops_fp32" if dtype == torch.float32 else "gflops_bf16"]
        return max(1e-6 * flops / rate, 1e-6 * bytes_ / self.ceilings["copy_gb_per_s"])


def runner(module: nn.Module, inputs: list[Tensor], grads: list[Tensor], pass_: str) -> Callable[[int], Any]:
    """A function that runs one repetition of a layer on the inputs' turn."""

    def forward(i: int) -> None:
        with torch.no_grad():
            module(inputs[i % len(inputs)])

    def both(i: int) -> None:
        x = inputs[i % len(inputs)].detach().requires_grad_()
        module.zero_grad()
        module(x).backward(grads[i % len(grads)])

    return forward if pass_ == "fwd" else both


def autocast(run: Callable[[int], Any], device: torch.device) -> Callable[[int], Any]:
    def lowered(i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            run(i)

    return lowered
