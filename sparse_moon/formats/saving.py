"""Models in a folder: safetensors for numbers and indices, JSON for what they mean."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_moon import files
from sparse_moon.nn import fusion
from sparse_moon.nn.convert import replace_layers, sparse_kind
from sparse_moon.nn.inspect import transform_name
from sparse_moon.nn.layers import SparseLayer
from sparse_moon.nn.plan import Dense, convertible, some, unwrapped
from sparse_moon.nn.projections import as_linear_layers
from sparse_moon.ops.native import native
from sparse_moon.sharding import refuse_sharded
from sparse_moon.source_tree import VERSION
from sparse_moon.topology import Topology, matrix_shape

DESCRIPTION = "model.json"
FORMAT = "sparse_moon model 1"
_METADATA = {"format": "pt"}  # of the file of tensors, as other libraries write it

_PARTS = ("values", "topology.row_ptr", "topology.col")  # of a sparse layer in a state dict, in place of a weight
_KINDS = {"format": str, "weights": str, "sha256": str, "layers": dict, "tied": dict}


def save(model: nn.Module, folder: Path | str) -> None:
    """Write a model's parameters, buffers and topology to a folder, which is made where it is not there.

    The folder has ``model-DIGEST.safetensors``, the tensors of ``state_dict()``, each once where some are shared, and
    ``model.json``, which names that file, its digest and the sparse layers, and carries a checksum. A model that
    the folder held before is replaced as a whole: whenever this is cut off, the folder has the old one or the new one.
    With several processes let one of them save.

    Args:
        model: any module, on any device; of one that is compiled or wrapped for several processes, the model inside.

    Raises:
        ValueError: a tensor without memory (on ``meta``), or a state that is not a tensor (``get_extra_state``).
        OSError: the folder cannot be written.
    """
    model, folder = unwrapped(model), Path(folder)
    state = _state(model)
    tied = {alias: names[0] for names in _shared(state) for alias in names[1:]}
    # copies of what is shared only in part: the file has no views
    tensors = {name: t.cpu().contiguous() for name, t in state.items() if name not in tied}
    digest = _digest(tensors)
    weights = folder / f"model-{digest[:16]}.safetensors"
    description = {
        "format": FORMAT,
        "weights": weights.name,
        "sha256": digest,
        "model": type(model).__name__,
        "sparse_moon": VERSION,
        "torch": str(torch.__version__),
        "layers": {
            name: {"shape": [*layer.weight_shape], "block": [*layer.topology.block], "sparsity": layer.sparsity,
                   "transform": transform_name(layer)}
            for name, layer in _sparse(model)
        },
        "tied": tied,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    before = _weights_file(folder)
    with files.replacing(weights) as temporary:
        try:
            save_file(_without_shared_memory(tensors), temporary, metadata=_METADATA)
        except SafetensorError as error:  # which the writer makes of all that the system says
            raise OSError(f"{weights} cannot be written: {error}") from None
    files.write_json(folder / DESCRIPTION, description)
    if before is not None and before != weights:
        before.unlink(missing_ok=True)


def load(folder: Path | str, model: nn.Module) -> nn.Module:
    """Put what :func:`save` wrote into a model of the same architecture, in place.

    Layers that are sparse in the folder may be dense in ``model``, as its class makes it: they become sparse, with
    exactly the weights that were saved, and the model is fused as :func:`sparse_moon.sparsify` does it. Or they are
    sparse already, with any topology of the same pattern; so is a layer with a ``transform``, of which the folder has
    the name. The file is mapped into memory and copied from there, tensor
    by tensor; loading executes no code.

    Args:
        model: on any device, in the dtype of the folder. Build the optimizer afterwards.

    Returns:
        The model itself (or, where the model is itself a layer that becomes sparse, its replacement).

    Raises:
        ValueError: a file that is missing or damaged in any bit, or of another architecture: names, shapes, dtypes or
            sharing of weights differ, with what was expected and what came. The model is then as it was.
    """
    folder, inner = Path(folder), unwrapped(model)
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist")
    description = _read_description(path)
    tensors = _read_tensors(folder / description["weights"], description["sha256"])
    layers: dict[str, Any] = description["layers"]

    def wanted(name: str) -> bool:
        return any(layer == name or layer.startswith(f"{name}." if name else "") for layer in layers)

    with as_linear_layers(inner, wanted):
        places = {layer: names for layer, names in convertible(inner).items() if not layers.keys().isdisjoint(names)}
        problems = [*_other_layers(layers, inner, places)] or [*_other_tensors(description, tensors, inner)]
        problems = problems or [*_bad_indices(layers, tensors)]
        if problems:
            raise ValueError(f"{folder} does not fit this {type(inner).__name__}: {some(problems)}")
        if places:
            if inner is not model:
                raise ValueError(
                    f"load into the model before {type(model).__name__} wraps it: its layers become others"
                )

            def make(name: str, layer: Dense) -> SparseLayer:
                nothing = torch.zeros_like(layer.weight, dtype=torch.bool)
                return sparse_kind(layer).from_dense(layer, mask=nothing, pattern=tuple(layers[name]["block"]))

            model, _ = replace_layers(model, places, make)
            inner = model
        inner.load_state_dict({**tensors, **{alias: tensors[name] for alias, name in description["tied"].items()}})
    if places and native is not None:
        fusion.install(model, recompute=False)
    return model


def _sparse(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """All sparse layers, by all their names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLayer):
            yield name, module


def _of(name: str, part: str) -> str:
    """Name of a layer's tensor in the state dict of the model, which may be the layer itself."""
    return f"{name}.{part}" if name else part


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, of tensors with memory."""
    state: dict[str, Any] = model.state_dict()
    other = {name: type(value).__name__ for name, value in state.items() if not isinstance(value, Tensor)}
    if other:
        raise ValueError(f"expected a state of tensors, got {some(f'{k}: {v}' for k, v in other.items())}")
    if bare := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"expected tensors with memory, these are on meta: {some(bare)}")
    refuse_sharded("a folder", state.values(), "sparse_moon.integrations.checkpoint writes them")
    return state


def _shared(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors that are the same memory, a list a tensor that has several."""
    names: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            names[key].append(name)
    return [group for group in names.values() if len(group) > 1]


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where one is a part of another: the format has no such parts."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return own


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights_file(folder: Path) -> Path | None:
    """The file of tensors that the folder's description names, if there is such a description."""
    try:
        return folder / _read_description(folder / DESCRIPTION)["weights"]
    except ValueError:
        return None


def _read_description(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} does not describe a model: expected format {FORMAT!r}, got {found!r}")
    wrong = [key for key, kind in _KINDS.items() if not isinstance(content.get(key), kind)]
    if not wrong and Path(content["weights"]).name != content["weights"]:
        wrong = ["weights"]  # a file elsewhere
    if wrong:
        raise ValueError(f"{path} does not describe a model: bad {wrong}")
    for name, layer in content["layers"].items():
        for key, lengths in (("shape", (2, 4)), ("block", (2,))):
            numbers = layer.get(key) if isinstance(layer, dict) else None
            if not isinstance(numbers, list) or len(numbers) not in lengths or any(type(n) is not int for n in numbers):
                raise ValueError(f"{path} does not describe a model: layer {name!r} has {key} {numbers!r}")
    return content


def _read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory, that have this digest."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except Exception as error:  # damage has no one kind of error
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    if metadata not in (None, _METADATA):  # which the digest does not know
        raise ValueError(f"{path} is damaged: expected the metadata {_METADATA} or none, got {metadata}")
    if (found := _digest(tensors)) != expected:
        raise ValueError(f"{path} is damaged: its tensors have the digest {found}, not {expected}")
    return tensors


def _other_layers(layers: Mapping[str, Any], model: nn.Module, places: Mapping[Dense, list[str]]) -> Iterator[str]:
    """What differs about layers that are sparse in the folder or in the model."""
    dense = {name: layer for layer, names in places.items() for name in names}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, asked in layers.items():
        module, shape, block = modules.get(name), tuple(asked["shape"]), tuple(asked["block"])
        if name in dense:
            here = tuple(dense[name].weight.shape)
        elif isinstance(module, SparseLayer):
            here = module.weight_shape
            if module.topology.block != block:
                yield f"{name!r} has blocks of {block} in the folder, of {module.topology.block} here"
        else:
            found = "no such layer" if module is None else f"a {type(module).__name__} that cannot become sparse"
            yield f"{name!r} is a sparse layer of {shape} in the folder, here is {found}"
            continue
        if (transform := transform_name(module)) != asked.get("transform"):
            yield (
                f"{name!r} has the transform {asked.get('transform')} in the folder, {transform} here: make the model "
                "sparse and set it first"
            )
        if here != shape:
            yield f"{name!r} has a weight of {shape} in the folder, of {here} here"
    for name, _ in _sparse(model):
        if name not in layers:
            yield f"{name!r} is dense in the folder and sparse here"


def _other_tensors(description: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> Iterator[str]:
    """What differs about tensors, once the sparse layers fit."""
    layers, tied = description["layers"], description["tied"]
    state = _state(model)
    rename = {_of(name, "weight"): [_of(name, part) for part in _PARTS] for name in layers}
    here: dict[str, Tensor] = {}
    for name, tensor in state.items():
        here |= dict.fromkeys(rename.get(name, [name]), tensor)
    there = {**tensors, **{alias: tensors[name] for alias, name in tied.items() if name in tensors}}
    if missing := [name for name in here if name not in there]:
        yield f"the folder has no {some(missing)}{_about_factors(missing)}"
    if unexpected := [name for name in there if name not in here]:
        yield f"the model has no {some(unexpected)}{_about_factors(unexpected)}"
    of_layers = {name for names in rename.values() for name in names}
    for name in filter(there.__contains__, here):
        expected, got = here[name], there[name]
        if name not in of_layers and expected.shape != got.shape:
            yield f"{name} has shape {tuple(got.shape)} in the folder, {tuple(expected.shape)} here"
        if expected.dtype != got.dtype and not (name in of_layers and not name.endswith(".values")):
            yield f"{name} is {got.dtype} in the folder, {expected.dtype} here"
    groups = ([rename.get(name, [name]) for name in names] for names in _shared(state))
    shared_here = {frozenset(parts) for group in groups for parts in zip(*group, strict=True)}
    firsts: dict[str, set[str]] = defaultdict(set)
    for alias, name in tied.items():
        firsts[name] |= {name, alias}
    shared_there = {frozenset(group) for group in firsts.values()}
    for where, groups_there in (("folder", shared_there - shared_here), ("model", shared_here - shared_there)):
        for names in sorted(map(sorted, groups_there)):
            yield f"only the {where} shares {' and '.join(names)}"


def _about_factors(names: Iterable[str]) -> str:
    """What to do about names that only one side has, where factors are among them."""
    if not any(f".{name}".endswith(".lora.A") for name in names):
        return ""
    return ", which are factors: make the model sparse and call sm.lora with their rank first, or merge_lora before"


def _bad_indices(layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with indices that are as they were written, by whomever."""
    for name, layer in layers.items():
        if _of(name, "values") not in tensors:  # shared with a layer before
            continue
        values, row_ptr, col = (tensors[_of(name, part)] for part in _PARTS)
        block = tuple(layer["block"])
        topology = Topology(torch.empty(0, dtype=torch.int64), matrix_shape(tuple(layer["shape"])), block)
        if problem := topology.problem(row_ptr, col, _of(name, "topology.")):
            yield problem
        shape = (*col.shape, *(() if block == (1, 1) else block))
        if tuple(values.shape) != shape:
            yield f"{_of(name, 'values')} must have shape {shape}, got {tuple(values.shape)}"
