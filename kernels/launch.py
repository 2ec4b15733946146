"""A kernel launch as a value: what the GPU runs, what the interpreter tests, and what the compile gate compiles."""

from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}

_compiled: dict[Hashable, CompiledKernel] = {}
"""What was launched, by what it serves; nothing of the interpreter."""


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: what ``triton.jit`` returned.
        grid: programs along up to three axes; none is launched where one of them is 0.
        arguments: by parameter name: tensors, numbers or None, and compile-time constants.
        num_warps: warps a program; ``num_stages``: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def __call__(self) -> None:
        if 0 in self.grid:
            return
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            key = self._served(tensor.device) if isinstance(self.kernel, JITFunction) else None
            if (compiled := _compiled.get(key)) is not None:
                arguments = [self.arguments[name] for name in self.kernel.arg_names]
                compiled[(*self.grid, 1, 1)[:3]](*arguments)
                return
            compiled = self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)
            if key is not None:
                _compiled[key] = compiled

    def _served(self, device: torch.device) -> Hashable:
        """What one compiled kernel serves: all that Triton tells apart, and a little more.

        Its own look-up takes several times as long: it compares each global constant that a kernel reads with what it
        was when the kernel was compiled.
        """
        described: list[Hashable] = [self.kernel.fn, device, self.num_warps, self.num_stages]
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            if isinstance(value, Tensor):
                described.append((value.dtype, value.data_ptr() % 16))
            elif parameter.is_constexpr or value is None:
                described.append(value)
            elif isinstance(value, int):
                described.append((type(value), value % 16 == 0, value == 1, -(2**31) <= value < 2**31))
            else:
                described.append(type(value))
        return tuple(described)

    def compile(self, capability: int) -> Any:
        """Compile as the launch would for a compute capability (80, 90), without a GPU; ``.asm`` has ptx and cubin."""
        names = self.kernel.arg_names
        described = [self._describe(position, name) for position, name in enumerate(names)]
        signature = {name: kind for name, (kind, _) in zip(names, described, strict=True)}
        constants = {(i,): self.arguments[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
        attributes = {(i,): [["tt.divisibility", 16]] for i, (_, divisible) in enumerate(described) if divisible}
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def _describe(self, position: int, name: str) -> tuple[str, bool]:
        """Type of an argument as Triton specialises it, and whether it is known to be divisible by 16."""
        value, parameter = self.arguments[name], self.kernel.params[position]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            return "constexpr", False
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype], True
        if isinstance(value, int):
            return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        return "fp32", False


class Variant(NamedTuple):
    """A launch that can be chosen, for the compile gate."""

    name: str
    launch: Launch
    matrix_unit: bool
    """Whether its products must be on the matrix units (mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100)."""


Variants = Iterator[Variant]
"""What each kernel file's ``variants()`` returns: one for every configuration, dtype and pattern it can launch."""
