#!/usr/bin/env python3
"""The stored choice for a GPU from what was measured layer by layer, until benchmarks/tune.py has run there.

    python benchmarks/cuda_table.py    # sparse_moon/ops/tables/crossover_cuda_sm90.json

Reads benchmarks/results/cuda_layers_*.json, forward passes and forward + backward passes that kernels and dense layers
took on an H200 as CUDA graphs. The crossover of a pass is the largest density measured at which the kernels took at
least 5 % less time, as it was asked for, before rounding to whole blocks; that of both gradients is what the backward
passes took together. Nothing is said of higher densities, and ops/choice.py takes nothing of it for smaller products.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from flops_and_time import CUDA_CASES
from timing import write_results
from torch import nn

from sparse_moon.topology import block_shape

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results", ROOT / "sparse_moon" / "ops" / "tables" / "crossover_cuda_sm90.json"
LEAST = 1.05


def gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast as the dense layer of the same dtype the forward pass and both gradients were."""
    forward, both = ({row["pass"]: row for row in rows}[name] for name in ("fwd", "fwd+bwd"))
    gradients = (both["baseline_ms"] - forward["baseline_ms"]) / (both["ms"] - forward["ms"])
    return {"forward": forward["baseline_ms"] / forward["ms"], "input_grad": gradients, "values_grad": gradients}


def work_of(case: Any, pattern: str, dtype: str) -> dict[str, Any]:
    """A product as ops/choice.py names it, without its pass."""
    layer, block = case.build(), block_shape(pattern)
    common = {"device": "cuda", "block": list(block)}
    if isinstance(layer, nn.Linear):
        sizes = {"batch": case.input_shape[0], "inputs": layer.in_features, "outputs": layer.out_features}
        loops = {"positions": 1, "taps": 1, "stride": 1, "groups": 1}
        return sizes | loops | common | {"dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype]}
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(case.input_shape[2:], layer.padding, layer.kernel_size,
                                                          layer.stride, strict=True)]  # fmt: skip
    sizes = {"batch": case.input_shape[0], "inputs": layer.in_channels // layer.groups, "outputs": layer.out_channels}
    loops = {"positions": math.prod(size), "taps": math.prod(layer.kernel_size), "stride": max(layer.stride),
             "groups": layer.groups}  # fmt: skip
    # torch allows TF32 in convolutions by default, and the baseline took it
    return sizes | loops | common | {"dtype": {"bf16": "bfloat16", "fp32": "tf32"}[dtype]}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cases = {case.name: case for case in CUDA_CASES}
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    measured: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("cuda_layers_*.json")):
        content = json.loads(path.read_text())
        measured.append({key: content[key] for key in ("date", "commit", "torch", "gpu", "cuda")} | {"file": path.name})
        groups: dict[tuple[str, str, str, float], list[dict[str, Any]]] = {}
        for row in content["rows"]:
            if row["baseline"].startswith(f"dense {row['dtype']}"):
                groups.setdefault((row["case"], row["pattern"], row["dtype"], row["sparsity"]), []).append(row)
        for (case, pattern, dtype, sparsity), rows in groups.items():
            for pass_, gain in gains(rows).items():
                best = found.setdefault((case, pattern, dtype), {})
                if gain >= LEAST:
                    best[pass_] = max(best.get(pass_, 0.0), round(1.0 - sparsity, 6))
                else:
                    best.setdefault(pass_, 0.0)
    rows = [
        {"work": {"pass_": pass_, **work_of(cases[case], pattern, dtype)}, "crossover": crossover}
        for (case, pattern, dtype), passes in found.items()
        for pass_, crossover in passes.items()
    ]
    write_results(TABLE, {"measured": measured, "rows": rows})
    print(f"{len(rows)} rows, {sum(row['crossover'] > 0 for row in rows)} with kernels that pay")


if __name__ == "__main__":
    main()
