#!/usr/bin/env python3
"""Registers, shared memory and instructions of the inner loops of Triton kernels, as compiled for a GPU, without one.

    python benchmarks/inner_loops.py sparse_conv2d bfloat16 "(64, 64)"

Loops are those of the machine code around an instruction of the matrix unit. Counts are of a warp: with four warps and
one instruction a clock for each of a multiprocessor's four parts, a step takes at least as many clocks as instructions.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX = ("GMMA", "HMMA", "MMA.")


def dump(compiled: Any, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, *options, file.name], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[Counter[str]]:
    """Instructions by name of each loop with a matrix instruction."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    place = {address: number for number, (address, _) in enumerate(code)}
    found = []
    for end, (address, text) in enumerate(code):
        target = re.search(r"BRA.*0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) >= address:
            continue
        body = [line for _, line in code[place[int(target[1], 16)] : end + 1]]
        if any(name in line for line in body for name in MATRIX):
            found.append(Counter(re.sub(r"^@!?U?PT?\d*\s+", "", line).split()[0].split(".")[0] for line in body))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", help="a file of kernels/")
    parser.add_argument("words", nargs="*", help="what names of variants must contain")
    parser.add_argument("--capability", type=int, default=90)
    arguments = parser.parse_args()
    for variant in import_module(f"sparse_moon.kernels.{arguments.op}").variants():
        if all(word in variant.name for word in arguments.words):
            compiled = variant.launch.compile(arguments.capability)
            registers = re.search(r"REG:(\d+)", dump(compiled, "--dump-resource-usage"))
            assert registers is not None
            print(f"{variant.name}: {registers[1]} registers, {compiled.metadata.shared} bytes of shared memory")
            for counts in loops(dump(compiled, "-sass")):
                print(f"    {counts.total()}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common(8)))


if __name__ == "__main__":
    main()
