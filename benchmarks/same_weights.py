#!/usr/bin/env python3
"""Whether two checkouts train the same networks, bit by bit; writes benchmarks/results/same_weights.json.

    python benchmarks/same_weights.py --before BEFORE --after .

BEFORE is a checkout of the commit before, its compiled kernels beside its modules as ``pip install -e`` leaves them.

Short seeded runs of every training method with every reliability method, with each part that ``without`` may leave
out, in mixed precision, and resumed after an interruption. Of each the SHA-256 of all tensors of its checkpoint
(weights, indices, optimizer, averages, random state) and of its scores, its figures and its metrics are compared. A
combination that one checkout refuses must be refused by the other. Each checkout is a process of its own with one
thread.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

METHODS = ["dense", "static", "set", "rigl", "mest", "srigl", "gmp", "granet", "top-kast"]
RELIABILITY = [
    "none", "moon", "cigl", "weight-dropout", "mc-dropout", "label-smoothing", "mixup", "logitnorm", "dac", "vos",
    "generalized-odin", "sup-tickets",
]  # fmt: skip
WITHOUT = {"moon": ["loss", "tuning", "voting"], "cigl": ["mask", "averaging"]}
SHORT = [
    "--epochs", "4", "--batch-size", "128", "--interval", "3", "--lr", "0.2", "--sparsity", "0.8", "--stop", "0.5",
    "--vote-from", "0.5", "--warmup-epochs", "1", "--outliers-from", "0.25", "--samples", "3", "--tickets", "2",
    "--ood", "noise", "--quiet",
]  # fmt: skip
MLP, RESNET = ["--model", "mlp", "--width", "16"], ["--model", "small-resnet", "--width", "4"]
INTERRUPTED_AFTER = 3
"""Epochs after which a run that is to be resumed is interrupted."""


def cases() -> dict[str, list[str]]:
    """Options of each run by its name; "resumed" at the end of a name says that it is interrupted and resumed."""
    found = {
        f"{method} {reliability}": [*MLP, "--method", method, "--reliability", reliability]
        for method, reliability in product(METHODS, RELIABILITY)
    }
    for reliability, parts in WITHOUT.items():
        for chosen in (*([part] for part in parts), parts):
            label = f"rigl {reliability}:-{'-'.join(chosen)}"
            found[label] = [*MLP, "--method", "rigl", "--reliability", reliability, "--without", *chosen]
    found["mest none soft memory bound"] = [*MLP, "--method", "mest", "--reliability", "none", "--soft-memory-bound"]
    found["rigl cigl rescaled"] = [*MLP, "--method", "rigl", "--reliability", "cigl", "--rescale"]
    found["rigl moon holdout"] = [*MLP, "--method", "rigl", "--reliability", "moon", "--holdout", "0.2"]
    for reliability in RELIABILITY:
        options = ["--method", "rigl", "--reliability", reliability]
        found[f"rigl {reliability} small-resnet fused bfloat16"] = [*RESNET, *options, "--fuse", "--amp", "bfloat16"]
        found[f"rigl {reliability} resumed"] = [*MLP, *options]
    for method in METHODS:
        found[f"{method} moon small-resnet"] = [*RESNET, "--method", method, "--reliability", "moon"]
        found[f"{method} cigl resumed"] = [*MLP, "--method", method, "--reliability", "cigl"]
    return found


def digest(state: Any) -> str:
    """SHA-256 of nested containers of tensors, arrays, numbers and texts, but for times."""
    import torch

    found = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                if key not in ("time_s", "step_ms"):
                    add(f"{path}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for i, one in enumerate(value):
                add(f"{path}/{i}", one)
        elif hasattr(value, "dtype"):
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            found.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{path} {value!r}".encode())

    add("", state)
    return found.hexdigest()


def run(options: list[str], folder: Path, *, resumed: bool) -> dict[str, Any]:
    """One run by the command line of the checkout on the path: digests and figures, or why it was refused."""
    from sparse_moon.app import run_folder
    from sparse_moon.app.cli import main

    write, written = run_folder.write_checkpoint, []

    def interrupting(*arguments: Any) -> None:
        write(*arguments)
        written.append(arguments)
        if len(written) == INTERRUPTED_AFTER:
            raise KeyboardInterrupt

    said = io.StringIO()
    argv = ["train", *SHORT, *options, "--out", str(folder)]
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if resumed:
                run_folder.write_checkpoint = interrupting
                with contextlib.suppress(SystemExit):
                    main(argv)
                run_folder.write_checkpoint = write
                if len(written) != INTERRUPTED_AFTER:
                    raise SystemExit(2)
            main([*argv, *["--resume"] * resumed])
    except SystemExit:
        return {"refused": said.getvalue().strip().splitlines()[-1].replace(str(folder), "OUT")}
    finally:
        run_folder.write_checkpoint = write
    state = {key: value for key, value in run_folder.read_checkpoint(folder).items() if key != "config"}
    results = json.loads((folder / run_folder.RESULTS).read_text())
    figures = {key: value for key, value in results.items() if key not in ("time_s", "environment", "checksum")}
    return {
        "state": digest(state),
        "weights": digest(state["model"]),
        "figures": digest(figures),
        "scores": digest(run_folder.read_scores(folder)),
        "accuracy": figures["id"]["accuracy"],
    }


def worker(out: Path, chosen: str) -> None:
    """All runs of the checkout on the path, as JSON."""
    import torch

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(cases().items()):
            if chosen in name:
                found[name] = run(options, Path(folder) / str(number), resumed=name.endswith("resumed"))
                print(f"{name}: {found[name].get('weights', found[name].get('refused'))}", flush=True)
    out.write_text(json.dumps(found))


def start(checkout: Path, out: Path, chosen: str) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(checkout.resolve()), str(Path(__file__).parent.resolve())])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, pathlib, sparse_moon, same_weights\n"
        "assert pathlib.Path(sparse_moon.__file__).parents[1] == pathlib.Path(sys.argv[1]), sparse_moon.__file__\n"
        "same_weights.worker(pathlib.Path(sys.argv[2]), sys.argv[3])"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(checkout.resolve()), str(out), chosen], env=environment)


def main() -> None:
    from timing import environment, write_results

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of the commit before, with its kernels")
    parser.add_argument("--before-commit", default="", help="its commit, where it has no repository")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1], help="checkout to compare with it")
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "same_weights.json")
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "before.json", Path(folder) / "after.json"]
        processes = [
            start(at, file, options.only) for at, file in zip((options.before, options.after), files, strict=True)
        ]
        if any([process.wait() for process in processes]):
            raise SystemExit("a checkout failed")
        before, after = (json.loads(file.read_text()) for file in files)
    rows = []
    for name in before:
        refused = "refused" in before[name] and "refused" in after[name]
        same = refused or before[name] == after[name]
        row = {"run": name, "same": same, **after[name]}
        rows.append(row if same else {**row, "before": before[name]})
    trained = [row for row in rows if "weights" in row]
    counts = {"runs": len(trained), "refused": len(rows) - len(trained), "different": sum(not r["same"] for r in rows)}
    print(counts, *(row["run"] for row in rows if not row["same"]), sep="\n")
    torch.set_num_threads(1)
    commit = options.before_commit or subprocess.run(
        ["git", "-C", str(options.before), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    write_results(options.out, {**environment(torch.device("cpu")), "before": commit, **counts, "rows": rows})
    raise SystemExit(counts["different"] > 0)


if __name__ == "__main__":
    main()
