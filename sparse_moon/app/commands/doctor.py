"""``sparse-moon doctor``."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sparse_moon.app.environment import environment
from sparse_moon.app.parsers import Namespace
from sparse_moon.ops import choice
from sparse_moon.ops.native import has_triton, native, native_cuda, require_cuda
from sparse_moon.source_tree import PACKAGE

_PACKAGES = (
    "torchvision", "triton", "numpy", "scikit-learn", "safetensors", "lightning", "transformers", "accelerate", "timm",
    "huggingface_hub", "onnx", "onnxscript", "onnxruntime",
)  # fmt: skip


def run(arguments: Namespace) -> None:
    """Print what is installed, which kernels are built, and what decides which of them run."""
    found = _found()
    print(json.dumps(found, indent=2) if arguments.json else _text(found))


def _found() -> dict[str, Any]:
    this = environment("cpu")
    return {
        "versions": {
            **{name: this[name] for name in ("sparse_moon", "torch", "python")},
            **{name: _version(name) for name in _PACKAGES},
        },
        "package": str(PACKAGE),
        "system": this["system"],
        "processor": this["processor"],
        "threads": {
            "torch": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "cpu": _cpu(),
        "cuda": _cuda(),
        "triton": has_triton(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    if native is None:
        return {"kernels": None, "table": None}  # which decides between kernels and dense products
    return {
        "kernels": native.__file__,
        "instructions": native.isa(),
        "supported": list(native.supported_isas()),
        "maker": native.vendor(),
        "table": choice.stored_table("cpu"),
    }


def _cuda() -> dict[str, Any]:
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            table = choice.stored_table("cuda")
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(
            {"name": properties.name, "capability": capability, "memory_gb": properties.total_memory / 1e9,
             "table": table}
        )  # fmt: skip
    return {
        "kernels": None if native_cuda is None else native_cuda.__file__,
        "torch_built_for": torch.version.cuda,
        "gpus": gpus,
    }


def _text(found: dict[str, Any]) -> str:
    cpu, cuda, threads = found["cpu"], found["cuda"], found["threads"]
    absent = [name for name, number in found["versions"].items() if number is None]
    present = [f"{name} {number}" for name, number in found["versions"].items() if number is not None]
    rows = [
        ("installed", ", ".join(present)),
        ("not installed", ", ".join(absent) or "nothing that could be used"),
        ("package", found["package"]),
        ("machine", f"{found['processor']}, {found['system']}"),
        ("threads", f"{threads['torch']} of torch, {threads['processors']} processors, "
                    f"OMP_NUM_THREADS {threads['OMP_NUM_THREADS'] or 'not set'}"),
    ]  # fmt: skip
    if cpu["kernels"] is None:
        rows.append(("CPU kernels", "not built: all runs on the slower reference path"))
    else:
        rows.append(("CPU kernels", cpu["kernels"]))
        supported = ", ".join(cpu["supported"])
        rows.append(("instructions", f"{cpu['instructions']} (this processor has {supported}), maker {cpu['maker']}"))
    rows.append(("CPU crossovers", cpu["table"] or "none: all products are dense"))
    try:
        rows.append(("CUDA kernels", str(require_cuda().__file__)))
    except RuntimeError as error:
        rows.append(("CUDA kernels", f"not built. {error}"))
    rows.append(("Triton kernels", "there" if found["triton"] else "not there: Triton or the package's folder is not"))
    for gpu in cuda["gpus"]:
        table = gpu["table"] or "none measured: kernels run where sparse_moon.tune has measured them"
        memory = f"{gpu['memory_gb']:.0f} GB"
        rows.append(("GPU", f"{gpu['name']}, capability {gpu['capability']}, {memory}, crossovers {table}"))
    if not cuda["gpus"]:
        build = f"CUDA {cuda['torch_built_for']}" if cuda["torch_built_for"] else "CPUs"
        rows.append(("GPU", f"none (torch is built for {build})"))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:{width}}  {text}" for title, text in rows)
