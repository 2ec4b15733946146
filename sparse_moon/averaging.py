"""Averages over training: of weights, and of predictions."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_moon import ops
from sparse_moon.nn import sparse_layers
from sparse_moon.ops.plan import versions
from sparse_moon.random_mask import RandomMask
from sparse_moon.sharding import divided_like, is_sharded, part_of, refuse_sharded, reshard, sharding_modules, whole
from sparse_moon.topology import Topology, build_index


class _Average(nn.Module):
    """Buffers whose sizes follow the model's, which pruning changes, and those of what is loaded.

    Of a parameter that is divided among processes (``fully_shard``) the average is divided likewise.
    """

    count: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        reshard(sharding_modules(model))  # an evaluation leaves parameters whole
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device))

    def _check_started(self) -> None:
        if self.count == 0:
            raise ValueError("no model has been averaged yet")

    def _buffers_named(self, prefix: str) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name.startswith(prefix)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        divided = {}
        for name, buffer in list(self.named_buffers()):
            saved = state_dict.get(prefix + name)
            if saved is None or saved.dim() != buffer.dim():
                continue
            if saved.shape == buffer.shape:
                divided[prefix + name] = divided_like(saved, buffer)
            elif not is_sharded(buffer):
                setattr(self, name, buffer.new_empty(saved.shape))
        state_dict = {**state_dict, **divided}
        super()._load_from_state_dict(state_dict, prefix, *args)


class WeightAverage(_Average):
    """Uniform average of a model's parameters over several moments of training.

    MOON's voting (arXiv 2403.20047, section 3.3), and with a ``mask`` CigL's weight & mask averaging
    (ICLR 2023, Algorithm 1): ``avg <- (n avg + Z w) / (n + 1)`` with the mask's present draw.

    Call :meth:`update` at the end of each late epoch, then :meth:`copy_to` a model and :func:`refresh_batch_norm` on
    it. Only parameters are averaged; a model with batch norm is not usable before the refresh.

    Averages of 16-bit parameters are kept in float32. ``state_dict`` holds the averages, how many models they are of,
    and the topology they belong to.

    Args:
        model: whose parameters are to be averaged.
        mask: random mask of the model's sparse layers, or None.
        rescale: divide the masked average by the keep probability p when it is copied: ``E[avg] = p E[w]``, which batch
            norm absorbs everywhere but in the last layer, whose logits shrink by p. Not in the paper.

    Raises:
        ValueError: in :meth:`update`, a topology that has changed since the first update: the average would have more
            weights than the model.
    """

    def __init__(self, model: nn.Module, mask: RandomMask | None = None, *, rescale: bool = False) -> None:
        super().__init__(model)
        self.mask, self.rescale = mask, rescale
        self._start(model)

    def _start(self, model: nn.Module) -> None:
        for i, tensor in enumerate(_averaged(model)):
            self.register_buffer(f"average_{i}", torch.zeros_like(_wide(tensor)))
        for i, tensor in enumerate(_indices(model)):
            self.register_buffer(f"index_{i}", tensor.clone())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present parameters into the average."""
        reshard(sharding_modules(model))
        if self.count == 0:
            self._start(model)
        self._check(model)
        averages = list(map(part_of, self._buffers_named("average_")))
        values = [_wide(part_of(tensor)) for tensor in _averaged(model)]
        if self.mask is not None:
            mask, layers = self.mask, sparse_layers(model).values()
            masked = len(layers)
            if any(is_sharded(layer.values) for layer in layers):  # the op draws for whole weights
                for i, layer in enumerate(layers):
                    shown = part_of(divided_like(mask.mask(i, layer), layer.values))
                    ops.average_(averages[i : i + 1], [values[i] * shown], self.count)
            else:
                parts = averages[:masked], values[:masked]
                ops.average_(*parts, self.count, keep=mask.keep, seed=mask.seed, step=mask.step)
            averages, values = averages[masked:], values[masked:]
        ops.average_(averages, values, self.count)
        self.count += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same structure and topology.

        Raises:
            ValueError: nothing has been averaged yet, or another topology.
        """
        self._check_started()
        self._check(model)
        reshard(sharding_modules(model))
        for parameter, average in zip(_averaged(model), self._buffers_named("average_"), strict=True):
            parameter.copy_(divided_like(average, parameter))
        if self.mask is not None and self.rescale:
            for layer in sparse_layers(model).values():
                part_of(layer.values).div_(self.mask.keep)
        for layer in sparse_layers(model).values():
            layer.note_written()

    def _check(self, model: nn.Module) -> None:
        mine, theirs = self._buffers_named("index_"), _indices(model)
        if len(mine) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            raise ValueError(
                "the topology is not that of the models averaged so far; average only while the topology is frozen"
            )


class _PlacedAverage(_Average):
    """Averages of the sparse layers' values with their places, which need not be the model's."""

    @staticmethod
    def _others(model: nn.Module) -> list[Tensor]:
        """What is averaged besides the sparse layers' values."""
        return _unmasked(model)

    def _kept(self, i: int, topology: Topology) -> tuple[Tensor, Tensor]:
        """Places and values that a layer gets, the i-th, which has this topology now."""
        return self.get_buffer(f"place_{i}"), self.get_buffer(f"value_{i}")

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same structure, whose topology becomes the average's.

        Raises:
            ValueError: nothing has been averaged yet.
        """
        self._check_started()
        reshard(sharding_modules(model))
        for i, layer in enumerate(sparse_layers(model).values()):
            places, values = self._kept(i, layer.topology)
            layer.replace_(build_index(places, layer.topology.grid), values.to(layer.values.dtype))
        for tensor, average in zip(self._others(model), self._buffers_named("average_"), strict=True):
            tensor.copy_(divided_like(average, tensor))


class EMA(_PlacedAverage):
    """Exponential moving average of a model whose topology moves: ``avg <- decay avg + (1 - decay) w``.

    At every weight that the model has now it is the average of the dense weights, those that were away counting as 0: a
    weight that has just been grown starts from 0, and one that goes is forgotten. Averages by slot
    (``torch.optim.swa_utils.AveragedModel`` and the like) mix different weights as soon as the topology moves.
    Floating-point and complex buffers (batch-norm statistics) are averaged likewise, others copied.

    Call :meth:`update` after each step and :meth:`copy_to` on a copy of the model to evaluate. Averages of 16-bit
    parameters are kept in float32. ``state_dict`` holds the averages, their places and how many updates there were.

    Args:
        model: whose parameters are to be averaged; the first :meth:`update` takes them as they are.
        decay: in [0, 1).

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__(model)
        self.decay = decay
        self._noted: dict[str, tuple[Tensor, object, int | None]] = {}  # buffers, their versions, and of what topology
        self._start(model)

    def _start(self, model: nn.Module) -> None:
        for i, layer in enumerate(sparse_layers(model).values()):
            self.register_buffer(f"place_{i}", layer.topology.positions())
            self.register_buffer(f"value_{i}", _wide(layer.values).clone())
        for i, tensor in enumerate(self._others(model)):
            self.register_buffer(f"average_{i}", _wide(tensor).clone())

    @staticmethod
    def _others(model: nn.Module) -> list[Tensor]:
        """What is not a sparse layer's values or index."""
        return [*_unmasked(model), *_plain_buffers(model)]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present parameters and buffers into the average."""
        reshard(sharding_modules(model))
        if not self._is_noted("count") and self.count == 0:
            self._start(model)
        layers = sparse_layers(model).values()
        for i, layer in enumerate(layers):
            if not self._is_noted(f"place_{i}", layer.topology.fingerprint):
                self._follow(i, layer.topology)
        averages = [self.get_buffer(f"value_{i}") for i in range(len(layers))] + self._buffers_named("average_")
        present = [*(layer.values for layer in layers), *self._others(model)]
        blended: tuple[list[Tensor], list[Tensor]] = [], []
        for average, tensor in zip(averages, present, strict=True):
            if average.is_floating_point() or average.is_complex():
                blended[0].append(part_of(average))
                blended[1].append(part_of(tensor).detach().to(average.dtype))
            else:
                average.copy_(tensor)
        torch._foreach_lerp_(*blended, 1.0 - self.decay)
        self.count += 1
        self._note("count")

    def _follow(self, i: int, topology: Topology) -> None:
        """Average a layer's weights at the places of this topology from now on."""
        old, new, average = self.get_buffer(f"place_{i}"), topology.positions(), self.get_buffer(f"value_{i}")
        if not torch.equal(old, new):
            self.register_buffer(f"place_{i}", new)
            self.register_buffer(f"value_{i}", divided_like(_at_places(whole(average), old, new), average))
        self._note(f"place_{i}", topology.fingerprint)

    def _note(self, name: str, fingerprint: int | None = 0) -> None:
        """Note that a buffer is as this class has made it, so that no later update need wait to look at it."""
        buffer = self.get_buffer(name)
        self._noted[name] = buffer, versions((buffer,)), fingerprint

    def _is_noted(self, name: str, fingerprint: int | None = 0) -> bool:
        buffer, *others = self._noted.get(name, (None, None, None))
        now = self.get_buffer(name)
        return fingerprint is not None and buffer is now and others == [versions((now,)), fingerprint]


_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_WIDE.get(tensor.dtype, tensor.dtype))


def _at_places(average: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The averages of ascending places ``old`` at the places ``new``, 0 where there was none."""
    result = average.new_zeros(len(new), *average.shape[1:])
    place = torch.searchsorted(old, new)
    there = torch.cat([old, old.new_tensor([-1])])[place] == new
    result[there] = average[place[there]]
    return result


class TicketAverage(_PlacedAverage):
    """Average of networks of different topologies, pruned back to the size of one (Sup-tickets, Yin et al. 2022).

    A weight that a network lacks counts as 0. What exists in any of them is kept until :meth:`copy_to` prunes each
    layer to the model's number of blocks, the largest sums of ``|average|``.

    ``state_dict`` holds the averages with their places, and how many networks they are of.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_sharded("a TicketAverage", model.parameters(), "train in DistributedDataParallel")
        super().__init__(model)
        for i, layer in enumerate(sparse_layers(model).values()):
            self.register_buffer(f"place_{i}", layer.topology.positions()[:0])
            self.register_buffer(f"value_{i}", torch.zeros_like(_wide(layer.values[:0])))
        for i, tensor in enumerate(_unmasked(model)):
            self.register_buffer(f"average_{i}", torch.zeros_like(_wide(tensor)))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present parameters into the average."""
        share = 1.0 / (int(self.count) + 1)  # a tensor's would be float32
        for i, layer in enumerate(sparse_layers(model).values()):
            old, new = self.get_buffer(f"place_{i}"), layer.topology.positions()
            places = torch.cat([old, new]).unique()
            average = _wide(layer.values).new_zeros(len(places), *layer.values.shape[1:])
            average[torch.searchsorted(places, old)] = self.get_buffer(f"value_{i}") * (1.0 - share)
            average[torch.searchsorted(places, new)] += _wide(layer.values) * share
            self.register_buffer(f"place_{i}", places)
            self.register_buffer(f"value_{i}", average)
        for average, parameter in zip(self._buffers_named("average_"), _unmasked(model), strict=True):
            average.lerp_(parameter.to(average.dtype), share)
        self.count += 1

    def _kept(self, i: int, topology: Topology) -> tuple[Tensor, Tensor]:
        places, values = super()._kept(i, topology)
        best = topology.value_scores(values).sort(descending=True, stable=True).indices[: topology.num_blocks]
        best = best.sort().values
        return places[best], values[best]


class PredictionAverage(nn.Module):
    """Several networks as one: the logarithm of their mean softmax, (B, outputs), float32, or float64 as theirs are.

    Not a linear function of any features; OOD scores that need a linear head refuse it, and those on features see
    those of the last network.

    Raises:
        ValueError: no network.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        if not self.networks:
            raise ValueError("expected at least one network")

    def forward(self, input: Tensor) -> Tensor:
        return _log_mean_softmax([network(input) for network in self.networks])


class StochasticPasses(nn.Module):
    """Monte Carlo dropout (Gal & Ghahramani 2016) on the weights: the logarithm of the mean softmax of several passes.

    Every forward pass sees the same ``samples`` masks, the first ones that ``mask`` draws, so that predictions do not
    depend on the batch or on what was predicted before.

    Args:
        network: whose sparse layers ``mask`` hides in part.
        mask: with the keep probability of the training; may be the training's own, which goes on as if undisturbed.
        samples: number of passes S.
    """

    def __init__(self, network: nn.Module, mask: RandomMask, samples: int) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.network, self.mask, self.samples = network, mask, samples

    def forward(self, input: Tensor) -> Tensor:
        passes = []
        with self.mask.restored():
            self.mask.step = 0
            for _ in range(self.samples):
                self.mask.draw()
                passes.append(self.network(input))
        return _log_mean_softmax(passes)


def _log_mean_softmax(logits: list[Tensor]) -> Tensor:
    z = torch.stack(logits)
    z = z if z.dtype == torch.float64 else z.float()
    return z.log_softmax(2).logsumexp(0) - math.log(len(logits))


def _unmasked(model: nn.Module) -> list[Tensor]:
    """All parameters but the sparse layers' values."""
    return _averaged(model)[len(sparse_layers(model)) :]


def _averaged(model: nn.Module) -> list[Tensor]:
    """All parameters, the sparse layers' values first and in their order: as :class:`RandomMask` numbers them."""
    values = [layer.values for layer in sparse_layers(model).values()]
    masked = {id(parameter) for parameter in values}
    others = [parameter for parameter in model.parameters() if id(parameter) not in masked]
    return [parameter.detach() for parameter in (*values, *others)]


def _plain_buffers(model: nn.Module) -> list[Tensor]:
    """All buffers but the sparse layers' indices."""
    indices = {id(t) for layer in sparse_layers(model).values() for t in layer.topology.index}
    return [buffer for buffer in model.buffers() if id(buffer) not in indices]


def _indices(model: nn.Module) -> list[Tensor]:
    return [t for layer in sparse_layers(model).values() for t in (layer.topology.row_ptr, layer.topology.col)]
