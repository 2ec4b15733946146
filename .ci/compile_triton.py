"""Compile gate of the Triton kernels without a GPU: variants for sm_90, and for sm_80 and sm_100 what may differ.

That is the products, for sm_100 in bfloat16 alone, where compiling one takes a second, and one variant of each other
kernel. Fails where one does not compile, spills registers, needs more shared memory than the chip has, or does not use
the matrix units it is meant to use. ``python .ci/compile_triton.py [op ...]``
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
import triton
from torch import Tensor

import sparse_moon.kernels
from sparse_moon.kernels.launch import Variant

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use
# of the chip's own: the older mma.sync compiles for every chip, at less than half the speed
MATRIX_INSTRUCTIONS = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}


def problems(variant: Variant, capability: int) -> list[str]:
    """What is wrong with the variant on this architecture."""
    try:
        compiled = variant.launch.compile(capability)
    except Exception as error:  # whatever the compiler raises is the finding
        return [f"does not compile: {type(error).__name__}: {str(error)[:500]}"]
    found = []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _output_of("cuobjdump", "--dump-resource-usage", file.name)
        frame = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))
        # for sm_100 some have a frame of 8 bytes that no instruction reads or writes
        spilled = frame and re.search(r"\b(?:STL|LDL)\b", _output_of("nvdisasm", file.name))
    if spilled or "REG:" not in report:
        found.append(f"spills registers: {report.strip()[-200:]}")
    if compiled.metadata.shared > SHARED_MEMORY[capability]:
        found.append(f"needs {compiled.metadata.shared} bytes of shared memory, {SHARED_MEMORY[capability]} there")
    if variant.matrix_unit and not re.search(MATRIX_INSTRUCTIONS[capability], compiled.asm["ptx"]):
        found.append(f"no instruction {MATRIX_INSTRUCTIONS[capability]} in the PTX")
    return found


def _output_of(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def chosen(variants: Iterable[Variant]) -> Iterator[tuple[Variant, int]]:
    """What is compiled, and for which architecture."""
    seen = set()
    for variant in variants:
        launch = variant.launch
        yield variant, 90
        if variant.matrix_unit:
            yield variant, 80
            if any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in launch.arguments.values()):
                yield variant, 100
        elif launch.kernel.__name__ not in seen:
            seen.add(launch.kernel.__name__)
            yield from ((variant, capability) for capability in (80, 100))


def check(op: str) -> tuple[int, list[str]]:
    """Number of compilations of one kernel file, and what is wrong with them."""
    count, lines = 0, []
    for variant, capability in chosen(import_module(f"sparse_moon.kernels.{op}").variants()):
        count += 1
        lines += [f"{variant.name} on sm_{capability}: {p}" for p in problems(variant, capability)]
    return count, lines


def main() -> None:
    modules = {
        m.name: import_module(f"sparse_moon.kernels.{m.name}") for m in iter_modules(sparse_moon.kernels.__path__)
    }
    ops = sys.argv[1:] or [name for name, module in modules.items() if hasattr(module, "variants")]
    # said explicitly, because Triton's default is about to change
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    failed = False
    with ProcessPoolExecutor(2) as pool:
        for op, (count, lines) in zip(ops, pool.map(check, ops), strict=True):
            print(f"{op}: {count} compilations, {len(lines)} problems", *lines, sep="\n  ", flush=True)
            failed |= bool(lines)
    sys.exit(failed)


if __name__ == "__main__":
    main()
