"""Registration of the package's operators with ``torch.library``.

Every operator has a reference implementation for all devices (``CompositeExplicitAutograd``) and a fake one for
tracing; a faster kernel for one device registers itself for that device's dispatch key and is then preferred.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sparse_moon", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define an operator from its schema; returns its qualified name."""
    name = "sparse_moon::" + schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(schema[: schema.index("(")], reference, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    return name


def to_autocast_dtype(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating point tensors in the dtype that autocast asks for on this device; unchanged outside autocast."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch knows no autocast on meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
