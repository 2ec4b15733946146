"""FLOP and memory accounting.

A multiplication and an addition count as one FLOP each. Biases, normalisation, activations, the loss and the optimizer
are left out, as in RigL (Evci et al. 2020); what the reliability methods add is counted apart.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.algorithms import ALGORITHMS, TrainingFlops
from sparse_moon.allocation import Allocation
from sparse_moon.layer_costs import LayerCost, layer_costs
from sparse_moon.nn import Exclude, Pattern, layer_densities, sparse_layers
from sparse_moon.nn.inspect import Inputs, weight_layers, weights
from sparse_moon.nn.projections import as_linear_layers
from sparse_moon.options import Refresh
from sparse_moon.reliability import RELIABILITY, RunCost
from sparse_moon.text_table import text_table
from sparse_moon.topology import block_grid, block_shape, blocks_of, matrix_shape

__all__ = [
    "LayerCost",
    "flops_report",
    "format_report",
    "layer_costs",
    "memory_report",
    "training_flops_ratio",
]


def training_flops_ratio(
    method: str,
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

    Each method's class says what it costs: :meth:`sparse_moon.algorithms.Method.training_flops`.

    Args:
        method: name of a training method, or the import path of one that has been imported.
        f_sparse, f_dense: forward FLOPs an example of the sparse (in the end) and of the dense network.
        interval: dT, steps from update to update.
        update_fraction: share of the training during which the topology is updated, T_end / T.
        updates_replace_step: which of the two ways of counting.
        f_start: forward FLOPs an example of all weights at the start, where there are more than in the end. By default
            a method that prunes begins with ``f_dense``, and the others with ``f_sparse``.
        start: share of the training before which a method that prunes prunes nothing.
        growth: mean share of weights, over the whole training, that a method with a soft memory bound holds besides.

    Raises:
        ValueError: an unknown method or a number out of range.
    """
    flops = TrainingFlops(
        f_sparse, f_dense, interval, update_fraction, updates_replace_step, start=f_start, start_fraction=start,
        growth=growth,
    )  # fmt: skip
    return ALGORITHMS.find(method).training_flops(flops)


def flops_report(
    model: nn.Module,
    inputs: Inputs,
    *,
    sparsity: float | None = None,
    allocation: Allocation = "erk",
    pattern: Pattern = "unstructured",
    exclude: Iterable[Exclude] | Exclude = (),
    method: str = "rigl",
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
            the model as it is, sparse layers included. Of no meaning to dense training.
        method, interval, update_fraction, growth: as :func:`training_flops_ratio`.
        built_sparsity: where training begins with more weights than it ends with, the sparsity at the start, allocated
            in the same way.
        num_classes, examples, epochs, batch_size, refresh: as :class:`sparse_moon.reliability.RunCost`, with averages
            over the last fifth of the epochs; by default CIFAR-10 with MOON's settings.

    Returns:
        JSON-serialisable: ``method``, ``sparsity`` (of all weights of the model), ``parameters`` (existing
        numbers, biases and norms included), ``forward_dense``, ``forward_sparse`` (FLOPs an example),
        ``forward_ratio``, ``train_ratio`` (to dense training), ``overhead`` ``{"moon": ..., "cigl": ...}``, by
        reliability method whose costs are known, and ``layers`` ``{name: {kind, weight_shape, density, forward_dense,
        forward_sparse}}``.

    Raises:
        ValueError: a sparsity for a model that has sparse layers already, a model that costs nothing, no examples or
            epochs, or as the functions that this one calls.
    """
    for name, number in (("examples", examples), ("epochs", epochs)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    densities: dict[str, float] = {}
    kind = ALGORITHMS.find(method)
    built = partial(
        _built_densities, model, allocation=allocation, pattern=pattern, exclude=exclude,
        constant_fan_in=kind.selection == "constant_fan_in",
    )  # fmt: skip
    if sparsity is not None and kind.sparse:
        if sparse_layers(model):
            raise ValueError(
                f"sparsity {sparsity} is for a dense model, this one has sparse layers: leave sparsity out"
            )
        densities = built(sparsity)
    costs = layer_costs(model, inputs, densities)
    f_dense, f_sparse = sum(c.forward_dense for c in costs), sum(c.forward_sparse for c in costs)
    if f_dense == 0:
        raise ValueError("none of the model's layers that cost FLOPs is called in a forward pass")
    f_start = None
    if built_sparsity is not None and densities:
        f_start = sum(c.forward_sparse for c in layer_costs(model, inputs, built(built_sparsity)))
    train_ratio = training_flops_ratio(
        method, f_sparse, f_dense, interval=interval, update_fraction=update_fraction, f_start=f_start, growth=growth
    )

    with as_linear_layers(model):  # whose names densities have
        found = weights(model)
    present = [weight.present * densities.get(weight.name, 1.0) for weight in found]
    numel = sum(weight.numel for weight in found)
    stored = sum(p.numel() for p in model.parameters())
    parameters = stored - sum(weight.present for weight in found) + sum(present)
    masked = sum(count for weight, count in zip(found, present, strict=True) if count < weight.numel)

    training_flops = 3.0 * f_dense * train_ratio * examples * epochs
    averaged_epochs = epochs - math.floor(0.8 * epochs)
    run_cost = RunCost(
        training_flops, forward=f_sparse, parameters=parameters, masked=masked, num_classes=num_classes,
        examples=examples, epochs=epochs, batch_size=batch_size, warmup_epochs=min(5, epochs),
        averaged_epochs=averaged_epochs, refresh=refresh,
    )  # fmt: skip
    overheads = {name: reliability.overhead(run_cost) for name, reliability in RELIABILITY.items()}
    layers = {}
    for cost in costs:
        layers[cost.name] = {**asdict(cost), "weight_shape": list(cost.weight_shape)}
        del layers[cost.name]["name"]
    return {
        "method": method,
        "sparsity": 1.0 - sum(present) / numel if numel else 0.0,
        "parameters": round(parameters),
        "forward_dense": f_dense,
        "forward_sparse": f_sparse,
        "forward_ratio": f_sparse / f_dense,
        "train_ratio": train_ratio,
        "overhead": {name: overhead for name, overhead in overheads.items() if overhead is not None},
        "layers": layers,
    }


def _built_densities(
    model: nn.Module, sparsity: float, *, allocation: Allocation, pattern: Pattern,
    exclude: Iterable[Exclude] | Exclude, constant_fan_in: bool,
) -> dict[str, float]:  # fmt: skip
    """Density by layer of what would be built: of whole blocks, or of as many in each row."""
    densities = layer_densities(model, sparsity, allocation, pattern=pattern, exclude=exclude)
    with as_linear_layers(model):
        layers = weight_layers(model)
        for name, density in densities.items():
            grid = block_grid(matrix_shape(tuple(layers[name].weight.shape)), block_shape(pattern))
            if total := math.prod(grid):
                densities[name] = blocks_of(density, grid, constant_fan_in=constant_fan_in) / total
    return densities


def format_report(report: Mapping[str, Any]) -> str:
    """A :func:`flops_report` as an aligned table for a terminal."""
    rows = [("layer", "kind", "weight", "density", "FLOPs dense", "FLOPs sparse")]
    for name, layer in report["layers"].items():
        shape = "x".join(map(str, layer["weight_shape"]))
        flops = (_quantity(layer["forward_dense"]), _quantity(layer["forward_sparse"]))
        rows.append((name, layer["kind"], shape, f"{layer['density']:.4f}", *flops))
    f_dense, f_sparse = report["forward_dense"], report["forward_sparse"]
    rows.append(("total", "", "", f"{1 - report['sparsity']:.4f}", _quantity(f_dense), _quantity(f_sparse)))
    lines = [text_table(rows, "lllrrr", total=True), ""]

    train, train_dense = report["train_ratio"] * 3 * f_dense, 3 * f_dense
    lines += [
        f"existing parameters        {report['parameters']:>9,}",
        f"forward FLOPs an example   {_quantity(f_sparse):>9}  {report['forward_ratio']:.3f} x {_quantity(f_dense)}",
        f"training FLOPs an example  {_quantity(train):>9}  {report['train_ratio']:.3f} x {_quantity(train_dense)}"
        f" (dense), with {report['method']}",
    ]
    for method, cost in report["overhead"].items():
        label = RELIABILITY[method].__name__ if method in RELIABILITY else method
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
    time, are not, nor is what kernels on the CPU keep of a topology (up to 99 % sparsity some 2 bytes a weight).

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
