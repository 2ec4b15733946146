import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from small_runs import CONFIG, write_run
from sparse_moon import files
from sparse_moon.app import compare, comparison, run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.experiment import run_name
from sparse_moon.app.train import train

QUICK = [
    "--model", "mlp", "--width", "32", "--epochs", "2", "--batch-size", "128", "--interval", "5", "--lr", "0.2",
    "--ood", "noise", "letters",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """In the runs' processes, as in this one: sums of another number of threads round differently."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_runs_are_trained_skipped_and_survive_a_failing_one(tmp_path, capsys, monkeypatch):
    # runs use the package that compares them, not what a checkout in the working folder holds
    (tmp_path / "sparse_moon").mkdir()
    (tmp_path / "sparse_moon" / "__init__.py").write_text("raise RuntimeError('another package')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH")
    out = tmp_path / "all"
    broken = out / "rigl-moon-without-tuning-voting-0.9-seed0"
    compare._prepare(broken, settings(without=("tuning", "voting"), reliability="moon"))
    (broken / run_folder.CHECKPOINT).write_bytes(b"damaged")
    command = ["compare", *QUICK, "--out", str(out), "--method", "rigl", "--reliability", "none", "moon:-tuning-voting"]
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 4)  # of which each of two has its share
        main([*command, "--sparsity", "0.9", "--seed", "0", "--jobs", "2"])
    assert stop.value.code == 1
    made = json.loads((out / "rigl-none-0.9-seed0" / run_folder.RESULTS).read_text())["environment"]
    assert made["threads"] == "2"
    printed = capsys.readouterr()
    assert "FAILED with code 2" in printed.out and "checkpoint.pt is damaged" in printed.out
    assert "1 runs failed: rigl-moon-without-tuning-voting-0.9-seed0" in printed.err
    assert (out / "rigl-none-0.9-seed0" / run_folder.REPORT).exists() and (out / comparison.PLOT).exists()
    assert json.loads((out / "rigl-none-0.9-seed0" / run_folder.CONFIG).read_text())["width"] == 32
    assert [row["label"] for row in json.loads((out / comparison.TABLE).read_text())["rows"]] == ["rigl none 0.9"]

    (broken / run_folder.CHECKPOINT).unlink()  # as if it had been killed before its first epoch ended
    started = []
    start = compare._start
    monkeypatch.setattr(compare, "_start", lambda folder, *rest: (started.append(folder.name), start(folder, *rest))[1])
    main(command)
    printed = capsys.readouterr().out
    assert started == [broken.name] and "rigl-none-0.9-seed0: finished before" in printed
    assert "| rigl moon:-tuning-voting 0.9 | 1 |" in printed
    assert json.loads((broken / run_folder.CONFIG).read_text())["without"] == ["tuning", "voting"]

    before = json.loads((out / "rigl-none-0.9-seed0" / run_folder.RESULTS).read_text())
    monkeypatch.setattr(compare, "_start", lambda *_: pytest.fail("trained"))
    main(["compare", "--out", str(out), "--evaluate", "--ood", "photos", "noise", "--score", "energy", "knn"])
    after = json.loads((out / "rigl-none-0.9-seed0" / run_folder.RESULTS).read_text())
    assert after["ood"]["photos"].keys() == {"energy", "knn"} and after["time_s"] == before["time_s"]
    assert after["ood"]["letters"] == before["ood"]["letters"] and after["ood"]["noise"] == before["ood"]["noise"]
    assert "photos" in (out / "rigl-none-0.9-seed0" / run_folder.REPORT).read_text()
    (row,) = [r for r in json.loads((out / comparison.TABLE).read_text())["rows"] if r["label"] == "rigl none 0.9"]
    far = [after["ood"][name]["energy"]["auroc"] for name in ("noise", "photos")]
    assert row["figures"]["auroc/far/energy"]["mean"] == pytest.approx(statistics.mean(far))


def test_a_configuration_of_train_holds_for_all_runs(tmp_path, capsys, monkeypatch):
    started, run_all = [], compare.run_all
    monkeypatch.setattr(compare, "run_all", lambda configs, folder, **_: (started.extend(configs), [])[1])
    monkeypatch.setattr(comparison, "write_table", lambda folder, **_: {"near": [], "rows": []})
    main(["compare", "--config", "moon-mnist", "--method", "rigl", "set", "--epochs", "15", "--out", str(tmp_path)])
    assert [(c.method, c.reliability, c.sparsity, c.seed) for c in started] == [
        ("rigl", "moon", 0.95, 0), ("set", "moon", 0.95, 0),
    ]  # fmt: skip
    assert {(c.model, c.batch_size, c.epochs) for c in started} == {("resnet18", 128, 15)}

    path = tmp_path / "own.yaml"
    path.write_text("reliability: moon\nwithout: [loss, voting]\nsparsity: [0.5, 0.6]\nlr: 0.3\n")
    started.clear()
    main(["compare", "--config", str(path), "--out", str(tmp_path)])
    assert [(c.label, c.sparsity, c.lr) for c in started] == [
        ("moon:-loss-voting", 0.5, 0.3), ("moon:-loss-voting", 0.6, 0.3),
    ]  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_all", run_all)
        path.write_text("model: mlp\nwidth: 8\nepochs: 1\nbatch_size: 256\ninterval: 2\nood: [noise]\nscore: [msp]\n"
                        "reliability: none\ncapture: false\ndownload: false\ndata_root: null\n")  # fmt: skip
        main(["compare", "--config", str(path), "--out", str(tmp_path / "all")])
    (written,) = (tmp_path / "all").glob(f"*/{run_folder.CONFIG}")
    assert files.read_json(written)["data_root"] is None and (written.parent / run_folder.RESULTS).exists()

    path.write_text("a: [1")
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", str(path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "line 1, column 4" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")
def test_sigterm_ends_the_runs_and_a_run_has_one_writer(tmp_path):
    config = settings(epochs=1000)
    folder = tmp_path / run_name(config)
    compare._prepare(folder, config)
    command = [sys.executable, "-m", "sparse_moon", "compare", *QUICK[:4], "--epochs", "1000", *QUICK[6:],
               "--out", str(tmp_path), "--reliability", "none"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(lambda: (folder / run_folder.CHECKPOINT).exists())
            with pytest.raises(ValueError, match="another process is writing the run in"):
                train(config, folder, resume=True, progress=False)
        finally:
            process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    with run_folder.only_writer(folder):  # the run was ended, too
        pass


def started_processes(monkeypatch, code):
    """Processes that compare starts in place of runs, by folder: each runs this Python code in its folder."""
    started = {}

    def start(folder, _, variables):
        environment = {**os.environ, **variables}
        command = [sys.executable, "-c", code]
        started[folder.name] = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, env=environment)
        (folder / compare.LOG).touch()
        return started[folder.name]

    monkeypatch.setattr(compare, "_start", start)
    return started


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_killed_and_damaged_runs_leave_the_others_alone(tmp_path, capsys, monkeypatch):
    configs = [settings(seed=seed) for seed in range(4)]
    damaged, *folders = [tmp_path / run_name(config) for config in configs]
    compare._prepare(damaged, configs[0])
    for name in (run_folder.RESULTS, run_folder.CHECKPOINT):
        (damaged / name).write_bytes(b"damaged")
    results = {"id": {"accuracy": 0.5, "ece": 0.25}, "time_s": 1.0}
    code = f"""
import json, os, pathlib, signal
if pathlib.Path.cwd().name == {folders[0].name!r}:
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path({run_folder.RESULTS!r}).write_text(json.dumps({results}))
"""
    started = started_processes(monkeypatch, code)
    failed = compare.run_all(configs, tmp_path, jobs=2)
    printed = capsys.readouterr().out
    assert sorted(failed) == [damaged.name, folders[0].name] and started.keys() == {path.name for path in folders}
    assert f"{damaged.name}: FAILED: {damaged / run_folder.CHECKPOINT} is damaged" in printed
    assert f"{folders[0].name}: FAILED with code {-signal.SIGKILL}: it printed nothing" in printed
    for path in folders[1:]:
        assert f"{path.name}: accuracy 0.5000, ECE 0.2500, 1.0 s" in printed
    assert [f"[{i}/4]" in printed for i in range(1, 5)] == [True] * 4


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupt_ends_what_runs_and_starts_nothing_more(tmp_path, monkeypatch):
    started = started_processes(monkeypatch, "import time; time.sleep(60)")

    def interrupt():
        _wait(lambda: len(started) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        compare.run_all([settings(seed=seed) for seed in range(5)], tmp_path, jobs=2)
    thread.join()
    assert len(started) == 2
    assert all(process.returncode == -signal.SIGTERM for process in started.values())


def _wait(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_checkpoint_was_removed_counts(tmp_path):
    write_run(tmp_path, CONFIG, accuracy=0.9, near=0.5, far=(0.5, 0.5), seconds=[1.0])
    path = tmp_path / run_name(CONFIG)
    (path / run_folder.CHECKPOINT).unlink()
    assert run_folder.is_finished(path)
    (path / run_folder.RESULTS).unlink()
    assert not run_folder.is_finished(path)


def settings(**changes):
    return replace(CONFIG, batch_size=128, interval=5, lr=0.2, ood=["noise", "letters"], **changes)


def test_the_table_by_hand(tmp_path):
    moon = replace(CONFIG, reliability="moon", without=("voting",))
    write_run(tmp_path, CONFIG, accuracy=0.8, near=0.7, far=(0.8, 1.0), seconds=[9.0, 2.0, 2.0])
    write_run(tmp_path, replace(CONFIG, seed=1), accuracy=0.9, near=0.9, far=(0.6, 0.8), seconds=[9.0, 4.0, 4.0])
    write_run(tmp_path, moon, accuracy=0.95, near=0.6, far=(0.5, 0.6), seconds=[6.0, 6.0])
    write_run(tmp_path, replace(moon, sparsity=0.95), accuracy=0.7, near=0.6, far=(0.5, 0.6), seconds=[6.0, 6.0])
    unfinished = tmp_path / "rigl-none-0.5-seed0"
    unfinished.mkdir()
    files.write_json(unfinished / run_folder.CONFIG, {})

    table = comparison.write_table(tmp_path)
    assert table == files.read_json(tmp_path / comparison.TABLE) and table["near"] == ["letters"]
    rows = {row["label"]: row for row in table["rows"]}
    assert list(rows) == ["rigl moon:-voting 0.9", "rigl none 0.9", "rigl moon:-voting 0.95"]
    none = rows["rigl none 0.9"]["figures"]
    assert rows["rigl none 0.9"]["runs"] == 2
    assert none["accuracy"] == {"mean": pytest.approx(0.85), "std": pytest.approx(0.05 * 2**0.5)}
    assert none["auroc/near/msp"]["mean"] == pytest.approx(0.8)
    assert none["auroc/far/msp"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0.1 * 2**0.5)}
    assert none["fpr95/far/msp"]["mean"] == pytest.approx(0.2)
    assert none["forward_flops"]["mean"] == pytest.approx(0.2) and none["training_flops"]["mean"] == 0.2
    moon_row = rows["rigl moon:-voting 0.9"]["figures"]
    assert moon_row["accuracy"] == {"mean": 0.95, "std": None}
    assert moon_row["relative_epoch_time"]["mean"] == pytest.approx(6 / 3)  # medians of the epochs: 2 and 4
    assert "relative_epoch_time" not in rows["rigl moon:-voting 0.95"]["figures"]
    text = (tmp_path / comparison.MARKDOWN).read_text()
    assert "| rigl none 0.9 | 2 | 85.00 ± 7.07 | 0.1000 ± 0.0000 |" in text
    assert "## FPR95, near OOD\n\n| run | msp |\n| --- | --- |\n| rigl moon:-voting 0.9 | 40.00 |" in text
    assert (tmp_path / comparison.PLOT).read_bytes()[:4] == b"\x89PNG"

    rows = comparison.write_table(tmp_path, {"rigl moon:-voting 0.95": 1.02})["rows"]
    measured = [row["figures"].get("relative_epoch_time") for row in rows]
    assert measured == [None, None, {"mean": 1.02, "std": None}]


def ood_of(folder, config, sets):
    """Leave a run these OOD sets, with these scores beside msp."""
    path = folder / run_name(config) / run_folder.RESULTS
    results = files.read_json(path)
    kept = {name: results["ood"][name] for name, _ in sets}
    for name, scores in sets:
        kept[name] |= {score: {"auroc": 0.9, "fpr95": 0.1} for score in scores}
    files.write_json(path, {**results, "ood": kept})


def test_a_row_counts_what_all_its_runs_have(tmp_path):
    runs = [replace(CONFIG, seed=seed) for seed in (0, 1)]
    for config, noise in zip(runs, (0.8, 0.6), strict=True):
        write_run(tmp_path, config, accuracy=0.8, near=0.7, far=(noise, 1.0), seconds=[1.0])
    ood_of(tmp_path, runs[0], [("noise", ["knn"]), ("photos", ["knn"])])
    ood_of(tmp_path, runs[1], [("noise", []), ("letters", ["knn"])])
    table = comparison.write_table(tmp_path)
    (row,) = table["rows"]
    assert (row["ood"], row["some_ood"]) == (["noise"], ["photos", "letters"])
    assert (table["near"], table["far"]) == ([], ["noise"])
    assert {name for name in row["figures"] if "/" in name} == {"auroc/far/msp", "fpr95/far/msp"}
    assert row["figures"]["auroc/far/msp"] == {"mean": pytest.approx(0.7), "std": pytest.approx(0.1 * 2**0.5)}
    note = "which do not count (`--evaluate --ood` adds them):\n- rigl none 0.9: photos, letters\n"
    assert note in (tmp_path / comparison.MARKDOWN).read_text()

    ood_of(tmp_path, runs[0], [("photos", [])])
    table = comparison.write_table(tmp_path)
    (row,) = table["rows"]
    assert row["ood"] == table["far"] == [] and not [name for name in row["figures"] if "/" in name]


def test_ood_sets_of_one_name_from_different_files_do_not_count(tmp_path):
    settings = [{"seed": 0}, {"seed": 1}, {"seed": 0, "sparsity": 0.5}, {"seed": 1, "sparsity": 0.5}]
    files_of_b = ["easy.npz", "./easy.npz", "hard.npz", "hard.npz"]
    for changes, file in zip(settings, files_of_b, strict=True):
        config = replace(CONFIG, **changes, ood=["noise", "photos", f"b={file}"])
        write_run(tmp_path, config, accuracy=0.8, near=0.7, far=(0.8, 0.9), seconds=[1.0], near_set="b")
    table = comparison.write_table(tmp_path)
    assert table["unlike_ood"] == {"b": ["b=hard.npz", "b=easy.npz"]}
    assert table["ungrouped"] == [] and [row["ood"] for row in table["rows"]] == [["noise", "photos"]] * 2
    (pair,) = table["paired"]
    assert "auroc/far/msp" in pair["figures"] and "auroc/ungrouped/msp" not in pair["figures"]
    note = "from different places, so they do not count:\n- b: b=hard.npz, b=easy.npz\n"
    assert note in (tmp_path / comparison.MARKDOWN).read_text()

    for path in tmp_path.glob("*0.5-*"):  # these got theirs later, from where the others have it
        results = files.read_json(path / run_folder.RESULTS)
        files.write_json(path / run_folder.RESULTS, {**results, "ood_specs": {"b": "b=easy.npz"}})
    table = comparison.write_table(tmp_path)
    assert table["unlike_ood"] == {} and table["ungrouped"] == ["b"]
    assert "different places" not in (tmp_path / comparison.MARKDOWN).read_text()


def test_runs_without_epochs_have_a_table(tmp_path):
    for method in ("rigl", "dense"):
        config = replace(CONFIG, method=method, epochs=0, weights="w.pt")
        write_run(tmp_path, config, accuracy=0.8, near=0.7, far=(0.8, 1.0), seconds=[])
        path = tmp_path / run_name(config) / run_folder.RESULTS
        files.write_json(path, {**files.read_json(path), "epochs": 0})
    rows = comparison.write_table(tmp_path)["rows"]
    assert all(math.isnan(row["epoch_s"]) and "relative_epoch_time" not in row["figures"] for row in rows)
    assert "| dense none | 1 | 80.00 | 0.1000 |" in (tmp_path / comparison.MARKDOWN).read_text()


def test_other_settings_that_differ_are_named(tmp_path):
    for pattern in ("unstructured", "block8"):
        config = replace(CONFIG, pattern=pattern, method="set")
        write_run(tmp_path / pattern, config, accuracy=0.8, near=0.7, far=(0.8, 1.0), seconds=[1.0])
        os.rename(tmp_path / pattern / run_name(config), tmp_path / f"run-{pattern}")
        os.rmdir(tmp_path / pattern)
    labels = [row["label"] for row in comparison.write_table(tmp_path)["rows"]]
    assert labels == ["set none 0.9 pattern=block8", "set none 0.9 pattern=unstructured"]


def test_wrong_arguments(tmp_path, capsys):
    for options, message in (
        (["--reliability", "moon:-tunning"], "parts ('loss', 'tuning', 'voting') to leave out, got ('tunning',)"),
        (["--reliability", "moo"], "reliability must be one of"),
        (["--method", "dense", "--reliability", "cigl"], "needs another method than 'dense'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--table-only"], "--table-only writes the table of all finished runs, as they are: leave out --model, "),
        (["--score", "mps"], "unknown scores ['mps']"),
        (["--what"], "--what"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *QUICK, "--out", str(tmp_path / "none"), *options])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--out", str(tmp_path / "none"), "--table-only"])
    assert "holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").glob("*/results.json"))


def test_dense_runs_are_not_repeated_for_each_sparsity(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "run_all", lambda configs, folder, **_: (asked.extend(configs), ["none"])[1])
    monkeypatch.setattr(comparison, "write_table", lambda folder, **_: {"rows": [], "near": []})
    with pytest.raises(SystemExit):
        main(["compare", "--out", str(tmp_path), "--method", "dense", "set", "--sparsity", "0.9", "0.95", "--seed", "3",
              "4", "--reliability", "moon:-loss", "--keep", "0.8"])  # fmt: skip
    names = {run_name(config) for config in asked}
    assert names == {"dense-moon-without-loss-seed3", "dense-moon-without-loss-seed4"} | {
        f"set-moon-without-loss-{s}-seed{seed}" for s in (0.9, 0.95) for seed in (3, 4)
    }
    assert all(config.keep == 0.8 for config in asked)


def test_scores_are_merged(tmp_path):
    run_folder.write_scores(tmp_path, {"id/msp": np.ones(3)})
    assert run_folder.read_scores(tmp_path)["id/msp"].tolist() == [1.0, 1.0, 1.0]
    (tmp_path / run_folder.SCORES).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"scores\.npz is damaged"):
        run_folder.read_scores(tmp_path)
