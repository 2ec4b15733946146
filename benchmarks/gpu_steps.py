"""Whole training steps of sparse networks on a GPU as users run them, against dense ones with their best settings.

A sparse step is what ``CapturedStep`` makes of forward pass, MOON's loss, backward pass and optimizer, under bf16
autocast, by the default choice of kernels; one is timed with ``torch.compile`` inside as well. A topology update every
100 steps (RigL) is added with its share of the time. Of dense steps, with cross-entropy, the fastest is the baseline:

- ``eager``: op by op;
- ``compiled``: ``torch.compile`` of network and loss, and a CUDA graph of the whole step, optimizer included: what
  ``reduce-overhead`` does for network and loss alone;
- ``reduce-overhead``: ``torch.compile(mode="reduce-overhead")``, the optimizer eager and fused;
- ``max-autotune``: ``torch.compile(mode="max-autotune-no-cudagraphs")`` and a CUDA graph of the whole step.
"""

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gpu_networks
import torch
import torch.nn.functional as F
from bench import Bench, Row
from gpu_networks import GpuNetwork
from timing import limit, median_ms
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon.ops import choice

INTERVAL = 100
STEPS = 5  # timed together: in training the host prepares a step while the GPU runs the one before
UPDATES = 3  # that are timed
DENSE = ("eager", "compiled", "reduce-overhead", "max-autotune")
_CAPTURED = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass
class Step:
    """A training step that is ready to be timed.

    Attributes:
        run: one step; ``model``, ``method``: what it trains.
        used: bytes that tensors had and that were reserved before the model was built.
        memory: most that tensors have had since, and most that was reserved, in MB; None on the CPU.
        kernels: of the sparse products, how many run by "kernel" and how many "dense".
    """

    run: Callable[[], Any]
    model: nn.Module
    method: sm.Method
    used: tuple[int, int]
    memory: dict[str, float] | None
    kernels: dict[str, int]

    def __call__(self, _: int) -> None:
        self.run()


def step(bench: Bench) -> None:
    """Every network, dense and at every sparsity and pattern, as far as the time goes."""
    arguments = bench.arguments
    for network in gpu_networks.tiny() if arguments.tiny else gpu_networks.NETWORKS:
        if not arguments.case or any(part in network.name for part in arguments.case):
            _Steps(bench, network).all()


class _Steps:
    """The steps of one network."""

    def __init__(self, bench: Bench, network: GpuNetwork) -> None:
        self.bench, self.network, self.device = bench, network, bench.device
        self.batch = network.batch(self.device)
        self.dense: dict[str, Step] = {}
        self.dense_ms: dict[str, float] = {}
        self.stems: dict[str, float] = {}
        self.update_ms = 0.0
        self.sparsity = 0.0

    def _case(self, run: Callable[..., None], *what: Any) -> None:
        """One case: what goes wrong in it, or lasts too long, is put down, and the next one follows."""
        name = " ".join(map(str, (self.network.name, *what)))
        began = time.perf_counter()

        def limited(bench: Bench) -> None:
            with limit(min(bench.arguments.case_seconds, bench.seconds_left())):
                run(*what)

        self.bench.case(name, limited)
        print(f"        {name}: {time.perf_counter() - began:.0f} s", flush=True)

    def all(self) -> None:
        arguments = self.bench.arguments
        cases = list(itertools.product(arguments.sparsity, arguments.pattern))
        if arguments.compile_only:
            for name in arguments.dense:
                self._case(self._dense, name)
            for name in arguments.compile_sparse:
                self._case(self._build, cases[0][1], cases[0][0], name)
            return
        for name in arguments.dense:
            self._case(self._time_dense, name)
        if not self.dense:
            return
        if self.network.whole_depth is not None:
            self._case(self._time_stems)
        for number, (sparsity, pattern) in enumerate(cases):
            self._case(self._sparse, pattern, sparsity)
            for name in arguments.compile_sparse if number == 0 else ():  # compiling takes half a minute
                self._case(self._sparse_compiled, pattern, sparsity, name)

    def _time_dense(self, name: str) -> None:
        """Put a dense step down as soon as it is there, and keep the fastest to be timed in turn with sparse ones."""
        network, bench, step = self.network, self.bench, self._dense(name)
        ms = self.dense_ms[name] = self._times({name: step})[name]
        fastest = min(self.dense_ms, key=self.dense_ms.__getitem__)
        bench.add(Row(
            "step", f"{network.name}_b{network.shape[0]}", "-", 0.0, "bf16", self.device.type, f"dense {name}",
            ms, f"dense {fastest}", self.dense_ms[fastest], self.dense_ms[fastest] / ms,
        ))  # fmt: skip
        bench.note({"network": network.name, "memory": {name: step.memory}})
        if name == fastest:
            self.dense = {name: step}

    def _times(self, steps: dict[str, Step]) -> dict[str, float]:
        """Median milliseconds of a step."""
        together = {name: lambda i, step=step: [step(i) for _ in range(STEPS)] for name, step in steps.items()}
        return {name: ms / STEPS for name, ms in median_ms(together, self.device, seconds=self.bench.seconds).items()}

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        lr = torch.tensor(1e-4, device=self.device)
        if self.network.adam:
            return torch.optim.AdamW(model.parameters(), lr, fused=True, capturable=True)
        return torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4, nesterov=True, fused=True)

    def _train(self, run: Callable[[Tensor, Tensor], Tensor], method: sm.Method) -> Callable[..., Tensor]:
        def train(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                value = run(x, y)
            value.backward()
            method.step()
            return value

        return train

    def _ready(self, build: Callable[[], tuple[nn.Module, sm.Method]], loss: nn.Module, name: str) -> Step:
        """A step after its rehearsals, ``name`` being one of ``DENSE`` or "captured", which is neither compiled."""
        used = self._start_counting()
        model, method = build()
        captured = name in ("captured", *_CAPTURED)

        def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            plain = name in ("eager", "captured")
            return function if plain else torch.compile(function, mode=_CAPTURED.get(name, name))

        if isinstance(method, sm.Dense):  # cross-entropy is several passes over the logits, which a compiler fuses
            run = compiled(lambda x, y: loss(model(x), y))
        else:  # MOON's loss is one kernel
            forward = compiled(model)

            def run(x: Tensor, y: Tensor) -> Tensor:
                return loss(forward(x), y)

        train = self._train(run, method)
        if captured:
            step = sm.CapturedStep(train, method, model, loss)
        else:

            def step(x: Tensor, y: Tensor) -> Tensor:
                method.optimizer.zero_grad()
                return train(x, y)

        with choice.asked_for() as works:  # anew for each step
            step(*self.batch)
        for _ in range(0 if self.bench.arguments.compile_only else 5):
            step(*self.batch)
        if captured and self.device.type == "cuda" and step.reason is not None:
            raise RuntimeError(f"the step was not captured: {step.reason}")
        density = 1.0 - self.sparsity
        kernels = Counter("kernel" if choice.pays(work, density) else "dense" for work in works)
        return Step(lambda: step(*self.batch), model, method, used, self._memory(used), dict(kernels))

    def _start_counting(self) -> tuple[int, int]:
        if self.device.type != "cuda":
            return 0, 0
        gc.collect()  # steps hold themselves in circles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def _memory(self, used: tuple[int, int]) -> dict[str, float] | None:
        """Since :meth:`_start_counting`."""
        if self.device.type != "cuda":
            return None
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peak, reserved = (round((number - before) / 2**20, 1) for number, before in zip(most, used, strict=True))
        return {"peak_mb": peak, "reserved_mb": reserved}

    def _dense(self, name: str, depth: int | None = None) -> Step:
        def build() -> tuple[nn.Module, sm.Method]:
            model = self.network.build(self.network.dense_outputs, self.device, depth)
            return model, sm.Dense(model, self._optimizer(model))

        return self._ready(build, nn.CrossEntropyLoss(), name)

    def _moon(self) -> nn.Module:
        return sm.UnknownAwareLoss(self.network.classes, 10, warmup_epochs=0).to(self.device)

    def _time_stems(self) -> None:
        """Embedding, head, loss and optimizer without any block, dense and as they are in a sparse step."""

        def build() -> tuple[nn.Module, sm.Method]:
            model = self.network.build(self.network.classes + 1, self.device, 0)
            return model, sm.Dense(model, self._optimizer(model))

        (name,) = self.dense
        steps = {"dense": self._dense(name, 0), "sparse": self._ready(build, self._moon(), "captured")}
        self.stems = self._times(steps)

    def _build(self, pattern: str, sparsity: float, name: str) -> Step:
        self.sparsity = sparsity

        def build() -> tuple[nn.Module, sm.Method]:
            model = self.network.build(self.network.classes + 1, self.device)
            self.network.sparsify(model, sparsity, pattern)
            return model, sm.RigL(model, self._optimizer(model), total_steps=10**9, interval=10**8)

        return self._ready(build, self._moon(), name)

    def _sparse(self, pattern: str, sparsity: float) -> None:
        """Captured, with its updates and MOON's share."""
        network, step = self.network, self._build(pattern, sparsity, "captured")
        times = self._times({**self.dense, "sparse": step})
        update_ms = self.update_ms = self._update_ms(step) - times["sparse"]
        memory = {"sparse": step.memory, "sparse with updates": self._memory(step.used)}
        self._add("sparse", pattern, sparsity, times)
        moon_ms = self._moon_ms(step.model)
        if "kernel" not in step.kernels:
            print(f"        {network.name} {pattern} {sparsity}: all products run dense", flush=True)
        self.bench.note({
            "network": network.name, "pattern": pattern, "sparsity": sparsity,
            "sparsity_of_all": round(sm.overall_sparsity(step.model), 4),
            "update_ms": update_ms, "update_share": update_ms / INTERVAL / times["sparse"],
            "moon_ms": moon_ms, "moon_share": moon_ms / times["sparse"], "memory": memory,
            "products": step.kernels, "kernels_run": "kernel" in step.kernels,
        })  # fmt: skip

    def _sparse_compiled(self, pattern: str, sparsity: float, name: str) -> None:
        """The same step compiled, with the updates of the other one."""
        label, step = f"sparse {name}", self._build(pattern, sparsity, name)
        self._add(label, pattern, sparsity, self._times({**self.dense, label: step}))
        self.bench.note({"network": self.network.name, "memory": {label: step.memory}})

    def _add(self, label: str, pattern: str, sparsity: float, times: dict[str, float]) -> None:
        """Put a step down with its share of updates, beside each dense one."""
        network, bench = self.network, self.bench
        step_ms = times[label] + self.update_ms / INTERVAL
        row = Row(
            "step", f"{network.name}_b{network.shape[0]}", pattern, sparsity, "bf16", self.device.type,
            f"{label}, rigl, moon", step_ms, "", 0.0, 0.0,
        )  # fmt: skip
        (fastest,) = self.dense
        for kind, ms in {**self.dense_ms, fastest: times[fastest]}.items():
            bench.add(replace(row, baseline=f"dense {kind}", baseline_ms=ms, speedup=ms / step_ms))
        if self.stems:
            bench.add(self._whole(row, fastest, times[fastest]))

    def _whole(self, row: Row, dense: str, dense_ms: float) -> Row:
        """The step of the network with all its blocks: that of the timed ones, so many times, and the rest once."""
        network = self.network
        assert network.whole_depth is not None
        times = network.whole_depth / network.depth
        dense_ms, sparse_ms = (
            stem + times * (ms - stem) for stem, ms in ((self.stems["dense"], dense_ms), (self.stems["sparse"], row.ms))
        )
        return replace(
            row, pass_=f"{row.pass_}, {network.whole_depth} blocks from {network.depth}", ms=sparse_ms,
            baseline=f"dense {dense}", baseline_ms=dense_ms, speedup=dense_ms / sparse_ms,
        )  # fmt: skip

    def _update_ms(self, step: Step) -> float:
        """A batch that ends with a topology update, which runs eagerly."""
        method = step.method
        assert isinstance(method, sm.RigL)
        method.interval = 1
        method.load_state_dict(method.state_dict())  # prepares for the next batch, which is now one with an update
        return median_ms({"update": step}, self.device, seconds=0.0, least=UPDATES)["update"]

    def _moon_ms(self, model: nn.Module) -> float:
        """What MOON adds to a step: its loss in place of cross-entropy, and its average once an epoch."""
        network, rows = self.network, self.batch[1].shape[0]
        known, all_ = (
            torch.randn(rows, n, device=self.device, dtype=torch.bfloat16, requires_grad=True)
            for n in (network.dense_outputs, network.classes + 1)
        )
        moon, average = self._moon(), sm.WeightAverage(model)
        times = self.bench.times({
            "moon": lambda _: moon(all_, self.batch[1]).backward(),
            "cross-entropy": lambda _: F.cross_entropy(known.float(), self.batch[1]).backward(),
        })  # fmt: skip
        averaging = median_ms({"average": lambda _: average.update(model)}, self.device, seconds=0.0)
        return times["moon"] - times["cross-entropy"] + averaging["average"] / network.steps_per_epoch
