"""Single layers against dense PyTorch and peers, each compared with float64 before it is timed."""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import DTYPES, NETWORKS, SHORT, Bench, Case, Network, Row, WrongResult, autocast, conv, linear, runner
from timing import computes_bf16
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon.nn import SparseLayer
from sparse_moon.nn import tune as tuning
from sparse_moon.topology import weight_to_matrix

CACHES_BYTES = 128 * 2**20  # inputs rotate over at least this much


def layers(bench: Bench) -> None:
    """Single layers: forward, gradients, and both, against dense, masked dense, bf16, CSR and SparseProp."""
    arguments = bench.arguments
    cases = bench.main_cases() if arguments.quick else bench.main_cases() + bench.other_cases()
    for case in cases:
        if arguments.case and not any(part in case.name for part in arguments.case):
            continue
        for sparsity in arguments.sparsity:
            for pattern in arguments.pattern:
                for dtype in arguments.dtype:
                    name = f"{case.name} {pattern} {sparsity} {dtype}"
                    bench.case(name, _layer, case, sparsity, pattern, DTYPES[dtype])


def _layer(bench: Bench, case: Case, sparsity: float, pattern: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = bench.arguments
    dense = case.build().to(bench.device, dtype)
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    try:
        sparse = kind.from_dense(dense, sparsity=sparsity, pattern=pattern)
    except ValueError:  # the pattern's block does not divide the layer
        return
    masked = sparse.to_dense()
    error = gate(sparse, masked, case)

    bytes_each = dense.weight.element_size()
    count = min(math.ceil(CACHES_BYTES / (bytes_each * math.prod(case.input_shape))), 16)
    inputs = [torch.randn(case.input_shape, device=bench.device, dtype=dtype) for _ in range(count)]
    with torch.no_grad():
        grads = [torch.randn_like(masked(x)) for x in inputs]
    last = (inputs, grads)
    if isinstance(dense, nn.Conv2d):
        last = tuple([t.contiguous(memory_format=torch.channels_last) for t in ts] for ts in (inputs, grads))
    operations = 2.0 * sparse.topology.nnz * grads[0].numel() / sparse.topology.shape[0]
    moved = bytes_each * (inputs[0].numel() + grads[0].numel() + 2.0 * sparse.topology.nnz)

    layouts = {"": (masked, inputs, grads)}
    if isinstance(dense, nn.Conv2d):  # a copy, because a module changes its layout in place
        layouts[" channels_last"] = (copy.deepcopy(masked).to(memory_format=torch.channels_last), *last)
    others = peers(masked, sparse, bench.device) if arguments.peers else {}
    for pass_, products in (("fwd", 1.0), ("fwd+bwd", 3.0)):
        runs: dict[str, Callable[[int], Any]] = {}
        for layout, operands in layouts.items():
            runs[f"dense {SHORT[dtype]}{layout}"] = runner(*operands, pass_)
            if dtype == torch.float32 and computes_bf16(bench.device):
                runs[f"dense bf16{layout}"] = autocast(runner(*operands, pass_), bench.device)
        runs |= {name: runner(module, inputs, grads, pass_) for name, module in others.items()}
        # the kernels of GPUs work on channels_last
        runs["sparse"] = runner(sparse, *(last if bench.device.type == "cuda" else (inputs, grads)), pass_)
        if not arguments.graph:  # what synchronises cannot be captured
            # what runs where kernels do not pay; torch's product, or on the CPU Winograd's where that is faster
            runs["masked dense"] = on_backend("dense", runs["sparse"])
        if isinstance(dense, nn.Linear) and pass_ == "fwd" and not arguments.graph:
            if pattern == "unstructured" and (bench.device.type == "cuda" or dtype == torch.float32):
                runs["torch.sparse CSR"] = compressed_runner(masked, inputs, None)
            elif bench.device.type == "cuda" and sparse.topology.block[1] >= 16:
                runs["torch.sparse BSR"] = compressed_runner(masked, inputs, sparse.topology.block)
        times = bench.times(runs)
        row = Row(
            "layers", case.name, pattern, sparsity, SHORT[dtype], bench.device.type, pass_, times["sparse"], "", 0.0,
            0.0, products * operations, bench.floor_ms(products * operations, products * moved, dtype), error,
            chosen(sparse, case),
        )  # fmt: skip
        fastest: dict[str, str] = {}  # of the layouts
        for name in times:
            kind = name.removesuffix(" channels_last")
            fastest[kind] = min(fastest.get(kind, name), name, key=times.__getitem__)
        for name in fastest.values():
            if name != "sparse":
                bench.add(replace(row, baseline=name, baseline_ms=times[name], speedup=times[name] / times["sparse"]))


def gate(sparse: nn.Module, masked: nn.Module, case: Case) -> float:
    """Largest error of output and gradients against float64, relative to the largest exact entry.

    Raises:
        WrongResult: more than twice the error of dense PyTorch in the same dtype.
    """
    example = next(masked.parameters())
    x = torch.randn(min(case.input_shape[0], 9), *case.input_shape[1:], device=example.device, dtype=example.dtype)
    exact_layer = copy.deepcopy(masked).double()
    upstream = torch.randn_like(masked(x))

    def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        z = x.to(dtype).clone().requires_grad_()
        module.zero_grad()
        y = module(z)
        y.backward(upstream.to(dtype))
        weight = module.values if isinstance(module, SparseLayer) else module.weight
        grad = weight.grad
        if not isinstance(module, SparseLayer):
            grad = sparse.topology.gather(weight_to_matrix(grad, sparse.topology.block[1]))
        return [t.detach().double() for t in (y, z.grad, grad)]

    exact = results(exact_layer, torch.float64)
    errors = [
        [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(results(m, x.dtype), exact, strict=True)]
        for m in (sparse, masked)
    ]
    for what, ours, theirs in zip(("output", "input gradient", "values gradient"), *errors, strict=True):
        if not ours <= 2 * theirs + 1e-6:
            raise WrongResult(f"{case.name}: wrong {what}, error {ours:.1e} where dense PyTorch has {theirs:.1e}")
    return max(errors[0])


def on_backend(backend: sm.ops.Backend, run: Callable[[int], Any]) -> Callable[[int], Any]:
    def forced(i: int) -> None:
        with sm.ops.use_backend(backend):
            run(i)

    return forced


def compressed_runner(masked: nn.Linear, inputs: list[Tensor], block: tuple[int, int] | None) -> Callable[[int], Any]:
    """PyTorch's own compressed rows: CSR, or BSR with this block shape; forward only."""
    weight = masked.weight.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls both beta
        weight = weight.to_sparse_csr() if block is None else weight.to_sparse_bsr(block)

    def forward(i: int) -> None:
        x = inputs[i % len(inputs)]
        _ = (weight @ x.t()).t() if block is None else F.linear(x, weight)

    return forward


def peers(masked: nn.Module, sparse: nn.Module, device: torch.device) -> dict[str, nn.Module]:
    """SparseProp (Nikdan et al. 2023) where it is installed and takes the layer: unstructured, on the CPU."""
    try:
        import sparseprop.modules as sparseprop
    except ImportError:
        print("SparseProp is not installed (pip install sparseprop), it is left out", file=sys.stderr)
        return {}
    if device.type != "cpu" or sparse.topology.block != (1, 1):
        return {}
    if isinstance(masked, nn.Linear):
        return {"sparseprop": sparseprop.SparseLinear.from_dense(masked)}
    if masked.kernel_size[0] == 1 and masked.stride[0] > 1:
        return {}
    # its two kernels; the faster one counts
    return {f"sparseprop {n}": sparseprop.SparseConv2d.from_dense(masked, vectorizing_over_on=n == "over on")
            for n in ("over batch", "over on")}  # fmt: skip


def chosen(layer: SparseLayer, case: Case, layout: torch.memory_format = torch.contiguous_format) -> str:
    return " ".join(tuning.chosen_backends(layer, case.input_shape, layout).values())


def choice(bench: Bench) -> None:
    """Every layer of the networks, forward + backward with what the choice runs, against dense: is it ever slower?"""
    for name, build, image_shape in _choice_networks():
        for batch in bench.arguments.batch:
            for case in _layers_of(build(), (batch, *image_shape)):
                if not bench.arguments.case or any(part in f"{name} {case.name}" for part in bench.arguments.case):
                    for sparsity in bench.arguments.sparsity:
                        _choice(bench, name, case, sparsity)
    rows = [row for row in bench.rows if row.section == "choice"]
    for percent in (5, 25):
        slower = sum(row.speedup < 1 / (1 + percent / 100) for row in rows)
        print(f"{slower} of {len(rows)} layers are slower than dense by more than {percent} %")


def _choice_networks() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, model and shape of an image."""
    for network in (*NETWORKS, Network("resnet50", (3, 32, 32))):
        yield network.name, partial(network.build, network.classes), network.image_shape
    try:
        import timm
        import torchvision
    except ImportError as error:
        raise SystemExit(f"'choice' takes networks of timm and torchvision: {error}") from None
    yield "mobilenet-v2", partial(torchvision.models.mobilenet_v2, num_classes=10), (3, 96, 96)
    yield "vit-tiny", partial(timm.create_model, "vit_tiny_patch16_224", num_classes=10), (3, 224, 224)


def _layers_of(model: nn.Module, input_shape: tuple[int, ...]) -> list[Case]:
    """The model's distinct layers that ``sparsify`` makes sparse at 90 %, with the inputs that a batch gives them."""
    found: dict[str, Case] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of outputs without weights
        model = sm.sparsify(model, 0.9, allocation="uniform", fuse=False)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        case = _case_of(layer.to_dense(), tuple(inputs[0].shape))
        found.setdefault(case.name, case)

    for layer in sm.sparse_layers(model).values():
        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(input_shape))
    return list(found.values())


def _case_of(layer: nn.Module, shape: tuple[int, ...]) -> Case:
    if isinstance(layer, nn.Linear):
        return linear(layer.in_features, layer.out_features, math.prod(shape[:-1]))
    return conv(
        layer.in_channels, layer.out_channels, shape[2], layer.kernel_size[0], layer.stride[0], shape[0], layer.groups
    )


def _choice(bench: Bench, network: str, case: Case, sparsity: float) -> None:
    torch.manual_seed(0)
    dense = case.build().to(bench.device)
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    sparse = kind.from_dense(dense, sparsity=sparsity)
    inputs = [torch.randn(case.input_shape, device=bench.device) for _ in range(2)]
    with torch.no_grad():
        grads = [torch.randn_like(dense(x)) for x in inputs]
    runs: dict[str, Callable[[int], Any]] = {}
    layouts = {"": torch.contiguous_format}
    if isinstance(dense, nn.Conv2d):
        layouts[" channels_last"] = torch.channels_last
    for suffix, layout in layouts.items():
        operands = [[t.contiguous(memory_format=layout) for t in tensors] for tensors in (inputs, grads)]
        runs[f"sparse{suffix}"] = runner(sparse, *operands, "fwd+bwd")
        runs[f"dense fp32{suffix}"] = runner(copy.deepcopy(dense).to(memory_format=layout), *operands, "fwd+bwd")
    times = bench.times(runs)
    # each in the layout that suits it
    ours, theirs = (min((n for n in times if n.startswith(k)), key=times.__getitem__) for k in ("sparse", "dense"))
    suffix = ours.removeprefix("sparse")
    bench.add(Row(
        "choice", f"{network} {case.name}", "unstructured", sparsity, "fp32", bench.device.type, "fwd+bwd",
        times[ours], theirs, times[theirs], times[theirs] / times[ours],
        chosen=chosen(sparse, case, layouts[suffix]) + suffix,
    ))  # fmt: skip
