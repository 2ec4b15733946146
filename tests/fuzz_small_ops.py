"""Cases of fuzz_ops.py: the operators that are no products, and calls of any operator with what it cannot take."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from fuzz_layers import DTYPES, ERRORS, SIZES, Draw, as_good, entries, laid_out, settings
from torch import Tensor

from sparse_moon import ops
from sparse_moon.ops.bernoulli_mask import bernoulli_mask_reference, random_scores_reference
from sparse_moon.ops.drop_and_grow import drop_and_grow_reference
from sparse_moon.ops.unknown_aware_loss import unknown_aware_loss_reference
from sparse_moon.topology import Topology, build_index

OPS = torch.ops.sparse_moon
_REFERENCE = torch._C.DispatchKey.CompositeExplicitAutograd


def unknown_aware_loss(draw: Draw) -> None:
    batch, known = draw("batch", (1, 2, 3, 63, 257)), draw("classes", (1, 2, 10, 63, 100, 257))
    logits = laid_out(draw, "layout", (batch, known + 1), torch.float32) * draw("scale", (1.0, 5.0, 100.0, 1e4))
    logits = logits.round() if draw.chance("ties", 0.3) else logits
    logits = logits.to(draw("dtype", DTYPES)).detach().requires_grad_()
    target, w = torch.randint(known, (batch,)), torch.tensor(draw("w", (0.0, 0.01, 1.0, 4.0)))
    if draw.chance("target_layout", 0.3):
        target = torch.stack([target, target], -1)[:, 0]
    with settings(draw):
        if draw.chance("bad", 0.2):
            target = target.clone()
            target[draw.random.randrange(batch)] = draw("label", (-1, known, -100, 2**40, -(2**63)))
            try:
                ops.unknown_aware_loss(logits, target, w)
            except ValueError:
                return
            raise AssertionError("a label outside of the classes was taken")
        loss, statistics = ops.unknown_aware_loss(logits, target, w)
        (grad,) = torch.autograd.grad(loss, logits)

    def by_torch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = logits.detach().to(dtype).requires_grad_()
        value = unknown_aware_loss_reference(z, target, w.to(dtype))
        return value.detach(), torch.autograd.grad(value, z)[0]

    theirs, exact = by_torch(loss.dtype), by_torch(torch.float64)
    size = logits.detach().double().abs().max() + 4  # probabilities are as exact as the logits are small
    as_good("loss", loss.detach(), theirs[0], exact[0], size * (exact[0].abs() + 1))
    as_good("grad", grad, theirs[1].to(grad.dtype), exact[1], size * (exact[1].abs().max() + 1))
    wrong = (logits.float() if loss.dtype == torch.float32 else logits).argmax(1) != target
    assert int(statistics.errors) == int(wrong.sum())


SPECIAL = (torch.nan, torch.inf, 0.0, -0.0, 1e-45, 1.0, 1.0, 3.4e38)


def scores(draw: Draw, name: str, shape: tuple[int, ...], special: tuple[float, ...]) -> Tensor:
    kind = draw(name, ("normal", "ties", "special", "equal"))
    if kind == "normal":
        return laid_out(draw, f"{name}_layout", shape, torch.float32)
    if kind == "equal":
        return torch.full(shape, draw(f"{name}_number", special))
    table = torch.tensor(special if kind == "special" else (0.0, 1.0, 2.0))
    return table[torch.randint(len(table), shape)]


def drop_and_grow(draw: Draw) -> None:
    grid = (draw("rows", SIZES), draw("cols", SIZES))
    topology = Topology(entries(draw, grid).flatten().nonzero().flatten(), grid)
    n, places = topology.num_blocks, grid[0] * grid[1]
    drop = draw("drop", (0, n, min(1, n), n // 3, n // 2))
    room = places - n + drop
    grow = draw("grow", (0, room, min(1, room), min(drop, room), room // 2))
    drop_score = scores(draw, "drop_score", (n,), (*SPECIAL, -torch.inf, -1.0))
    grow_score = scores(draw, "grow_score", grid, (*SPECIAL, -3.4e38, -torch.inf))
    dtype = draw("dtype", (torch.float32,) * 5 + (torch.float64, torch.bfloat16))
    drop_score, grow_score = drop_score.to(dtype), grow_score.to(dtype)
    with settings(draw):
        found = ops.drop_and_grow(drop_score, grow_score, topology, drop, grow)
    assert found.index[1].numel() == n - drop + grow
    sound(found.index, grid)
    expected = drop_and_grow_reference(drop_score, grow_score, topology.row_ptr, topology.col, drop, grow)
    for a, b in zip((*found.index, found.source), expected, strict=True):
        assert torch.equal(a, b), "differs from the reference"


def sound(index: tuple[Tensor, ...], grid: tuple[int, int]) -> None:
    """By torch's operators alone."""
    row_ptr, col = index[0].tolist(), index[1].tolist()
    assert row_ptr[0] == 0 and row_ptr[-1] == len(col) and len(row_ptr) == grid[0] + 1, "row pointers"
    positions = []
    for row, (begin, end) in enumerate(pairwise(row_ptr)):
        assert begin <= end, "row pointers"
        positions += [row * grid[1] + c for c in col[begin:end] if 0 <= c < grid[1]]
    assert len(positions) == len(col) and positions == sorted(set(positions)), "columns"
    columns = torch.tensor(col, dtype=torch.int32)
    args = (index[0], columns, grid[1])
    transpose = OPS.transpose_index.default._op_dk(_REFERENCE, *args)
    assert all(torch.equal(a, b) for a, b in zip(index[2:], transpose, strict=True)), "transpose index"


def check_index(draw: Draw) -> None:
    """What the check accepts is an index."""
    grid = (draw("rows", SIZES), draw("cols", SIZES))
    index = [t.clone() for t in build_index(entries(draw, grid).flatten().nonzero().flatten(), grid)]
    for _ in range(draw("changes", (0, 1, 1, 2, 5))):
        number = draw("number", range(5))
        changed, n = index[number], index[number].numel()
        kind = draw("kind", ("noise", "one", "swap", "shorter", "longer", "all"))
        if kind == "shorter" and n:
            index[number] = changed[:-1].clone()
        elif kind == "longer":
            index[number] = torch.cat([changed, changed[-1:] if n else changed.new_zeros(1)])
        elif n and kind == "one":
            changed[draw.random.randrange(n)] += draw("by", (1, -1, 2, 1 << 20))
        elif n and kind == "noise":
            changed[draw.random.randrange(n)] = draw("value", (-1, 2**31 - 1, -(2**31), n, grid[0], grid[1]))
        elif n and kind == "swap":
            index[number] = changed[torch.randperm(n)]
        elif kind == "all":
            low, high = draw("range", ((-(2**31), 2**31), (-2, n + 2), (0, max(grid))))
            index[number] = torch.randint(low, max(high, low + 1), (n,)).to(torch.int32)
    try:
        fault, _ = OPS.check_index(*index).tolist()
    except ERRORS:
        fault = -1
    right = True
    try:
        sound(tuple(index), grid)
    except (AssertionError, *ERRORS):
        right = False
    shape = (index[0].numel() - 1, index[2].numel() - 1)
    if shape == grid:
        assert (fault == 0) == right, f"fault {fault} of an index that is {'right' if right else 'wrong'}"
    elif fault == 0:  # a change of the last pointer may make an index of another grid
        sound(tuple(index), shape)


def masks_and_averages(draw: Draw) -> None:
    seed = draw("seed_of_mask", (0, 1, -1, 2**63 - 1, -(2**63), 12345))
    step = torch.tensor(draw("step", (0, 1, 2**32, 2**40 + 3, 2**63 - 1, -1)))
    stream, size = draw("stream", (0, 7, 2**31, 2**32 - 1)), draw("size", (0, 1, 2, 3, 4, 5, 63, 64, 257, 1023))
    keep = draw("keep", (0.0, 0.3, 0.9, 1.0, 1e-10))
    threads = draw("threads", (1, 2, 3))
    torch.set_num_threads(threads)
    like = torch.empty(size)
    mask = ops.bernoulli_mask(like, keep, seed=seed, stream=stream, step=step)
    assert torch.equal(mask, bernoulli_mask_reference(like, keep, seed, stream, step))
    numbers = OPS.random_scores(size, seed, stream, step)
    assert torch.equal(numbers, random_scores_reference(size, seed, stream, step))

    shapes = [draw("shape", ((), (0,), (1,), (63,), (3, 5), (2, 3, 4, 5), (70_001,))) for _ in range(draw("n", (1, 3)))]
    dtype, count = draw("dtype", DTYPES), torch.tensor(draw("count", (0, 1, 9, 2**40)))
    averages = [laid_out(draw, "average", shape, dtype).clone() for shape in shapes]
    averages = [torch.stack([a, a], -1)[..., 0] if draw.chance("strided", 0.2) else a for a in averages]
    values = [laid_out(draw, "value", shape, draw("of", (dtype, dtype, torch.float32))) for shape in shapes]
    before = [a.clone().double() for a in averages]
    ops.average_(averages, values, count, keep=keep, seed=seed, step=step)
    for number, (old, value, new) in enumerate(zip(before, values, averages, strict=True)):
        kept = value.double() * bernoulli_mask_reference(value, keep, seed, number, step)
        exact = old + (kept - old) / (count.double() + 1)
        as_good("average", new, exact.to(new.dtype), exact, old.abs().max() + kept.abs().max() if old.numel() else old)


def arguments(draw: Draw, operator: str) -> list[Any]:
    """What the operator takes."""
    block = draw("block", ((1, 1), (1, 1), (2, 1), (2, 2)))
    conv = "conv2d" in operator
    taps, groups = (9, draw("groups", (1, 2))) if conv else (1, 1)
    rows, inner = draw("rows", (2, 4, 16)) * groups, draw("cols", (2, 4, 6, 16))
    grid = (rows // block[0], inner * taps // block[1])
    count = draw.random.randrange(grid[0] * grid[1] + 1)
    index = build_index(torch.randperm(grid[0] * grid[1])[:count].sort().values, grid)
    values = torch.randn(count, *(() if block == (1, 1) else block))
    batch = draw("batch", (1, 3, 16))
    vector, integer = torch.randn(rows), torch.tensor(draw("integer", (0, 3)))
    optional = draw("optional", (None, vector))
    if operator.startswith("sparse_linear"):
        x, grad = torch.randn(batch, inner), torch.randn(batch, rows)
        return {
            "sparse_linear": [x, values, optional, None, *index],
            "sparse_linear_input_grad": [grad, values, *index],
            "sparse_linear_values_grad": [grad, x, list(block), *index],
            "sparse_linear_dense_grad": [grad, x],
        }[operator]
    if conv:
        stride, pad = draw("stride", (1, 1, 2)), draw("padding", (0, 1, 2))
        shape, out = [batch, inner * groups, 8, 7], [(8 + 2 * pad - 3) // stride + 1, (7 + 2 * pad - 3) // stride + 1]
        geometry = [[rows, inner, 3, 3], [stride] * 2, [pad] * 2, [1, 1], groups]
        x, grad, spec = torch.randn(shape), torch.randn(batch, rows, *out), [*geometry, *index]
        return {
            "sparse_conv2d": [x, values, optional, None, *spec],
            "sparse_conv2d_input_grad": [grad, values, shape, *spec],
            "sparse_conv2d_values_grad": [grad, x, list(block), *spec],
            "sparse_conv2d_dense_grad": [grad, x, block[1], *geometry],
            "sparse_conv2d_grads": [grad, x, values, *spec],
        }[operator]
    planes = torch.randn(batch + 1, rows, 3, 5)
    statistics = [torch.randn(rows), torch.rand(rows) + 0.5]
    moving = draw("moving", (statistics, [None, None]))
    drop = draw.random.randrange(count + 1)
    grow = draw.random.randrange(grid[0] * grid[1] - count + drop + 1)
    return {
        "scatter_values": [values, [rows, inner], False, *index[:2]],
        "gather_values": [torch.randn(rows, inner), list(block), *index[:2]],
        "transpose_index": [*index[:2], grid[1]],
        "check_index": [*index],
        "drop_and_grow": [torch.rand(count), torch.rand(grid), *index[:2], drop, grow],
        "unknown_aware_loss": [torch.randn(batch, inner), torch.randint(inner - 1, (batch,)), torch.tensor(1.0)],
        "average_": [[vector, vector.double()], [vector.clone(), vector.double()], integer, 0.5, 3, integer],
        "bernoulli_mask": [vector, 0.5, 3, 4, integer],
        "random_scores": [inner, 3, 4, integer],
        "batch_norm_relu": [planes, draw("residual", (None, planes.clone())), optional, optional, *moving, 1e-5, 1],
        "batch_norm_relu_backward": [planes, planes.clone(), draw("output", (None, planes.clone())), optional, optional,
                                     *statistics, 1e-5, 1, draw("of_batch", (False, True))],
    }[operator]  # fmt: skip


OPERATORS = (
    "sparse_linear", "sparse_linear_input_grad", "sparse_linear_values_grad", "sparse_linear_dense_grad",
    "sparse_conv2d", "sparse_conv2d_input_grad", "sparse_conv2d_values_grad", "sparse_conv2d_dense_grad",
    "sparse_conv2d_grads", "scatter_values", "gather_values", "transpose_index", "check_index", "drop_and_grow",
    "unknown_aware_loss", "average_", "bernoulli_mask", "random_scores", "batch_norm_relu", "batch_norm_relu_backward",
)  # fmt: skip


def spoiled(draw: Draw, value: Any) -> Any:
    """The argument with one thing changed, to what an operator may or may not take."""
    if isinstance(value, bool) or value is None:
        return draw("other", (None, True, torch.randn(3)))
    if isinstance(value, float):
        return draw("float", (float("nan"), -1.0, 2.0, 0.0))
    if isinstance(value, int):
        return draw("int", (value + 1, value - 1, 0, -1, -(2**40), 2**62))
    if isinstance(value, list):
        change, place = draw("list", ("item", "item", "short", "long")), draw.random.randrange(len(value))
        if change == "short":
            return value[:-1]
        if change == "long":
            return [*value, value[-1]]
        item = spoiled(draw, value[place])
        if isinstance(value[0], int) and item > 2**20:
            item = value[place] + 2
        return [*value[:place], item, *value[place + 1 :]]
    kind = draw("tensor", ("less", "more", "dtype", "deeper", "flat", "none", "noise", "noise", "noise", "transposed"))
    axis = draw.random.randrange(value.dim()) if value.dim() else 0
    if kind == "less" and value.numel():
        return value.narrow(axis, 0, value.shape[axis] - 1).clone() if value.dim() else value[None][:0]
    if kind == "more" and value.numel():
        return torch.cat([value, value.narrow(axis, 0, 1)], axis) if value.dim() else value[None].expand(2)
    if kind == "dtype":
        return value.to(draw("to", (torch.int32, torch.int64, torch.float64, torch.float16, torch.bool)))
    if kind == "deeper":
        return value[None].clone()
    if kind == "flat":
        return value.flatten().clone()
    if kind == "none":
        return None
    if kind == "transposed" and value.dim() > 1:
        return value.transpose(0, -1)
    if value.is_floating_point() or not value.numel():
        return value.new_zeros(0)
    noise = value.clone().flatten()
    size = int(noise.max()) + 2
    for _ in range(draw("how_many", (1, 1, 2, noise.numel()))):
        noise[draw.random.randrange(noise.numel())] = draw.random.choice((-1, 0, size, size // 2, 2**31 - 1, -(2**31)))
    return noise.view(value.shape)


def misuse(draw: Draw) -> None:
    """An operator called from outside with one argument spoiled: it raises, or does what its reference does."""
    name = draw("operator", OPERATORS)
    operator = getattr(OPS, name).default
    inputs = arguments(draw, name)
    place = draw("argument", range(len(inputs)))
    if draw.chance("spoil", 0.95):
        inputs[place] = spoiled(draw, inputs[place])

    def run(call: Callable[..., Any]) -> list[Tensor] | None:
        copies = copy.deepcopy(inputs)
        try:
            found = call(*copies)
        except (*ERRORS, NotImplementedError, AttributeError):  # the last one where a tensor is missing
            return None
        found = copies[0] if found is None else found
        return list(found) if isinstance(found, (list, tuple)) else [found]

    with settings(draw):
        found = run(operator)
        if found is None:
            assert draw.drawn["spoil"], "raised for what it takes"
            return
        expected = run(lambda *copies: operator._op_dk(_REFERENCE, *copies))
    assert expected is not None, "took what the reference does not"
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        if not a.is_floating_point():
            assert torch.equal(a, b), "differs from the reference"
        elif a.numel() and b.isfinite().all():
            tolerance = 1e-3 if a.dtype == torch.float32 else 1e-1 if a.dtype == torch.float16 else 1e-6
            assert (a - b).abs().max() <= tolerance * (1 + b.abs().max()), "differs from the reference"
