"""What the sparse layers have in common: compact values on a topology."""

import copy
import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from sparse_moon import memory
from sparse_moon.nn.averages import Watch
from sparse_moon.nn.guards import Anchor, ReadOnlyWeight, resize
from sparse_moon.nn.low_rank import LowRank
from sparse_moon.ops import Geometry, Plan
from sparse_moon.ops.registry import transformed
from sparse_moon.sharding import divided_like, is_sharded, refuse_sharded
from sparse_moon.topology import Index, Topology, matrix_to_weight, pattern_name, weight_to_matrix

_UNSHARD = "call unshard() of the module that fully_shard was called for, on every process, and reshard() after"


class SparseLayer(nn.Module):
    """What :class:`SparseLinear` and :class:`SparseConv2d` share: compact ``values`` on a ``topology``.

    Attributes:
        values: the only weight parameter: (n,) numbers, or (n, bh, bw) blocks, in row order of the topology.
        lora: None, or factors whose product is added to the values (see :func:`sparse_moon.lora`).
        topology: which weights exist.
        bias: (out,) or None.
        transform: None, or a function of the values, or a module, whose result each product takes in their place. It is
            part of the layer: copies, files and dense weights have it.
        hide: None, or the same for the time being, after ``transform``: see :class:`sparse_moon.RandomMask`.
        probe: None, or in a batch that ends with a topology update a leaf of the shape of the topology whose gradient
            is to be the dense weight gradient (see :class:`sparse_moon.algorithms.dense_gradient.DenseGradient`).
    """

    values: nn.Parameter
    topology: Topology
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]
    pruned_later = False
    """Whether it has more weights than it is to end with, and no method yet that prunes them."""
    made_dense = False
    """Whether :func:`sparse_moon.densify` has put a dense layer in its place."""
    hide: Callable[[Tensor], Tensor] | None = None
    probe: Tensor | None = None
    _geometry: Geometry | None = None
    _plan: Plan | None = None
    _watch: Watch | None = None

    def _init_sparse(
        self, dense: nn.Linear | nn.Conv2d, topology: Topology, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        self.weight_shape = tuple(dense.weight.shape)
        self.topology = topology.to(device)
        device = self.topology.col.device
        self.values = nn.Parameter(torch.empty(self.topology.values_shape, device=device, dtype=dtype))
        bias = None
        if dense.bias is not None:
            bias = nn.Parameter(torch.empty(dense.bias.shape, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    @property
    def lora(self) -> LowRank | None:
        return cast(LowRank | None, self._modules.get("lora"))

    def set_lora(self, low_rank: LowRank | None) -> None:
        """Add the product of these factors to the values from now on, or nothing."""
        if low_rank is None:
            self._modules.pop("lora", None)
        else:
            self._modules["lora"] = low_rank

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        return cast(Any, self._modules.get("transform") or self.__dict__.get("_transform"))

    @transform.setter
    def transform(self, transform: Callable[[Tensor], Tensor] | None) -> None:
        self.__dict__["_transform"] = transform

    def reset_parameters(self) -> None:
        """Initialise like the dense layer: uniform in ``+-1/sqrt(fan_in)`` with the dense fan-in."""
        bound = 1.0 / math.sqrt(max(math.prod(self.weight_shape[1:]), 1))
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.note_written()

    @property
    def sparsity(self) -> float:
        """Share of weights that do not exist."""
        return self.topology.sparsity

    @property
    def weight(self) -> Tensor:
        """What the product multiplies with, as a dense tensor of ``weight_shape``; differentiable and read-only.

        For code that reads a layer's weight in place of calling the layer (fast paths of ``nn.TransformerEncoder``,
        ``F.linear(x, layer.weight)``): right, but made anew at each access, and the product is then a dense one.
        """
        self.topology.check()
        weight = self._dense(self._transformed(), self.probe)
        return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnlyWeight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"the weight of {type(self).__name__} is made of its values and cannot be assigned: write to values, "
                "or make a layer of a dense one with from_dense"
            )
        if name == "transform":  # in whichever of the two places it was
            self._modules.pop(name, None)
            self.__dict__.pop("_transform", None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "values":  # what register_parametrization and weight_norm begin with
            raise TypeError(
                f"the values of {type(self).__name__} cannot be taken away or parametrized: set its transform to a "
                "function of the values in place of a parametrization"
            )
        super().__delattr__(name)

    def effective_values(self) -> Tensor:
        """The values that the product sees: with :attr:`lora`, :attr:`transform` and :attr:`hide` where those are set.

        Raises:
            RuntimeError: other code has written to the index, or has averaged values across topology updates.
        """
        self.topology.check()
        refuse_sharded("what a product sees", [self.values], _UNSHARD)
        return self._transformed()

    def _transformed(self) -> Tensor:
        if not torch.compiler.is_compiling():
            self._check_values()
        values, hide = self._adapted(), self.hide
        return values if hide is None else hide(values)

    def _adapted(self) -> Tensor:
        lora, transform = self.lora, self.transform
        values = self.values if lora is None else lora(self.values, self.topology)
        return values if transform is None else transform(values)

    def operands(self) -> tuple[Tensor, Tensor | None, Plan]:
        """Values, bias and plan of a product; the plan is kept as long as the index stays as it is."""
        if torch.compiler.is_compiling():
            values = self._transformed()
            trains = values.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
            if trains and values.device.type == "cpu":
                memory.keep_for_training()
            return values, self.bias, self.topology.plan(self._geometry)
        own = self.__dict__  # attributes of a module take ten times as long
        modules, plan, watch = own["_modules"], own.get("_plan"), own.get("_watch")
        topology = modules["topology"]
        if plan is None or not plan.is_of(topology.__dict__["_buffers"]):
            plan = self._plan = topology.plan(self._geometry)
        if watch is None or watch.quiet != Topology.moves:
            self._check_values()
        parameters, transform, hide = own["_parameters"], own.get("_transform"), own.get("hide")
        values = parameters.get("values")
        if values is None or "bias" not in parameters:  # replicas and parametrizations have them elsewhere
            values, bias = self.values, self.bias
        else:
            bias = parameters["bias"]
        if "lora" in modules:
            values = modules["lora"](values, topology)
        if "transform" in modules:
            transform = modules["transform"]
        if transform is not None:
            values = transform(values)
        if not memory.decided and values.requires_grad and torch.is_grad_enabled() and values.device.type == "cpu":
            memory.keep_for_training()
        return values if hide is None else hide(values), bias, plan

    def _check_values(self) -> None:
        if self._watch is None:
            self._watch = Watch(self)
        if self._watch.has_followed(self):
            raise RuntimeError(
                f"the values of this {type(self).__name__} were averaged, slot by slot, with those of a model whose "
                "topology has moved on, so they are of other weights: average models with sm.EMA or sm.WeightAverage. "
                "If they are meant for this topology, call note_written() of the layer"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a mask or method that does not know the copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("hide", "probe")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note_written()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        for layer in (self, new):
            layer.note_written()
        return new

    def dense_weight(self) -> Tensor:
        """The weight as a dense tensor of ``weight_shape``, zeros where nothing exists; differentiable."""
        self.topology.check()
        return self._dense(self._adapted())

    def _dense(self, values: Tensor, probe: Tensor | None = None) -> Tensor:
        refuse_sharded("a dense weight", [values], _UNSHARD)
        matrix = self.topology.to_dense(values)
        if probe is not None:  # a growth step: it is zero, and gets the dense gradient
            matrix = matrix + probe
        if matrix.requires_grad and not (torch.compiler.is_compiling() or transformed()):
            matrix = Anchor.apply(matrix, *self.topology.index)
        return matrix_to_weight(matrix, self.weight_shape, self.topology.block[1])

    def mask(self) -> Tensor:
        """Bool tensor of ``weight_shape``, True where a weight exists."""
        return matrix_to_weight(self.topology.mask(), self.weight_shape, self.topology.block[1])

    def replace_(self, index: Index, values: Tensor) -> None:
        """Take over another topology of the same grid and its values; :attr:`values` stays the same parameter.

        Raises:
            ValueError: another number of values where they are divided among processes.
        """
        self._check_size(values.shape)
        self.topology.replace_(index)
        if values.shape == self.values.shape:
            with torch.no_grad():
                self.values.copy_(divided_like(values, self.values))
        else:
            resize(self.values, values)
        self.note_written()

    def _check_size(self, shape: torch.Size) -> None:
        if is_sharded(self.values) and shape != self.values.shape:
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} are divided among processes (fully_shard), which cannot "
                f"get another shape, {tuple(shape)}: make the model with that many weights before fully_shard"
            )

    def note_written(self) -> None:
        """Say that the present values are meant for the present topology: after writing into a copy of a layer."""
        if self._watch is None:
            self._watch = Watch(self)
        self._watch.note(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        values, col = state_dict.get(prefix + "values"), state_dict.get(prefix + "topology.col")
        if (values is None) != (col is None):
            errors.append(f"sparse layer at {prefix.rstrip('.')!r}: its values and its topology must come together")
            return
        row_ptr = state_dict.get(prefix + "topology.row_ptr")
        if col is not None and row_ptr is not None and self.topology.problem(row_ptr, col, prefix + "topology."):
            return  # the topology says what it is; without it the values would lose their places
        with torch.inference_mode(False):  # whose tensors no training could use
            # where training changes the number of weights, a checkpoint holds another one than a new model
            shape = None if col is None else (*col.shape, *self.values.shape[1:])
            if values is not None and values.shape != self.values.shape and values.shape == shape:
                self._check_size(values.shape)
                resize(self.values, self.values.detach().new_empty(values.shape))
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            if values is not None:
                self.note_written()

    def _take_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        with torch.no_grad():
            self.values.copy_(self.topology.gather(weight_to_matrix(dense.weight, self.topology.block[1])))
            if self.bias is not None:
                self.bias.copy_(cast(Tensor, dense.bias))
        self.values.requires_grad_(dense.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(cast(Tensor, dense.bias).requires_grad)
        self.train(dense.training)

    def _hand_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        with torch.no_grad():
            dense.weight.copy_(self.dense_weight())
            if self.bias is not None:
                cast(Tensor, dense.bias).copy_(self.bias)
        dense.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            cast(Tensor, dense.bias).requires_grad_(self.bias.requires_grad)
        dense.train(self.training)

    def _sparse_repr(self) -> str:
        return f"sparsity={self.sparsity:.4f}, pattern={pattern_name(self.topology.block)!r}"
