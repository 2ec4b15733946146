"""What a run's files withstand: damage, kills before every file operation, two writers, full disks."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.train import train

CAMPAIGN = Path(__file__).parent / "faults.py"
QUICK = TrainConfig(model="mlp", width=16, epochs=2, batch_size=256, interval=2, ood=["digits-8-9"])
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "run"
    train(QUICK, folder, progress=False)
    return folder


def campaign(*options):
    """Every part that was tried, with how many trials there were and how many held."""
    command = [sys.executable, str(CAMPAIGN), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    for tally in (figures["kills"], *figures.get("damages", {}).values(), figures["pairs"], figures["full disks"]):
        if tally:
            assert tally["held"] == tally["trials"] > 0, done.stderr
    return figures


@posix
def test_a_short_campaign_of_faults():
    figures = campaign("--kills", 3, "--configs", "rigl moon", "--damages", 40, "--pairs", 2, "--full-disks", 1)
    assert figures["kills"]["killed"] >= 3
    assert all(tally["refused"] > 20 for tally in figures["damages"].values())


@posix
@pytest.mark.slow
def test_a_long_campaign_of_faults():
    campaign("--kills", 25, "--damages", 2000, "--pairs", 30, "--full-disks", 10, "--seed", 1)


def write_each(folder):
    """A small file of each kind, with what reads it and what should come of that."""
    content = {"format": "x", "weights": torch.arange(5.0), "more": {"n": 3}}
    files.write_archive(folder / "small.pt", content)
    yield folder / "small.pt", lambda: files.read_archive(folder / "small.pt", "such a file")
    run_folder.write_scores(folder, {"id/msp": np.linspace(0, 1, 7), "correct": np.arange(7) % 2 == 0})
    yield folder / run_folder.SCORES, lambda: run_folder.read_scores(folder)
    files.write_json(folder / run_folder.RESULTS, {"id": {"ece": 0.25, "nll": None}, "epochs": 2, "layers": ["a", "b"]})
    yield folder / run_folder.RESULTS, lambda: files.read_json(folder / run_folder.RESULTS)
    run_folder.write_metrics(folder, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": float("nan")}])
    yield folder / run_folder.METRICS, lambda: run_folder.read_metrics(folder, 2)


def test_no_flipped_bit_and_no_truncation_goes_unnoticed(tmp_path):
    for path, read in write_each(tmp_path):
        whole, expected = path.read_bytes(), repr(read())
        flips = ((i, bit) for i in range(len(whole)) for bit in ([i % 8] if len(whole) > 1000 else range(8)))
        damaged = [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i, bit in flips]
        refused = 0
        for content in damaged + [whole[:size] for size in range(len(whole))]:
            path.write_bytes(content)
            try:
                assert repr(read()) == expected
            except ValueError as error:
                assert path.name in str(error)
                refused += 1
        assert refused > len(damaged)
        if path.suffix in (".pt", ".npz"):
            assert refused == len(damaged) + len(whole)


def test_json_of_other_making_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2]}')
    assert files.read_json(path) == {"a": [1, 2]}
    files.write_json(path, {"a": 1})
    path.write_text(path.read_text().replace('"a": 1', '"a": 2'))
    with pytest.raises(ValueError, match=r"x\.json is damaged: its checksum is crc32:\w+, not crc32:\w+; drop it if"):
        files.read_json(path)


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"model": {}, "config": {}, "epoch": 1},
        {"model": [], "config": {}, "epoch": 1, "finished": True},
        {"model": {}, "config": {}, "epoch": "1", "finished": True},
    ],
)
def test_other_content_is_no_checkpoint(tmp_path, state):
    torch.save(state, tmp_path / run_folder.CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of sparse_moon"):
        run_folder.read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["model"].popitem(), "fc"),
        (lambda s: s["model"].update({"fc.bias": torch.zeros(2)}), "size mismatch for fc.bias"),
        (
            lambda s: s["model"].update({"fc.bias": s["model"]["fc.bias"].double()}),
            "expected fc.bias to be torch.float",
        ),
        (lambda s: s.update(epoch=7), "7 epochs, 2 of them"),
        (lambda s: s.update(optimizer=[]), "does not fit this run"),
        (lambda s: s["config"].update(lr=0.5), "it has lr 0.5, not 0.12"),
        (lambda s: s["config"].update(lr="fast"), "lr must be a number, got 'fast'"),
    ],
)
def test_a_checkpoint_that_does_not_fit(finished, tmp_path, edit, message):
    state = run_folder.read_checkpoint(finished)
    edit(state)
    run_folder.write_checkpoint(tmp_path, {**state, "finished": False})
    with pytest.raises(ValueError, match=message):
        train(QUICK, tmp_path, resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [run_folder.CHECKPOINT]


def test_files_reach_the_disk_before_they_take_their_place(tmp_path, monkeypatch):
    done = []
    fsync, replace_ = os.fsync, os.replace

    def synced(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace_(a, b)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    files.write_text(tmp_path / "a.txt", "content")
    assert done[0].startswith(".a.txt.") and done[1:] == ["replace", tmp_path.name]


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = [tmp_path / name for name in (".checkpoint.pt.abcd.pt", ".config.json.x_12.json", ".report.html.q.html")]
    kept = [tmp_path / name for name in (".notes.pt", "checkpoint.pt.bak", ".checkpoint.pt.swp")]
    for path in left + kept:
        path.write_text("x")
    with run_folder.only_writer(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@posix
def test_one_who_is_refused_leaves_the_folder(tmp_path):
    """The first has made it, and has not written yet."""
    folder = tmp_path / "runs" / "a"
    code = (
        "import sys, time; from pathlib import Path; from sparse_moon.app import run_folder\n"
        "with run_folder.only_writer(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.readline(); (Path(sys.argv[1]) / 'x').touch()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        for _ in range(3):
            with (
                pytest.raises(ValueError, match="another process is writing the run in"),
                run_folder.only_writer(folder),
            ):
                pass
        assert folder.is_dir()
        first.communicate("\n")
    assert first.returncode == 0 and [path.name for path in folder.iterdir()] == ["x"]


@posix
def test_a_folder_that_vanishes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Its maker failed and removed it between this process' opening and locking it."""
    folder = tmp_path / "a"
    folder.mkdir()
    flock = run_folder.fcntl.flock

    def late(handle, flags):
        monkeypatch.setattr(run_folder.fcntl, "flock", flock)
        folder.rmdir()
        flock(handle, flags)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with run_folder.only_writer(folder):
        (folder / "x").touch()
        assert folder.is_dir()


def test_a_link_to_nothing_is_an_error(tmp_path):
    """It was looked at again and again."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    code = (
        "import sys; from pathlib import Path; from sparse_moon.app import run_folder\n"
        "with run_folder.only_writer(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "link")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"link is a link to {tmp_path / 'nowhere'}, which does not exist" in done.stderr
    (tmp_path / "nowhere").mkdir()
    with run_folder.only_writer(tmp_path / "link"):
        (tmp_path / "link" / "x").touch()
    assert (tmp_path / "nowhere" / "x").exists()


def test_only_its_maker_removes_an_empty_folder(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(OSError, match="fails"), run_folder.only_writer(tmp_path / name):
            raise OSError("fails")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_finished_run_stays_as_it_is(finished):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()}
    time.sleep(0.02)
    assert train(QUICK, finished, resume=True, progress=False) == files.read_json(finished / run_folder.RESULTS)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()} == before


@pytest.mark.parametrize("reliability", ["moon", "mc-dropout"])
def test_what_was_removed_from_a_finished_run_comes_back(tmp_path, reliability):
    config = replace(QUICK, reliability=reliability)
    train(config, tmp_path, progress=False)
    kept = {name: (tmp_path / name).read_bytes() for name in (run_folder.CHECKPOINT, run_folder.SCORES)}
    results = files.read_json(tmp_path / run_folder.RESULTS)
    for name in (run_folder.RESULTS, run_folder.SCORES, run_folder.REPORT):
        (tmp_path / name).unlink()
    train(config, tmp_path, resume=True, progress=False)
    again = files.read_json(tmp_path / run_folder.RESULTS)
    assert {**again, "environment": None} == {**results, "environment": None}
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    assert (tmp_path / run_folder.REPORT).exists()
