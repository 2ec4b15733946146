"""What training methods need to know of optimizers: what they hold, what they keep for each weight, when they step."""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from sparse_moon.ops.drop_and_grow import Regrown
from sparse_moon.sharding import divided_alike, divided_like, part_of

if TYPE_CHECKING:
    from sparse_moon.algorithms.method import Method

_STEPPING, _ATTACHED = "_sparse_moon_stepping", "_sparse_moon_attached"

Remap = Callable[[Tensor], Tensor]
"""Rows of a tensor, one a block, in the order of the new topology; those of new blocks are 0."""


@dataclass(frozen=True)
class StateRule:
    """How one kind of optimizer state moves with the weights.

    Attributes:
        start: what it is before a weight's first step: a number, or the name of a setting of the parameter's group.
        move: ``(state, remap) -> state`` for state that is no plain tensor with a row for each block; ``remap`` is for
            those that it consists of, or can be made of.
    """

    start: float | str = 0.0
    move: Callable[[Any, Remap], Any] | None = None


# By import path of the optimizer's class, which may never be imported, and name of the state.
_RULES = {
    ("torch.optim.rprop.Rprop", "step_size"): StateRule(start="lr"),
    ("torch.optim.adagrad.Adagrad", "sum"): StateRule(start="initial_accumulator_value"),
    ("timm.optim.rmsprop_tf.RMSpropTF", "square_avg"): StateRule(start=1.0),
}
_PLAIN = StateRule()


def register_state(optimizer: type[Optimizer], name: str, rule: StateRule) -> None:
    """Say how an optimizer's state of this name moves when a topology changes.

    Needed for state that neither starts at 0 nor is a tensor with a row for each block (or one number for all)::

        register_state(MyAdam, "moments", StateRule(move=lambda pair, remap: tuple(map(remap, pair))))

    Args:
        optimizer: its class; subclasses do as it does, unless something is registered for them.
        name: key in ``optimizer.state[parameter]``.
        rule: replaces one that was registered before.
    """
    _RULES[_path(optimizer), name] = rule


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _rule(optimizer: Optimizer, name: str) -> StateRule:
    rules = (_RULES.get((_path(kind), name)) for kind in type(optimizer).__mro__)
    return next((rule for rule in rules if rule is not None), _PLAIN)


def inner_optimizers(optimizer: Any) -> list[Optimizer]:
    """The optimizer and those that it wraps (accelerate, Lookahead, ...), outermost first.

    Raises:
        ValueError: neither an optimizer nor something around one.
    """
    found: list[Any] = []

    def look(candidate: Any) -> None:
        if all(candidate is not other for other in found):
            found.append(candidate)
            for value in vars(candidate).values():
                if isinstance(value, Optimizer):
                    look(value)

    look(optimizer)
    optimizers = [candidate for candidate in found if isinstance(candidate, Optimizer)]
    if not optimizers:
        raise ValueError(f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}")
    return optimizers


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """What the optimizer trains."""
    return [p for inner in inner_optimizers(optimizer) for group in inner.param_groups for p in group["params"]]


def _states(optimizer: Any, values: nn.Parameter) -> list[tuple[Optimizer, dict[str, Any]]]:
    """What the optimizer, and those that it wraps, keep for these values."""
    found: list[tuple[Optimizer, dict[str, Any]]] = []
    for inner in inner_optimizers(optimizer):
        states = inner.state.get(values, {})
        if states and all(states is not other for _, other in found):
            found.append((inner, states))
    return found


def keeps_state(optimizer: Any, values: nn.Parameter) -> bool:
    """Whether the optimizer keeps anything for these values by now."""
    return bool(_states(optimizer, values))


def check_state(optimizer: Any, values: nn.Parameter, required: Collection[str]) -> None:
    """Raise ``ValueError`` for state of which it is not known how it moves, or where none has a ``required`` name."""
    found = _states(optimizer, values)
    keys = {key for _, states in found for key in states}
    for inner, states in found:
        for key, state in states.items():
            _is_per_weight(inner, key, state, values)
    missing = [name for name in required if name not in keys]
    if found and missing:
        raise ValueError(f"moved_state names {missing}, but {type(optimizer).__name__} keeps {sorted(keys)}")


def move_state(optimizer: Any, values: nn.Parameter, regrown: Regrown) -> None:
    """Move the state that is kept for each weight along with the weights; a new weight's is that of a first step.

    As many weights as before keep the tensors that they had.
    """
    for inner, states in _states(optimizer, values):
        for key, state in states.items():
            if _is_per_weight(inner, key, state, values):
                moved = _moved(inner, key, state, values, regrown)
                if isinstance(state, Tensor) and _is_plain(state) and moved.shape == state.shape:
                    # in place, because captured steps know the memory
                    state.copy_(moved)
                else:
                    states[key] = moved


def _is_per_weight(optimizer: Optimizer, key: str, state: Any, values: nn.Parameter) -> bool:
    """Whether this state is kept for each weight; what is kept for all of a parameter is one number."""
    if _rule(optimizer, key).move is not None:
        return True
    if state is None or isinstance(state, bool | int | float | str):
        return False
    if isinstance(state, Tensor) and (state.dim() == 0 or (state.numel() <= 1 and state.shape != values.shape)):
        return False
    fits = isinstance(state, Tensor) and state.shape[:1] == values.shape[:1] and state.is_floating_point()
    if fits and divided_alike(state, values) and (_is_plain(state) or _dequantized(state) is not None):
        return True
    shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
    raise ValueError(
        f"{type(optimizer).__name__} keeps {key!r} ({shape}) for values of shape {tuple(values.shape)}, and how that "
        "moves with the weights is not known: the topology of a model cannot change with this optimizer unless "
        "sparse_moon.algorithms.optimizers.register_state says how; or take method 'static', or an optimizer as AdamW"
    )


def _is_plain(state: Tensor) -> bool:
    return type(part_of(state)) in (Tensor, nn.Parameter)


def _dequantized(state: Tensor) -> Tensor | None:
    """The numbers of a tensor that is kept in few bits (torchao's optimizers); None for other kinds of tensors."""
    try:
        plain = state.dequantize()
    except (NotImplementedError, RuntimeError):
        return None
    return plain if _is_plain(plain) else None


def _moved(optimizer: Optimizer, key: str, state: Any, values: nn.Parameter, regrown: Regrown) -> Any:
    move = _rule(optimizer, key).move
    if move is not None:
        return move(state, regrown.remap)
    if not _is_plain(state):
        return _requantized(optimizer, key, state, regrown)
    moved, start = regrown.remap(state), start_of(optimizer, key, values)
    if start == 0.0:  # as new ones are
        return moved
    new = (regrown.source < 0).view(-1, *[1] * (moved.dim() - 1))
    return moved.masked_fill(divided_like(new, moved), start)


def _requantized(optimizer: Optimizer, key: str, state: Tensor, regrown: Regrown) -> Tensor:
    moved = regrown.remap(state.dequantize())
    if moved.shape != state.shape:
        raise ValueError(
            f"{type(optimizer).__name__} keeps {key!r} in blocks of few bits, which cannot get another size: take a "
            "method that keeps the number of weights, as rigl, or an optimizer with plain tensors"
        )
    state.copy_(moved)
    return state


def start_of(optimizer: Optimizer, key: str, values: nn.Parameter) -> float:
    """What the state of this name is before a weight's first step."""
    start = _rule(optimizer, key).start
    if isinstance(start, str):
        group = next(g for g in optimizer.param_groups if any(p is values for p in g["params"]))
        return float(group[start])
    return start


def synchronizes(optimizer: Any) -> bool:
    """Whether this batch ends with a step: accelerate's wrapper knows when it only accumulates gradients."""
    state = getattr(optimizer, "gradient_state", None)
    return state is None or bool(getattr(state, "sync_gradients", True))


@contextmanager
def stepping(optimizer: Any) -> Iterator[None]:
    """Steps inside the block are those of a training method."""
    every = (optimizer, *inner_optimizers(optimizer))
    for one in every:
        setattr(one, _STEPPING, True)
    try:
        yield
    finally:
        for one in every:
            setattr(one, _STEPPING, False)


def is_stepping(optimizer: Any) -> bool:
    """Whether a training method is calling the optimizer's step."""
    return getattr(optimizer, _STEPPING, False)


def stepped_optimizer(optimizer: Any) -> Any:
    """What a step comes down to: the optimizer within wrappers that keep nothing, as accelerate's and Lightning's.

    One with state of its own (Lookahead, ZeroRedundancyOptimizer), or around several, is itself what steps.
    """
    for _ in inner_optimizers(optimizer):
        wrapped = {id(value): value for value in vars(optimizer).values() if isinstance(value, Optimizer)}
        inner = next(iter(wrapped.values())) if len(wrapped) == 1 else None
        if inner is None or getattr(optimizer, "state", inner.state) is not inner.state:
            break
        optimizer = inner
    return optimizer


def attach(optimizer: Any, method: "Method") -> Any:
    """Let the optimizer's step be the method's, which in turn calls the optimizer's own.

    Returns:
        What steps: see :func:`stepped_optimizer`.
    """
    stepped = stepped_optimizer(optimizer)
    place = getattr(stepped.step, _ATTACHED, None)
    if place is None:
        place = _Place(method)
        _replace_step(stepped, place)
        for outer in inner_optimizers(optimizer):
            # with a gradient scaler accelerate calls the step that was there at prepare(): it looks for it anew here
            if hasattr(outer, "_optimizer_patched_step_method"):
                outer.__setstate__({})
    elif place.method.attached:
        raise ValueError(f"the optimizer is attached to method {place.method.name!r} already: detach() that first")
    place.method = method
    return stepped


@dataclass
class _Place:
    """Whose an optimizer's step is, while that method is attached; the step stays, as others may have wrapped it."""

    method: "Method"


def _replace_step(optimizer: Any, place: _Place) -> None:
    own = optimizer.step

    # a bound method, as learning rate schedules expect it
    @functools.wraps(getattr(own, "__func__", own))
    def step(self: Any, closure: Any = None, *more: Any, **named: Any) -> Any:
        def own_step(given: Any = None) -> Any:
            return own(**named) if given is None and not more else own(given, *more, **named)

        if is_stepping(self) or not place.method.attached:
            return own_step(closure)
        return _step_by(place.method, own_step, closure, named.get("grad_scaler")) if _unscale_for_fused(self) else None

    setattr(step, _ATTACHED, place)
    optimizer.step = MethodType(step, optimizer)


def _step_by(
    method: "Method", own_step: Callable[..., Any], closure: Callable[[], Any] | None, scaler: GradScaler | None
) -> Any:
    """What the optimizer's own step returned in that of the method, or else the closure."""
    results: list[Any] = []
    losses: list[Any] = []

    def noted_step(*given: Any) -> None:
        results.append(own_step(*given))

    def noted_closure() -> Any:
        assert closure is not None
        losses.append(closure())
        return losses[-1]

    method.own_step = noted_step
    try:
        method.step(scaler=scaler, closure=None if closure is None else noted_closure)
    finally:
        method.own_step = None
    return next((found for found in (*results, *losses) if found is not None), None)


def _unscale_for_fused(optimizer: Optimizer) -> bool:
    """Do what a gradient scaler leaves to a fused optimizer: unscale, or skip the step (False) after an overflow."""
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if overflow is not None and bool(overflow.item()):
        return False
    if scale is not None:
        for parameter in parameters_of(optimizer):
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    return True


def unscale_(scaler: GradScaler | None, optimizer: Any) -> GradScaler | None:
    """Unscale the optimizer's gradients, unless the caller has: to clip them.

    Returns:
        The scaler: this one, or that with which accelerate's optimizer steps. None where none is enabled.
    """
    if scaler is None:
        scaler, optimizer = getattr(optimizer, "scaler", None), getattr(optimizer, "optimizer", None)
    if not isinstance(scaler, GradScaler) or not scaler.is_enabled():
        return None
    with suppress(RuntimeError):  # "already been called"
        scaler.unscale_(optimizer)
    return scaler
