"""``nn.MultiheadAttention`` whose projections are layers, which may be sparse."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_moon.nn.guards import ReadOnlyWeight
from sparse_moon.nn.layers import SparseLinear

Projection = nn.Linear | SparseLinear

INPUTS = ("q_proj", "k_proj", "v_proj")


class SparseMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls its four projections, each an ``nn.Linear`` or a :class:`SparseLinear`.

    :func:`sparse_moon.sparsify` makes it of an ``nn.MultiheadAttention``, in place: the module stays the same object,
    with its hooks. :func:`sparse_moon.densify` undoes it. The arguments and results of a call are those of
    ``nn.MultiheadAttention``, and so are its numbers but for rounding; only nested tensors are refused, which torch
    takes by a fast path that reads packed weights.

    In the state dict ``q_proj.values``, ``q_proj.topology.row_ptr``, ``q_proj.topology.col`` and ``q_proj.bias``, and
    the same for ``k_proj``, ``v_proj`` and ``out_proj``, take the place of ``in_proj_weight`` (or ``q_proj_weight``,
    ``k_proj_weight`` and ``v_proj_weight``), ``in_proj_bias`` and ``out_proj.weight``; a projection that stays dense
    has ``weight``. :attr:`in_proj_weight` and its like are for code that reads them: made anew at each access, dense,
    and read-only.

    Attributes:
        q_proj, k_proj, v_proj: (embed_dim, embed_dim), (embed_dim, kdim), (embed_dim, vdim).
        out_proj: (embed_dim, embed_dim).
    """

    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    out_proj: Any

    def __init__(self) -> None:
        raise TypeError("a SparseMultiheadAttention is made of an nn.MultiheadAttention, by sparse_moon.sparsify")

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weights of queries, keys and values, (3 embed_dim, embed_dim), or None where their widths differ."""
        return _read_only(torch.cat([layer.weight for layer in self.inputs().values()])) if self.one_width() else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The biases of queries, keys and values, (3 embed_dim,), or None."""
        biases: list[Tensor] = [layer.bias for layer in self.inputs().values() if layer.bias is not None]
        return torch.cat(biases) if biases else None

    @property
    def q_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """(embed_dim, embed_dim), or None where one weight holds all three."""
        return None if self.one_width() else self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """(embed_dim, kdim), or None where one weight holds all three."""
        return None if self.one_width() else self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """(embed_dim, vdim), or None where one weight holds all three."""
        return None if self.one_width() else self.v_proj.weight

    def inputs(self) -> dict[str, Projection]:
        """The projections of queries, keys and values, by name."""
        return {name: cast(Projection, self._modules[name]) for name in INPUTS}

    def one_width(self) -> bool:
        """Whether keys and values are as wide as queries, so that torch packs the three weights into one."""
        return self.embed_dim == self.kdim == self.vdim

    def is_sparse(self) -> bool:
        """Whether any projection is sparse."""
        return any(isinstance(layer, SparseLinear) for layer in self._modules.values())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``.

        Raises:
            ValueError: nested tensors, sequences or masks whose shapes do not fit each other, a mask that is neither
                bool nor floating point, or ``is_causal`` without ``attn_mask``.
        """
        _check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says of what kind attn_mask is: expected that mask, too, got None")
        batched, first = query.dim() == 3, self.batch_first or query.dim() == 2
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        length, batch = query.shape[1 if first else 0], query.shape[0 if first else 1]
        source = key.shape[1 if first else 0]

        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, (batch, length, source), query.dtype)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            shape = (batch, 1, -1) if first else (1, batch, -1)
            k = torch.cat([k, self.bias_k.expand(shape)], dim=1 if first else 0)
            v = torch.cat([v, self.bias_v.expand(shape)], dim=1 if first else 0)
        q, k, v = (self._heads(x, first) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores + mask.to(scores.dtype)  # that of autocast
            weights = F.dropout(scores.softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = self.out_proj(attended.permute((0, 2, 1, 3) if first else (2, 0, 1, 3)).flatten(2))
        return output if batched else output.squeeze(0), weights

    def _heads(self, x: Tensor, first: bool) -> Tensor:
        """(batch, heads, length, head_dim) of what a projection gives."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute((0, 2, 1, 3) if first else (1, 2, 0, 3))

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, sizes: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks in one that is added to the scores, (batch or 1, heads or 1, length or 1, source), or None."""
        batch, length, source = sizes
        mask = None
        if attn_mask is not None:
            shapes = (length, source), (batch * self.num_heads, length, source)
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(f"attn_mask must have shape {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}")
            attn_mask = _added(attn_mask, "attn_mask", dtype)
            each = attn_mask.dim() == 3
            mask = attn_mask.view(batch if each else 1, self.num_heads if each else 1, length, source)
        if padding is not None:
            if tuple(padding.shape) != (batch, source):
                raise ValueError(f"key_padding_mask must have shape {(batch, source)}, got {tuple(padding.shape)}")
            padding = _added(padding, "key_padding_mask", dtype).view(batch, 1, 1, source)
            mask = padding if mask is None else mask + padding
        more = (self.bias_k is not None) + self.add_zero_attn
        return mask if mask is None or not more else F.pad(mask, (0, more))


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError("nested tensors are for packed weights: give padded ones with key_padding_mask, or densify")
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if query.dim() not in (2, 3) or len({len(shape) for shape in shapes}) > 1 or shapes[1][:-1] != shapes[2][:-1]:
        raise ValueError(
            f"expected query, key and value of 2 or 3 dimensions, keys with values of one length, got {shapes}"
        )


def _added(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """What to add to scores: minus infinity where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"{name} must be bool or floating point, got {mask.dtype}")
    return mask


def _read_only(weight: Tensor) -> Tensor:
    return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnlyWeight)


def can_unpack(module: nn.Module) -> bool:
    """Whether the module is an ``nn.MultiheadAttention``, not a subclass, that keeps its weights as torch does."""
    if type(module) is not nn.MultiheadAttention:
        return False
    own = module._parameters
    weights = ["in_proj_weight"] if own.get("in_proj_weight") is not None else [f"{name}_weight" for name in INPUTS]
    return (
        all(own.get(name) is not None for name in weights)
        and "in_proj_bias" in own
        and type(module.out_proj) in (nn.Linear, NonDynamicallyQuantizableLinear)
    )


def unpack(attention: nn.Module) -> None:
    """Make it a :class:`SparseMultiheadAttention`, in place, of dense projections that are views of its weights."""
    assert isinstance(attention, nn.MultiheadAttention)
    own = attention._parameters
    packed, bias = own.pop("in_proj_weight"), own.pop("in_proj_bias")
    apart = [own.pop(f"{name}_weight") for name in INPUTS]
    weights = [cast(nn.Parameter, weight) for weight in apart] if packed is None else _chunks(packed)
    biases = [None] * 3 if bias is None else _chunks(bias)
    layers: dict[str, nn.Module | None] = {}
    for name, weight, part in zip(INPUTS, weights, biases, strict=True):
        layers[name] = layer = nn.Linear(weight.shape[1], weight.shape[0], bias=part is not None, device="meta")
        layer.weight, layer.bias = weight, cast(Any, part)
        layer.train(attention.training)
    attention._modules = {**layers, **attention._modules}
    if type(attention.out_proj) is NonDynamicallyQuantizableLinear:
        attention.out_proj.__class__ = nn.Linear  # type: ignore[assignment]
    attention._qkv_same_embed_dim = False  # by which nn.TransformerEncoderLayer does not read its weights
    attention.__class__ = SparseMultiheadAttention


def pack(attention: SparseMultiheadAttention, parameters: dict[str, nn.Parameter | None] | None = None) -> None:
    """Make it an ``nn.MultiheadAttention`` again, in place; its projections must be dense.

    Args:
        parameters: those that it had before; by default new ones. Where some of the weights of queries, keys and values
            are frozen and some are not, the packed one is not frozen.
    """
    if parameters is None:
        layers = attention.inputs()
        weights = {f"{name}_weight": cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
        biases = [layer.bias for layer in layers.values() if layer.bias is not None]
        packed = _joined([*weights.values()]) if attention.one_width() else None
        # in torch's order
        parameters = {} if packed is None else {"in_proj_weight": packed}
        parameters |= weights if packed is None else dict.fromkeys(weights)
        parameters |= {"in_proj_weight": packed, "in_proj_bias": _joined(biases) if biases else None}
        parameters |= attention._parameters
    attention._parameters = parameters
    for name in INPUTS:
        del attention._modules[name]
    if type(attention.out_proj) is nn.Linear:
        attention.out_proj.__class__ = NonDynamicallyQuantizableLinear
    attention._qkv_same_embed_dim = attention.one_width()
    attention.__class__ = nn.MultiheadAttention  # type: ignore[assignment]


def _chunks(parameter: nn.Parameter) -> list[nn.Parameter]:
    return [nn.Parameter(part, parameter.requires_grad) for part in parameter.detach().chunk(3)]


def _joined(parts: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), any(part.requires_grad for part in parts))
