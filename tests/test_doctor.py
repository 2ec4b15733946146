"""``sparse-moon doctor``: what is here, said in words and in JSON."""

import json

import torch

import sparse_moon as sm
from sparse_moon.app.cli import main
from sparse_moon.app.commands import doctor
from sparse_moon.ops import choice
from sparse_moon.ops.native import native, native_cuda


def test_json(capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["sparse_moon"] == sm.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["cpu"]["kernels"] == (native and native.__file__)
    assert found["cuda"]["kernels"] == (native_cuda and native_cuda.__file__)
    assert len(found["cuda"]["gpus"]) == torch.cuda.device_count()
    if native is not None:
        assert (
            found["cpu"]["instructions"] == native.isa() and found["cpu"]["instructions"] in found["cpu"]["supported"]
        )


def test_the_table_is_the_one_that_choices_read(capsys):
    main(["doctor", "--json"])
    name = json.loads(capsys.readouterr().out)["cpu"]["table"]
    assert (name is None) == (not choice.table("cpu"))


def test_text(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    for title in ("installed", "not installed", "package", "machine", "threads", "CPU kernels", "CUDA kernels", "GPU"):
        assert f"\n{title} " in f"\n{out}"
    assert f"sparse_moon {sm.__version__}" in out


def test_a_machine_without_kernels(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "native", None)
    monkeypatch.setattr("sparse_moon.ops.native.native_cuda", None)
    monkeypatch.setattr(doctor, "native_cuda", None)
    monkeypatch.setattr(doctor, "has_triton", lambda: False)
    main(["doctor"])
    out = capsys.readouterr().out
    assert "not built: all runs on the slower reference path" in out and "none: all products are dense" in out
    assert "runs without its CUDA kernels" in out and "Triton or the package's folder is not" in out
