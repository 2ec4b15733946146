"""Passes of a network over a data set, of whatever form batches and results are."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_moon.nn import SparseLinear, evaluation_mode
from sparse_moon.ood.cosine import CosineHead
from sparse_moon.ood.outputs import Head, Outputs, joined

Batches = Iterable[Tensor] | Iterable[Sequence[Tensor]] | Iterable[Mapping[str, Tensor]]
"""Batches of images, of (images, labels, ...) or of mappings, in something to iterate over again: a data loader."""

Perturb = Callable[[nn.Module, Tensor], Tensor]

_IMAGES = ("image", "images", "pixel_values", "x")
_LABELS = ("label", "labels", "target", "targets", "y")


def classifier_head(model: nn.Module) -> nn.Module:
    """The last linear module, ``nn.Linear``, `SparseLinear` or `CosineHead`, in definition order.

    `collect` finds the head by what it returns, in whatever order modules were defined.

    Raises:
        ValueError: the model has no linear module.
    """
    return _linear_modules(model)[-1]


def each_batch(
    model: nn.Module,
    batches: Batches,
    visit: Callable[[Outputs], object],
    *,
    device: torch.device | str | None = None,
    perturb: Perturb | None = None,
    head: str | nn.Module | None = None,
) -> None:
    """Run ``model`` once over ``batches`` in evaluation mode and hand the outputs of each to ``visit``.

    The model is left as it was found, also after an error: the mode of every module, hooks, gradients. Images and
    labels are left alone, too.

    The head is the linear module (``nn.Linear``, `SparseLinear`, `CosineHead`) that returned the logits of the first
    batch; where no one did, the only one whose output they are but for one positive factor and a shift of each row, as
    of a temperature or log-softmax. Where there is none, outputs have no features.

    Args:
        model: classifier from images to (B, K) or (B, K + 1) logits: a tensor, ``logits`` of a mapping or an object, or
            one of a tuple that is what a linear module returned.
        batches: images, (images, labels, ...), of which the rest is not read, or mappings; see `read_batch`.
        visit: called with outputs on ``device``.
        device: where the images go; the device of the model's first parameter by default.
        perturb: ``(model, images) -> images``, applied to each batch first.
        head: the module whose input is the features, or its name; found as above by default.

    Raises:
        ValueError: no batches; batches, images or outputs of another form; no linear module, a head that is not
            in the model, that the forward pass does not reach, that sees other than (B, D) features, or that does not
            return the logits of all batches if it returned the first; labels in only some of the batches.
    """
    device = model_device(model) if device is None else device
    named = model.get_submodule(head) if isinstance(head, str) and head in dict(model.named_modules()) else head
    if named is not None and not any(module is named for module in model.modules()):
        raise ValueError(f"expected head, a module of the model or its name, got {head!r}")
    watched = _linear_modules(model) if named is None else [cast(nn.Module, named)]
    found: tuple[nn.Module | None, Head | None] | None = None
    count = labelled = 0
    with torch.no_grad(), evaluation_mode(model):
        for batch in batches:
            images, target = read_batch(batch)
            images = images.to(device, copy=True)  # the model may write into them
            if perturb is not None:
                images = perturb(model, images)
            with _calls(watched, device) as calls:
                output = model(images)
            if watched and not calls:
                raise ValueError(
                    f"the forward pass does not reach {_names(model, watched)}, so there is no head "
                    "(or the model is compiled and skips hooks: pass the original)"
                )
            returned = read_logits(output, [call.returned for call in calls])
            logits = returned.to(device, torch.float32, copy=True)
            if logits.ndim != 2 or len(logits) != len(images):
                raise ValueError(
                    f"expected logits (B, K) of images {tuple(images.shape)}, got shape {tuple(logits.shape)}"
                )
            call = calls[-1] if named is not None else _head_call(calls, logits, returned)
            if found is None:
                found = (None, None) if call is None else (call.module, _read_head(call.module, device))
                watched = [] if call is None else [call.module]  # hooks keep transformers from their fast path
            elif call is None and found[0] is not None:
                raise ValueError(
                    f"{_names(model, watched)} returned the logits of the first batch but not of another: "
                    "pass head, the module whose input is the features"
                )
            labels = None if target is None else _read_labels(target).to(device)
            linear = call is not None and call.result is not None and _same(call.result, logits)
            visit(Outputs(logits, None if call is None else call.features, labels, found[1] if linear else None))
            count += 1
            labelled += labels is not None
    if not count:
        raise ValueError("no batches: empty data, or an iterator that was used before")
    if labelled not in (0, count):
        raise ValueError(f"expected labels in all batches or in none, got them in {labelled} of {count}")


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    device: torch.device | str | None = None,
    perturb: Perturb | None = None,
    head: str | nn.Module | None = None,
) -> Outputs:
    """Run ``model`` once over ``batches`` and keep logits, features, labels and head; arguments as `each_batch`.

    Returns:
        Outputs on the CPU, where those of a large data set fit.

    Raises:
        ValueError: as `each_batch`.
    """
    parts: list[Outputs] = []
    each_batch(
        model, batches, lambda outputs: parts.append(outputs.to("cpu")), device=device, perturb=perturb, head=head
    )
    return joined(parts)


def read_batch(batch: Any) -> tuple[Tensor, Any]:
    """Images, and labels or None, of a batch of one of the forms that loaders give.

    Images alone, a sequence that begins with images and labels, or a mapping with ``image``, ``images``,
    ``pixel_values`` or ``x`` and perhaps ``label``, ``labels``, ``target``, ``targets`` or ``y``.

    Raises:
        ValueError: another form.
    """
    images, labels = batch, None
    if isinstance(batch, Mapping):
        images, labels = (_only(batch, keys) for keys in (_IMAGES, _LABELS))
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        images, labels = (*batch[:2], None, None)[:2]
    if isinstance(images, Tensor):
        return images, labels
    keys = f" with keys {list(batch)}" if isinstance(batch, Mapping) else ""
    raise ValueError(
        f"expected batches of a tensor of images, of (images, labels, ...), or of mappings with one of "
        f"{', '.join(_IMAGES)}; got {type(batch).__name__}{keys}"
    )


def read_logits(output: Any, returned: Sequence[Tensor]) -> Tensor:
    """The logits among what a model returns.

    Args:
        output: a tensor, a mapping or an object with ``logits``, or a sequence with one of ``returned``.
        returned: what the model's linear modules returned in this pass.

    Raises:
        ValueError: none, or several.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    got = type(output).__name__
    if isinstance(output, Mapping):
        got += f" with keys {list(output)}"
    elif isinstance(output, Sequence):
        candidates = [part for part in output if any(part is tensor for tensor in returned)]
        if len(candidates) == 1:
            return candidates[0]
        got += f" of {len(output)} parts, {len(candidates)} of them from a linear module"
    raise ValueError(
        "expected a model that returns logits, a mapping or object with logits, or a tuple of which one part is what "
        f"a linear module returned; got {got}"
    )


def model_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The (B, C) logits of a model, whatever else it returns; see `read_logits`."""
    returned: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, args, result: returned.append(result)) for m in _linear(model)]
    try:
        return read_logits(model(images), returned)
    finally:
        for handle in handles:
            handle.remove()


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter, or buffer; the CPU where it has none."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


@dataclass(frozen=True, eq=False)
class _Call:
    """A module, copies of its input and result where the result is (B, C) or it was asked for, and the result."""

    module: nn.Module
    features: Tensor | None
    result: Tensor | None
    returned: Tensor


@contextmanager
def _calls(modules: Sequence[nn.Module], device: torch.device | str) -> Iterator[list[_Call]]:
    """The calls of ``modules`` inside the block, in their order."""
    calls: list[_Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if result.ndim != 2 and len(modules) > 1:  # no head, but perhaps one of a transformer's many large layers
            calls.append(_Call(module, None, None, result[:0]))
            return
        if not isinstance(given, Tensor):
            raise ValueError(f"expected a head that is called with a tensor of features, got {type(given).__name__}")
        # Copies: they may be views into something larger or be overwritten later in the forward pass.
        features, copy = (tensor.to(device, torch.float32, copy=True) for tensor in (given, result))
        calls.append(_Call(module, features, copy, result))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _head_call(calls: Sequence[_Call], logits: Tensor, returned: Tensor) -> _Call | None:
    """The call that gave the logits, see `each_batch`."""
    whole = [call for call in calls if call.result is not None and call.result.shape == logits.shape]
    same = [call for call in whole if _same(cast(Tensor, call.result), logits)]
    if same:
        return next((call for call in same if call.returned is returned), same[-1])
    scaled = [call for call in whole if _scaled(cast(Tensor, call.result), logits)]
    return scaled[0] if len(scaled) == 1 else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _scaled(result: Tensor, logits: Tensor) -> bool:
    """Whether ``logits`` are ``s result + t_i`` in row i, with one s > 0, up to rounding."""
    if len(result) * (result.shape[1] - 1) < 2:  # of which that is true by chance
        return False
    a, b = (rows.double() - rows.double().mean(1, keepdim=True) for rows in (result, logits))
    factor = (a * b).sum() / a.square().sum()
    return bool((factor > 0) & ((b - factor * a).abs().max() <= 1e-4 * b.abs().max()))


def _linear(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | SparseLinear | CosineHead)]


def _linear_modules(model: nn.Module) -> list[nn.Module]:
    linear = _linear(model)
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear module to take as the classifier head")
    return linear


def _names(model: nn.Module, modules: Sequence[nn.Module]) -> str:
    """For messages."""
    if len(modules) > 1:
        return "any linear module"
    return f"the module {next(name for name, module in model.named_modules() if module is modules[0])!r}"


def _only(batch: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What stands under the one of ``keys`` that is there, or None."""
    there = [key for key in keys if key in batch]
    if len(there) > 1:
        raise ValueError(f"expected one of {', '.join(keys)} in a batch, got {there}")
    return batch[there[0]] if there else None


def _read_labels(labels: Any) -> Tensor:
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"expected labels that are class numbers, got {type(labels).__name__}") from None
    if values.is_floating_point() and not values.equal(values.round()):
        raise ValueError("expected labels that are class numbers, got fractions")
    return values.to(torch.int64)


def _read_head(module: nn.Module, device: torch.device | str) -> Head | None:
    """A copy of the head's weights, because the model may be trained on; None if it is no linear module."""
    if not isinstance(module, nn.Linear | SparseLinear | CosineHead):
        return None
    dense: Any = module.to_dense() if isinstance(module, SparseLinear) else module
    weight = dense.weight.detach().to(device, torch.float32, copy=True)
    if isinstance(module, CosineHead) or dense.bias is None:
        return Head(weight, weight.new_zeros(len(weight)), isinstance(module, CosineHead))
    return Head(weight, dense.bias.detach().to(device, torch.float32, copy=True))
