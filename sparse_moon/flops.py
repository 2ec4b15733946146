"""FLOP and memory accounting.

A multiplication and an addition count as one FLOP each. Biases, normalisation, activations, the loss and the optimizer
are left out, as in RigL (Evci et al. 2020); what the reliability methods add is counted apart.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.allocation import Allocation
from sparse_moon.app.names import TrainingMethod
from sparse_moon.layer_costs import LayerCost, layer_costs
from sparse_moon.nn import Exclude, Pattern, layer_densities, sparse_layers
from sparse_moon.nn.inspect import Inputs, weights

__all__ = [
    "LayerCost",
    "Refresh",
    "TrainingMethod",
    "cigl_overhead",
    "flops_report",
    "format_report",
    "layer_costs",
    "memory_report",
    "moon_overhead",
    "training_flops_ratio",
]

Refresh = Literal["final", "epoch"]


def training_flops_ratio(
    method: TrainingMethod,
    f_sparse: float,
    f_dense: float,
    *,
    interval: int = 100,
    update_fraction: float = 0.75,
    updates_replace_step: bool = True,
    f_start: float | None = None,
    start: float = 0.0,
    growth: float = 0.0,
) -> float:
    """Mean training FLOPs an example, relative to dense training (``3 f_dense``: forward and two gradients).

    Dense training costs ``3 f_D``, a fixed topology and SET ``3 f_S``. RigL and SRigL need the dense weight gradient
    for each update, ``2 f_S + f_D``, until the topology is frozen, then ``3 f_S`` (Evci et al. 2020):

    - the update takes the place of a step, as here: ``(3 f_S (dT - 1) + 2 f_S + f_D) / dT``;
    - the update is an extra pass, as the paper counts: ``(3 f_S dT + 2 f_S + f_D) / (dT + 1)``.

    With a = ``start`` and e = ``update_fraction``, the others cost

    - MEST ``3 f_S``, and ``3 f_S (1 + growth)`` in its variant with a soft memory bound;
    - GMP ``3 f`` with f the mean along its cubic, ``a f_start + (e - a) (f_S + (f_start - f_S) / 4) + (1 - e) f_S``;
    - GraNet as GMP and the dense weight gradient, ``(f_D - f) / dT``, until e;
    - Top-KAST ``3 f_start`` until e, then ``3 f_S``: the kernels here compute with the idle weights as well.

    Args:
        method: one of ``TrainingMethod``.
        f_sparse, f_dense: forward FLOPs an example of the sparse (in the end) and of the dense network.
        interval: dT, steps from update to update.
        update_fraction: share of the training during which the topology is updated, T_end / T.
        updates_replace_step: which of the two ways of counting.
        f_start: forward FLOPs an example of the network that ``"gmp"`` and ``"granet"`` prune (default ``f_dense``), or
            of all weights that ``"top-kast"`` trains (default ``f_sparse``).
        start: share of the training before which ``"gmp"`` and ``"granet"`` prune nothing.
        growth: mean share of weights, over the whole training, that ``"mest"`` holds besides.

    Raises:
        ValueError: an unknown method or a number out of range.
    """
    if method not in get_args(TrainingMethod):
        raise ValueError(f"unknown method {method!r}, expected one of {get_args(TrainingMethod)}")
    if not 0 <= f_sparse <= f_dense or f_dense == 0:
        raise ValueError(f"need 0 <= f_sparse <= f_dense and f_dense > 0, got {f_sparse} and {f_dense}")
    if interval < 1 or not 0.0 <= update_fraction <= 1.0:
        raise ValueError(f"need interval >= 1 and update_fraction in [0, 1], got {interval} and {update_fraction}")
    if method == "dense":
        return 1.0
    if f_start is None:
        f_start = f_sparse if method == "top-kast" else f_dense
    if not f_sparse <= f_start <= f_dense or not 0.0 <= start <= update_fraction or growth < 0.0:
        raise ValueError(
            f"need f_sparse <= f_start <= f_dense, 0 <= start <= update_fraction and growth >= 0, "
            f"got f_start {f_start}, start {start} and growth {growth}"
        )
    step = 3 * f_sparse
    if method in ("gmp", "granet"):
        # forward FLOPs while it updates, summed over that share of the training
        updating = start * f_start + (update_fraction - start) * (f_sparse + (f_start - f_sparse) / 4)
        gradients = (update_fraction * f_dense - updating) / interval if method == "granet" else 0.0
        return (3 * updating + gradients + (1 - update_fraction) * step) / (3 * f_dense)
    if method == "top-kast":
        return (update_fraction * 3 * f_start + (1 - update_fraction) * step) / (3 * f_dense)
    if method not in ("rigl", "srigl"):
        return (1.0 + growth if method == "mest" else 1.0) * step / (3 * f_dense)
    update = 2 * f_sparse + f_dense
    steps_per_update = interval - 1 if updates_replace_step else interval
    updating = (step * steps_per_update + update) / (steps_per_update + 1)
    return (update_fraction * updating + (1 - update_fraction) * step) / (3 * f_dense)


def moon_overhead(
    training_flops: float,
    *,
    forward: float,
    parameters: float,
    num_classes: int,
    examples: int,
    epochs: int,
    warmup_epochs: int = 5,
    averaged_epochs: int = 20,
    refresh: Refresh = "final",
) -> dict[str, float]:
    """What MOON adds to a training, in FLOPs (arXiv 2403.20047, Appendix F).

    - ``loss``: ``4 (K + 1)`` an example and epoch during the warm-up, ``8 (K + 1)`` after it. For ImageNet in batches
      of 32 these are the paper's 1.3e5 and 2.6e5 an iteration; they make 1.0e12 in all, not the paper's 2.3e15.
    - ``averaging``: 3 for each parameter and averaged epoch, ``mean += (w - mean) / n``. The paper has 1.8e9.
    - ``batch_norm``: a forward pass over the training set, once at the end, or after every averaged epoch as in the
      released code (the paper's 6.7 % of the training; once is 0.33 %).

    Args:
        training_flops: of the whole training without MOON.
        forward: FLOPs an example of the (sparse) network's forward pass.
        parameters: existing numbers that are averaged.
        num_classes: K.
        examples: size of the training set.
        epochs, warmup_epochs, averaged_epochs: of the training, with w = 0, and whose end takes part in the vote.
        refresh: ``"final"`` or ``"epoch"``.

    Returns:
        ``loss``, ``averaging``, ``batch_norm``, ``total``, and ``ratio`` = total / training_flops.

    Raises:
        ValueError: an unknown refresh or a number out of range.
    """
    passes = _batch_norm_passes(training_flops, epochs, averaged_epochs, refresh)
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"warmup_epochs must be in [0, {epochs}], got {warmup_epochs}")
    parts = {
        "loss": (num_classes + 1) * examples * (4.0 * warmup_epochs + 8.0 * (epochs - warmup_epochs)),
        "averaging": 3.0 * parameters * averaged_epochs,
        "batch_norm": forward * examples * passes,
    }
    return _with_total(parts, training_flops)


def cigl_overhead(
    training_flops: float,
    *,
    forward: float,
    parameters: float,
    masked: float,
    examples: int,
    epochs: int,
    batch_size: int,
    averaged_epochs: int = 20,
    refresh: Refresh = "final",
) -> dict[str, float]:
    """What CigL adds to a training, in FLOPs, counted as :func:`moon_overhead` does.

    - ``mask``: 2 for each masked weight and step: the random mask times the weights before the forward pass, and times
      their gradients after the backward pass. Drawing random bits is integer work and not counted.
    - ``averaging``: 3 for each parameter and averaged epoch, and 1 more for each masked weight, whose mask is averaged
      with it.
    - ``batch_norm``: as for MOON.

    Args:
        training_flops, forward, parameters, examples, epochs, averaged_epochs, refresh: as :func:`moon_overhead`.
        masked: existing weights under the random mask.
        batch_size: examples a step; an epoch's last batch may be smaller.

    Returns:
        ``mask``, ``averaging``, ``batch_norm``, ``total``, and ``ratio`` = total / training_flops.

    Raises:
        ValueError: an unknown refresh or a number out of range.
    """
    passes = _batch_norm_passes(training_flops, epochs, averaged_epochs, refresh)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parts = {
        "mask": 2.0 * masked * math.ceil(examples / batch_size) * epochs,
        "averaging": (3.0 * parameters + masked) * averaged_epochs,
        "batch_norm": forward * examples * passes,
    }
    return _with_total(parts, training_flops)


def _batch_norm_passes(training_flops: float, epochs: int, averaged_epochs: int, refresh: Refresh) -> int:
    if training_flops <= 0:
        raise ValueError(f"training_flops must be positive, got {training_flops}")
    if not 0 <= averaged_epochs <= epochs:
        raise ValueError(f"averaged_epochs must be in [0, {epochs}], got {averaged_epochs}")
    if refresh not in get_args(Refresh):
        raise ValueError(f"unknown refresh {refresh!r}, expected one of {get_args(Refresh)}")
    return averaged_epochs if refresh == "epoch" else min(averaged_epochs, 1)


def _with_total(parts: dict[str, float], training_flops: float) -> dict[str, float]:
    total = sum(parts.values())
    return {**parts, "total": total, "ratio": total / training_flops}


def flops_report(
    model: nn.Module,
    inputs: Inputs,
    *,
    sparsity: float | None = None,
    allocation: Allocation = "erk",
    pattern: Pattern = "unstructured",
    exclude: Iterable[Exclude] | Exclude = (),
    method: TrainingMethod = "rigl",
    interval: int = 100,
    update_fraction: float = 0.75,
    built_sparsity: float | None = None,
    growth: float = 0.0,
    num_classes: int = 10,
    examples: int = 50_000,
    epochs: int = 100,
    batch_size: int = 128,
    refresh: Refresh = "final",
) -> dict[str, Any]:
    """What a model costs, as it is or as :func:`sparse_moon.nn.sparsify` would make it; the model is not changed.

    Args:
        model, inputs: as :func:`layer_costs`.
        sparsity: to give a dense model, with ``allocation``, ``pattern`` and ``exclude`` as in ``sparsify``; None takes
            the model as it is, sparse layers included. Of no meaning to method ``"dense"``.
        method, interval, update_fraction, growth: as :func:`training_flops_ratio`.
        built_sparsity: where training begins with more weights than it ends with, the sparsity at the start (of all
            weights that ``"top-kast"`` trains), allocated in the same way.
        num_classes, examples, epochs, batch_size, refresh: as :func:`moon_overhead` and :func:`cigl_overhead`, which
            average over the last fifth of the epochs; by default CIFAR-10 with the paper's settings.

    Returns:
        JSON-serialisable: ``method``, ``sparsity`` (of all weights of the model), ``parameters`` (existing
        numbers, biases and norms included), ``forward_dense``, ``forward_sparse`` (FLOPs an example),
        ``forward_ratio``, ``train_ratio`` (to dense training), ``overhead`` ``{"moon": ..., "cigl": ...}`` and
        ``layers`` ``{name: {kind, weight_shape, density, forward_dense, forward_sparse}}``.

    Raises:
        ValueError: a sparsity for a model that has sparse layers already, a model that costs nothing, or as the
            functions that this one calls.
    """
    densities = {}
    if sparsity is not None and method != "dense":
        if sparse_layers(model):
            raise ValueError(
                f"sparsity {sparsity} is for a dense model, this one has sparse layers: leave sparsity out"
            )
        densities = layer_densities(model, sparsity, allocation, pattern=pattern, exclude=exclude)
    costs = layer_costs(model, inputs, densities)
    f_dense, f_sparse = sum(c.forward_dense for c in costs), sum(c.forward_sparse for c in costs)
    if f_dense == 0:
        raise ValueError("none of the model's layers that cost FLOPs is called in a forward pass")
    f_start = None
    if built_sparsity is not None and densities:
        start = layer_densities(model, built_sparsity, allocation, pattern=pattern, exclude=exclude)
        f_start = sum(c.forward_sparse for c in layer_costs(model, inputs, start))
    train_ratio = training_flops_ratio(
        method, f_sparse, f_dense, interval=interval, update_fraction=update_fraction, f_start=f_start, growth=growth
    )

    found = weights(model)
    present = {weight.name: weight.present * densities.get(weight.name, 1.0) for weight in found}
    numel = sum(weight.numel for weight in found)
    stored = sum(p.numel() for p in model.parameters())
    parameters = stored - sum(weight.present - present[weight.name] for weight in found)
    masked = sum(present[weight.name] for weight in found if present[weight.name] < weight.numel)

    training_flops = 3.0 * f_dense * train_ratio * examples * epochs
    averaged_epochs = epochs - math.floor(0.8 * epochs)
    moon = moon_overhead(
        training_flops, forward=f_sparse, parameters=parameters, num_classes=num_classes, examples=examples,
        epochs=epochs, warmup_epochs=min(5, epochs), averaged_epochs=averaged_epochs, refresh=refresh,
    )  # fmt: skip
    cigl = cigl_overhead(
        training_flops, forward=f_sparse, parameters=parameters, masked=masked, examples=examples, epochs=epochs,
        batch_size=batch_size, averaged_epochs=averaged_epochs, refresh=refresh,
    )  # fmt: skip
    layers = {}
    for cost in costs:
        layers[cost.name] = {**asdict(cost), "weight_shape": list(cost.weight_shape)}
        del layers[cost.name]["name"]
    return {
        "method": method,
        "sparsity": 1.0 - sum(present.values()) / numel if numel else 0.0,
        "parameters": round(parameters),
        "forward_dense": f_dense,
        "forward_sparse": f_sparse,
        "forward_ratio": f_sparse / f_dense,
        "train_ratio": train_ratio,
        "overhead": {"moon": moon, "cigl": cigl},
        "layers": layers,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """A :func:`flops_report` as an aligned table for a terminal."""
    rows = [("layer", "kind", "weight", "density", "FLOPs dense", "FLOPs sparse")]
    for name, layer in report["layers"].items():
        shape = "x".join(map(str, layer["weight_shape"]))
        flops = (_quantity(layer["forward_dense"]), _quantity(layer["forward_sparse"]))
        rows.append((name, layer["kind"], shape, f"{layer['density']:.4f}", *flops))
    f_dense, f_sparse = report["forward_dense"], report["forward_sparse"]
    rows.append(("total", "", "", f"{1 - report['sparsity']:.4f}", _quantity(f_dense), _quantity(f_sparse)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    lines = ["  ".join(to(cell, w) for to, cell, w in zip(align, row, widths, strict=True)) for row in rows]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *(line.rstrip() for line in lines[1:-1]), rule, lines[-1].rstrip(), ""]

    train, train_dense = report["train_ratio"] * 3 * f_dense, 3 * f_dense
    lines += [
        f"existing parameters        {report['parameters']:>9,}",
        f"forward FLOPs an example   {_quantity(f_sparse):>9}  {report['forward_ratio']:.3f} x {_quantity(f_dense)}",
        f"training FLOPs an example  {_quantity(train):>9}  {report['train_ratio']:.3f} x {_quantity(train_dense)}"
        f" (dense), with {report['method']}",
    ]
    for method, label in (("moon", "MOON"), ("cigl", "CigL")):
        cost = report["overhead"][method]
        parts = [
            f"{k.replace('_', ' ')} {_quantity(v).rstrip()}" for k, v in cost.items() if k not in ("total", "ratio")
        ]
        lines.append(f"{label} adds to training {cost['ratio']:>13.2%}  {', '.join(parts)}")
    return "\n".join(lines)


def _quantity(value: float) -> str:
    """A count with two decimals and an SI prefix, always of the same width behind the point."""
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.2f} {prefix}"
    return f"{value:.2f}  "


def memory_report(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """Bytes that the weights of a model's sparse layers take in training, and those of the dense weights instead.

    Only these weights count, not biases, norms, dense layers or activations. The optimizer's share is what its state
    holds now for each weight (nothing before the first step); dense training would hold as many tensors of the dense
    size. One gradient is counted, whether it is there or not. RigL's dense gradients on update batches, one layer at a
    time, are not.

    Args:
        model: with sparse layers; weights that are shared count once.
        optimizer: that trains the model.

    Returns:
        ``parameter_bytes``, ``gradient_bytes``, ``optimizer_bytes``, ``index_bytes`` (the topologies' buffers); the
        first three again as ``dense_...`` for the dense weights; and ``ratio``, the sum of the first four over that of
        the dense three, 1.0 for a model without sparse layers.
    """
    sizes = dict.fromkeys(("parameter", "gradient", "optimizer", "index"), 0)
    dense = dict.fromkeys(("parameter", "gradient", "optimizer"), 0)
    for layer in sparse_layers(model).values():
        values, numel = layer.values, layer.topology.numel
        state = optimizer.state.get(values, {})
        moments = [s for s in state.values() if isinstance(s, Tensor) and s.shape == values.shape]
        sizes["parameter"] += values.nbytes
        sizes["gradient"] += values.nbytes
        sizes["optimizer"] += sum(moment.nbytes for moment in moments)
        sizes["index"] += sum(buffer.nbytes for buffer in layer.topology.buffers())
        dense["parameter"] += numel * values.element_size()
        dense["gradient"] += numel * values.element_size()
        dense["optimizer"] += sum(numel * moment.element_size() for moment in moments)
    total, dense_total = sum(sizes.values()), sum(dense.values())
    return {
        **{f"{name}_bytes": size for name, size in sizes.items()},
        **{f"dense_{name}_bytes": size for name, size in dense.items()},
        "ratio": total / dense_total if dense_total else 1.0,
    }
