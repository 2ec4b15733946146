"""Checkpoints of training in several processes, by ``torch.distributed.checkpoint`` (DCP).

A folder by :func:`save_checkpoint` has what all processes have of model, optimizer and method, and is loaded by any
number of processes, in DistributedDataParallel, FSDP2 or alone. It holds

- ``steps-N-K/``: DCP's own files, of the batch N.
- ``checkpoint.json``: which folder that is, SHA-256 of its files, the shapes of all tensors, and which parameters the
  optimizer has state of. It is written last, so that a run that is killed while it saves leaves the checkpoint before.
"""

import hashlib
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from sparse_moon.algorithms import Method
from sparse_moon.algorithms.optimizers import inner_optimizers, parameters_of, stepping
from sparse_moon.distributed import from_every_process, raise_together, rank, world_size
from sparse_moon.files import read_json, write_json
from sparse_moon.integrations.dcp_files import CheckingPlanner, SafePlanner, SafeReader
from sparse_moon.nn.inspect import transform_name
from sparse_moon.nn.plan import some

_T = TypeVar("_T")

_FORMAT = "sparse_moon checkpoint 2"
_FILE = "checkpoint.json"
_STATE, _NO_STATE = "with state", "without state"


class TrainingState:
    """Model, optimizer, method and random numbers as DCP takes them: a ``Stateful``.

    For callers of DCP itself, as ``dcp.async_save({"training": TrainingState(model, method)}, ...)``, who go without
    the checks of :func:`load_checkpoint`, and whose ``dcp.load`` executes what code a folder holds.

    Args:
        model: as the method has it, after ``fully_shard``, in DistributedDataParallel, or plain.
        method: with the optimizer; between two batches.

    Raises:
        ValueError: by ``state_dict``, where several optimizers keep state (Lookahead) or train parameters.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.model, self.method = model, method
        self.optimizer = inner_optimizers(method.optimizer)[-1]
        self.random = True
        """Whether the random numbers of the processes are part of it."""
        self.begins = True
        """Whether an optimizer without state makes a step by nothing, which begins the state that DCP loads into. Such
        a step changes the training that follows: False to save before the first batch, and to load what was saved so.
        """

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by canonical names."""
        with _without_steps(self.optimizer):
            groups: Any = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        return dict(zip((n for group in groups for n in group["params"]), parameters_of(self.optimizer), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Tensors of the parameters' canonical names, divided among processes as the parameters are."""
        self._check_optimizer()
        with stepping(self.optimizer) if self.begins else _without_steps(self.optimizer):
            model, optimizer = get_state_dict(self.model, self.optimizer)
        states: Any = optimizer["state"]
        optimizer["state"] = {name: entries for name, entries in states.items() if entries}
        state = {"model": model, "optimizer": optimizer, "method": self.method.state_dict()}
        if self.random:
            state["random"] = {f"process {rank()}": _random_state()}
        return state

    def _check_optimizer(self) -> None:
        """Whether the innermost optimizer, which DCP takes, is all that there is to keep."""
        every, own = self.method.optimizer, self.optimizer
        others = [inner for inner in inner_optimizers(every) if inner.state is not own.state]
        held = {id(parameter) for parameter in parameters_of(own)}
        besides = [p for p in parameters_of(every) if id(p) not in held or any(o.state.get(p) for o in others)]
        if besides:
            raise ValueError(
                f"{type(every).__name__} is more than one optimizer, and a checkpoint of DCP has what "
                f"{type(own).__name__} within it keeps: save state_dict() of each, of model and method yourself"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        with _without_steps(self.optimizer), self._training(state["optimizer"]["state"]):
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        self.method.load_state_dict(state["method"])
        if "random" in state:
            _set_random_state(state["random"][f"process {rank()}"])

    def begin(self, names: Container[str]) -> None:
        """Let the optimizer have state of the parameters of these names, which is begun, and of no others."""
        states, parameters = self.optimizer.state, self.parameters()
        if all((name in names) == bool(states.get(p)) for name, p in parameters.items()):
            return
        self.optimizer.state = defaultdict(dict)
        grads = [(p, p.grad) for p in parameters.values()]
        for parameter, _ in grads:
            parameter.grad = None  # with any, DCP would make no step
        try:
            with stepping(self.optimizer), self._training(names):
                get_optimizer_state_dict(self.model, self.optimizer)
        finally:
            for parameter, grad in grads:
                parameter.grad = grad

    @contextmanager
    def _training(self, names: Container[str]) -> Iterator[None]:
        """Only these parameters train inside the block: DCP begins and loads the state of those that do."""
        parameters = self.parameters()
        before = [(p, p.requires_grad) for p in parameters.values()]
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        try:
            yield
        finally:
            for parameter, trains in before:
                parameter.requires_grad_(trains)


@contextmanager
def _without_steps(optimizer: Optimizer) -> Iterator[None]:
    """DCP makes a step, by nothing, with an optimizer that has no state; one empty entry is enough for it."""
    first = parameters_of(optimizer)[0]
    begun = first not in optimizer.state  # and not by such a block around this one
    optimizer.state.setdefault(first, {})
    try:
        yield
    finally:
        if begun and not optimizer.state.get(first, True):
            del optimizer.state[first]


@contextmanager
def _unless_refused(optimizer: Optimizer) -> Iterator[None]:
    """Leave the optimizer, and random numbers, as they were before the block where it raises an error."""
    state, groups, random = optimizer.state, [dict(group) for group in optimizer.param_groups], _random_state()
    try:
        yield
    except Exception:
        optimizer.state = state
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
        _set_random_state(random)
        raise


def _randomness() -> str:
    """What a state of random numbers is of; another one cannot take it over."""
    return f"{world_size()} processes{' with cuda' if torch.cuda.is_available() else ''}"


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(
    folder: str | Path, model: nn.Module, method: Method, more: Mapping[str, Stateful] | None = None
) -> None:
    """Write what a run needs to go on; every process calls it, between two batches.

    A checkpoint that is there is replaced as a whole.

    Args:
        folder: on a file system that all processes see.
        model, method: as for :class:`TrainingState`.
        more: other objects with ``state_dict`` and ``load_state_dict``, by name: a learning rate schedule, a loader.

    Raises:
        ValueError: a name that is taken, more than one optimizer, or an object that could not be loaded without
            executing code; ``torch.serialization.add_safe_globals`` takes classes that are safe.
        OSError: it cannot be written; on every process.
    """
    folder, state = Path(folder), TrainingState(model, method)
    state.begins = False
    parts = _parts(state, more)
    name = _first(lambda: _new_name(folder, method.steps))
    with _by_dcp():
        dcp.save(parts, checkpoint_id=folder / name, planner=CheckingPlanner())
    digests = _digests(folder / name, _first(lambda: sorted(path.name for path in (folder / name).iterdir())))
    content = {
        "format": _FORMAT, "torch": torch.__version__, "folder": name, "random": _randomness(),
        "method": method.name, "steps": method.steps, "more": sorted(more or {}), "tensors": _kinds(state),
        "files": digests,
    }  # fmt: skip
    _first(lambda: _replace(folder, content))  # nobody goes on, or is killed for having ended, before it is all there


def _first(task: Callable[[], _T]) -> _T:
    """What the first process returns, on each of them; what it could not read or write, each of them raises."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = task()
        except OSError as error:
            problem = error
    result, problem = from_every_process((result, problem))[0]
    if problem is not None:
        raise problem
    return cast(_T, result)


def _replace(folder: Path, content: Mapping[str, Any]) -> None:
    """Let the folder's checkpoint be this one, and remove what was there before."""
    write_json(folder / _FILE, content)
    for old in folder.glob("steps-*"):
        if old.name != content["folder"]:
            shutil.rmtree(old)


def load_checkpoint(
    folder: str | Path, model: nn.Module, method: Method, more: Mapping[str, Stateful] | None = None
) -> None:
    """Go on from :func:`save_checkpoint`, with any number of processes; every process calls it.

    The model has as many weights as it had (the same ``sparsify``), wherever they are; optimizer and method are made
    as they were. The optimizer then has state of the parameters that it had state of, and of no others: not of those
    that had no gradient yet. With as many processes as before the run ends as one that was not interrupted, bit for
    bit, as far as the batches are the same. Loading executes no code.

    Args:
        folder ... more: as for :func:`save_checkpoint`.

    Raises:
        ValueError: no checkpoint, a damaged or missing file, another method, tensors that the model does not have, or
            has in other shapes, or another ``transform`` of a sparse layer; on every process, and before anything is
            changed. Or, after a part was loaded, an object that only code could load, which ``save_checkpoint`` does
            not write.
    """
    folder, state = Path(folder), TrainingState(model, method)
    content = _read(folder, method, more)
    reader = _reader(folder / content["folder"])
    state.random, state.begins = content["random"] == _randomness(), False
    there = content["tensors"]
    with _unless_refused(state.optimizer):
        state.begin({name for name in state.parameters() if there.get(f"optimizer {name}") == _STATE})
        raise_together(_difference(there, _kinds(state)))
    with _by_dcp():
        dcp.load(_parts(state, more), storage_reader=reader, planner=SafePlanner())


@contextmanager
def _by_dcp() -> Iterator[None]:
    """What DCP raises in every process, where something fails in one, is no ``Exception`` and mostly traceback."""
    with warnings.catch_warnings():
        if world_size() == 1:  # which is meant to be so
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            kind = OSError if isinstance(first, OSError) else ValueError
            raise kind(f"{type(first).__name__}: {first}") from error


def _parts(state: TrainingState, more: Mapping[str, Stateful] | None) -> dict[str, Any]:
    if "training" in (more or {}):
        raise ValueError("more has the name 'training', which is that of model, optimizer and method")
    return {"training": state, **(more or {})}


def _new_name(folder: Path, steps: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while (folder / f"steps-{steps}-{number}").exists():
        number += 1
    return f"steps-{steps}-{number}"


def _read(folder: Path, method: Method, more: Mapping[str, Stateful] | None) -> dict[str, Any]:
    """Content of the JSON file, after a look at all others; each process looks at a part of them."""
    content, problem = {}, None
    try:
        content = read_json(folder / _FILE)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{folder / _FILE} is not of a checkpoint by save_checkpoint ({_FORMAT!r})")
        if content["method"] != method.name:
            raise ValueError(f"{folder} is a checkpoint of method {content['method']!r}, this is {method.name!r}")
        if content["more"] != sorted(more or {}):
            raise ValueError(f"{folder} has {content['more']} besides, asked for are {sorted(more or {})}")
    except ValueError as error:
        problem = str(error)
    raise_together(problem)
    found = _digests(folder / content["folder"], list(content["files"]))
    damaged = [name for name, digest in content["files"].items() if found[name] != digest]
    raise_together(
        f"{folder / content['folder']} is damaged: {', '.join(damaged)} missing or not as written" if damaged else None
    )
    return content


def _reader(folder: Path) -> SafeReader:
    reader, problem = None, None
    try:
        reader = SafeReader(folder)
    except ValueError as error:
        problem = str(error)
    raise_together(problem)
    return cast(SafeReader, reader)


def _digests(folder: Path, names: list[str]) -> dict[str, str | None]:
    """SHA-256 of files, None of those that cannot be read; each process reads a part of them."""
    own: dict[str, str | None] = {}
    for name in names[rank() :: world_size()]:
        try:
            with (folder / name).open("rb") as file:
                own[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            own[name] = None
    return {name: digest for said in from_every_process(own) for name, digest in said.items()}


def _kinds(training: TrainingState) -> dict[str, str]:
    """Dtypes and shapes of the tensors of model and optimizer, which parameters it has state of, and what sparse values
    go through, by name."""
    state = training.state_dict()
    states = state["optimizer"]["state"]
    named = {f"model {name}": tensor for name, tensor in state["model"].items()}
    for name, entries in states.items():
        named |= {f"optimizer {name} {key}": tensor for key, tensor in entries.items()}
    kinds = {name: f"{t.dtype} {list(t.shape)}" for name, t in named.items() if isinstance(t, Tensor)}
    for name, layer in {**training.method.layers, **training.method.untouched}.items():
        if (transform := transform_name(layer)) is not None:
            kinds[f"transform of {name}"] = transform
    kinds |= {f"optimizer {name}": _STATE if name in states else _NO_STATE for name in training.parameters()}
    if not states:  # nothing else tells an SGD from an Adam
        kinds["optimizer"] = type(training.optimizer).__name__
    return kinds


def _difference(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """What keeps such tensors from being loaded, or None."""
    said = {
        "it has no": [name for name in here if name not in there],
        "the run has no": [name for name in there if name not in here],
        "it has": [
            f"{name} {there[name]}, not {here[name]}" for name in here if there.get(name, here[name]) != here[name]
        ],
    }
    problems = [f"{what} {some(names)}" for what, names in said.items() if names]
    return f"the checkpoint is of another model or optimizer: {'; '.join(problems)}" if problems else None
