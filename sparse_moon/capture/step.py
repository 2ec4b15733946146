"""A whole training step as one CUDA graph: what the host did for each kernel, it does once.

step = CapturedStep(train_batch, method, model, criterion)
for images, labels in loader:
    loss = step(images, labels)
"""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_moon.algorithms import Method
from sparse_moon.algorithms.optimizers import inner_optimizers
from sparse_moon.capture.frame import Frame, parameters
from sparse_moon.capture.graph import Outputs, StepGraph
from sparse_moon.distributed import rank, world_size

REHEARSALS = 3
"""Eager steps before a capture: they make the optimizer's state, compile kernels, and show what waits for the host."""
_MOST_VAIN = 3  # captures in a row that served no batch but their own


class CapturedStep:
    """A training step that runs as one CUDA graph, in which launching its kernels costs the host nothing.

    The first calls run eagerly. The next one is captured, and replayed for it and all calls after it. A batch that ends
    with a topology update runs eagerly, and so does one of another shape than the first, such as a last, smaller one.
    Updates write into the memory that the graph knows, so they ask for no other capture. Before each replay everything
    that the graph took for granted is looked at: memory of parameters, buffers, optimizer state and indices, which
    modules, hooks and parameter groups there are, whether modules train, numbers of the optimizer. Where something is
    another, was added or has gone, the step is captured anew; where that goes on, steps run eagerly from then on.

    Where no step can be captured, it runs eagerly and one warning says why: no GPU or several, several processes, a
    method that changes the number of a layer's weights, code that waits for the device or draws random numbers on the
    host.

    Args:
        step: from a batch to what is wanted of it: forward pass, loss, ``backward()``, ``method.step()``, and the draw
            of a random mask where there is one, before the forward pass. Its Python runs only when it is captured, so
            it must do the same each time: no branch on a tensor, and no number of its own that changes. It returns a
            tensor, a tuple of tensors, or nothing. Gradients do not carry over: each call begins without any.
        method: what trains, with an optimizer that can be captured: its learning rates are 0-d float32 tensors on the
            model's device, which a schedule writes into, and it has ``capturable=True`` or, such as SGD,
            ``fused=True``.
        modules: all whose parameters and buffers the step reads or writes: the model, a loss with state.

    Attributes:
        reason: why steps run eagerly; None while they may be captured.
        captures: how often it was captured.

    Raises:
        ValueError: no module, an optimizer that cannot be captured; in a call, a batch that is not made of tensors,
            autocast around the call in place of inside it, or a step that does not call ``method.step()`` once.
        RuntimeError: in a call, what capturing does not allow and no rehearsal has shown.
    """

    def __init__(self, step: Callable[..., Outputs], method: Method, *modules: nn.Module) -> None:
        if not modules:
            raise ValueError("a captured step needs the modules that it trains: CapturedStep(step, method, model)")
        self.step, self.method, self.modules = step, method, modules
        self.device = next(p for module in modules for p in module.parameters()).device
        self.captures = 0
        self.reason: str | None = None
        self._graph: Any = None  # a StepGraph, where there can be one
        self._rehearsals = self._replays = self._vain = 0
        self._inputs: tuple[Tensor, ...] | None = None
        self._outputs: Outputs = None
        self._frame: Frame | None = None
        reason = StepGraph.missing(self.device) or _unfit(method, modules)
        if reason is not None:
            self._give_up(reason, stacklevel=3)
            return
        _check_optimizer(method.optimizer, self.device)
        self._graph = StepGraph(self.device)

    def __call__(self, *batch: Tensor) -> Outputs:
        """Train on a batch of tensors, which may be on another device; returns what the step does, detached."""
        if not all(isinstance(t, Tensor) for t in batch):
            raise ValueError(f"a batch must be tensors, got {[type(t).__name__ for t in batch]}")
        if self.reason is not None:
            return _detached(self._eager(*batch))
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("autocast keeps casts of weights from step to step: enter it inside the step")
        if self._inputs is None:
            self._inputs = tuple(torch.empty_like(t, device=self.device) for t in batch)
        if self.method.updates_now or not _alike(batch, self._inputs):
            return _detached(self._graph.run(lambda: self._eager(*batch)))
        if self._frame is not None and (change := self._frame.change()) is not None:
            self._forget(change)
        if self.reason is None and self._frame is None and self._rehearsals < REHEARSALS:
            return self._rehearse(batch)
        if self.reason is not None:
            return _detached(self._eager(*batch))
        self._taken(batch)
        if self._frame is None:
            self._capture()
            self._graph.replay()
        else:
            self._graph.replay()
            self.method.next_batch()
        self._replays += 1
        assert self._frame is not None
        self._frame.restore()
        outputs, rebound = _detached(self._outputs, copy=True), self._frame.rebound
        if rebound is not None:
            self._give_up(rebound, stacklevel=3)
        return outputs

    def _taken(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of the captured step, with the numbers of this batch."""
        assert self._inputs is not None
        for own, given in zip(self._inputs, batch, strict=True):
            own.copy_(given, non_blocking=True)
        return self._inputs

    def _eager(self, *batch: Tensor) -> Outputs:
        for parameter in parameters(self.method, self.modules):
            parameter.grad = None
        before = self.method.steps
        outputs = self.step(*(t.to(self.device, non_blocking=True) for t in batch))
        if self.method.steps != before + 1:
            raise ValueError(
                f"a step must end with one method.step(), got {self.method.steps - before}; gradients are not "
                "accumulated over captured steps"
            )
        if not (outputs is None or isinstance(outputs, Tensor | tuple)):
            raise ValueError(f"a step must return a tensor, a tuple of tensors or None, got {type(outputs).__name__}")
        return outputs

    def _rehearse(self, batch: tuple[Tensor, ...]) -> Outputs:
        self._rehearsals += 1
        if self._rehearsals < REHEARSALS:  # what happens once may wait
            return _detached(self._graph.run(lambda: self._eager(*batch)))
        drawn = self._host_random_state()
        # on the captured step's own inputs: where a batch is aligned otherwise, kernels are compiled otherwise
        outputs, waits = self._graph.rehearse(lambda: self._eager(*self._taken(batch)))
        if waits is None and self._host_random_state() != drawn:
            waits = "it draws random numbers on the host"
        if waits is not None:
            self._give_up(waits)
        return _detached(outputs)

    def _host_random_state(self) -> tuple[object, ...]:
        """Of generators whose numbers a graph would keep for ever."""
        _, words, *places = np.random.get_state(legacy=True)
        torchs = torch.get_rng_state().numpy().tobytes() if self.device.type != "cpu" else None
        return random.getstate(), np.asarray(words).tobytes(), *places, torchs

    def _capture(self) -> None:
        self._outputs, frame = None, Frame(self.method, self.modules)
        try:
            with frame.around_capture():
                self._outputs = _detached(self._graph.capture(lambda: self._eager(*(self._inputs or ()))))
        except RuntimeError as error:
            raise RuntimeError(
                "the training step cannot be captured in a CUDA graph, whose memory comes beside that of eager steps, "
                f"and was left half done: run it without CapturedStep (--no-capture, capture=False). {error}"
            ) from error
        frame.rebound = frame.change(stepped=True)
        self._frame, self._replays = frame, 0
        self.captures += 1

    def _forget(self, change: str) -> None:
        """Capture anew, after one more rehearsal."""
        self._vain = 0 if self._replays > 1 else self._vain + 1
        self._frame, self._outputs, self._rehearsals = None, None, REHEARSALS - 1
        if self._vain >= _MOST_VAIN:
            self._give_up(f"{change} in every step")

    def _give_up(self, reason: str, stacklevel: int = 4) -> None:
        self.reason = reason
        self._frame = self._outputs = self._inputs = None
        if self._graph is not None:
            self._graph.forget()  # its memory is all that a step takes
        say_not_captured(reason, stacklevel + 1)


def say_not_captured(reason: str, stacklevel: int) -> None:
    """Warn that training steps run eagerly, in one process of several, which all have the same reason."""
    if rank() == 0:
        warnings.warn(f"training steps are not captured in a CUDA graph: {reason}", stacklevel=stacklevel)


def _unfit(method: Method, modules: tuple[nn.Module, ...]) -> str | None:
    """Why no step of this run can be captured."""
    if method.resizes:
        return f"method {method.name!r} changes the number of a layer's weights"
    if world_size() > 1:
        return f"there are {world_size()} processes, whose exchange is not captured"
    devices = sorted({str(parameter.device) for parameter in parameters(method, modules)})
    if len(devices) > 1:
        return f"its parameters are on several devices ({', '.join(devices)}), and a graph is of one"
    return None


def _check_optimizer(optimizer: Any, device: torch.device) -> None:
    """Raise ``ValueError`` where a graph would keep a learning rate for ever, or wait for it."""
    for inner in inner_optimizers(optimizer):
        name = type(inner).__name__
        for group in inner.param_groups:
            lr = group.get("lr")
            fits = isinstance(lr, Tensor) and lr.dim() == 0 and lr.dtype == torch.float32 and lr.device == device
            if lr is not None and not fits:
                given = f"a {type(lr).__name__}" if not isinstance(lr, Tensor) else f"{lr.dtype} on {lr.device}"
                raise ValueError(
                    f"a captured step needs a learning rate that {name} reads from the device: "
                    f"lr=torch.tensor({float(lr)}, device={str(device)!r}), float32 and 0-d, got {given}"
                )
            switch = "capturable" if "capturable" in group else "fused"
            if not group.get(switch):
                raise ValueError(
                    f"a captured step needs {name}(..., {switch}=True), which does not wait for the device, "
                    f"got {group.get(switch)}"
                )


def _alike(batch: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether a graph that was made for the others takes the batch."""
    return len(batch) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(batch, others, strict=True)
    )


def _detached(outputs: Outputs, *, copy: bool = False) -> Outputs:
    """Without their graph; a copy where the next replay writes to them."""
    if isinstance(outputs, tuple):
        return tuple(t.detach().clone() if copy else t.detach() for t in outputs)
    return outputs if outputs is None else outputs.detach().clone() if copy else outputs.detach()
