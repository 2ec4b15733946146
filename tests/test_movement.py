"""What moves in a topology, and the pictures of it."""

import re

import numpy as np
import pytest
import torch

import sparse_moon as sm
from small_mlp import mlp, train
from small_runs import killed_after
from sparse_moon import files
from sparse_moon.app import plots, run_folder
from sparse_moon.app.report import write_report
from sparse_moon.app.run_record import read_record
from sparse_moon.app.topology_pictures import topology_pictures
from sparse_moon.nn.inspect import fan_ins
from sparse_moon.nn.movement import Movement

SETTINGS = {"model": "mlp", "width": 16, "interval": 5, "ood": ["noise"], "reliability": "none", "epochs": 3}


@pytest.mark.parametrize("options", [{}, {"pattern": "block4"}])
@pytest.mark.parametrize("method", [sm.SET, sm.RigL])
def test_counts_are_those_of_masks(options, method):
    model = mlp(**options)
    movement = Movement(model)

    def masks():
        return {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}

    first = last = masks()
    assert all(counts[:2] == [0, 0] and counts[2] == counts[3] for counts in movement.look().values())
    moved = 0
    for _ in range(3):
        train(model, 7, method)
        now = masks()
        for name, (went, came, of_start, present) in movement.look().items():
            assert went == (last[name] & ~now[name]).sum()
            moved += went
            assert came == (now[name] & ~last[name]).sum()
            assert of_start == (now[name] & first[name]).sum()
            assert present == now[name].sum()
        last = now
    assert moved > 0


def test_a_layer_without_weights():
    layer = sm.SparseLinear.from_dense(torch.nn.Linear(4, 4), torch.zeros(4, 4, dtype=torch.bool))
    movement = Movement(torch.nn.Sequential(layer))
    assert movement.look() == {"0": [0, 0, 0, 0]}
    layer.load_state_dict(sm.SparseLinear(4, 4, sparsity=0.5).state_dict())
    assert movement.look() == {"0": [0, 8, 0, 8]}
    layer.load_state_dict(sm.SparseLinear.from_dense(torch.nn.Linear(4, 4), layer.mask() & False).state_dict())
    assert movement.look() == {"0": [8, 0, 0, 0]}


def test_fan_ins():
    model = mlp(pattern="block4")
    for name, counts in fan_ins(model).items():
        assert torch.equal(counts, model.get_submodule(name).mask().sum(1)[::4])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in {"rigl": {}, "static": {"method": "static"}, "dense": {"method": "dense"}}.items():
        sm.train(SETTINGS | settings, out=folder / name, progress=False)
    return folder


def titles(folder):
    return [picture.title for picture in topology_pictures(read_record(folder))]


def test_a_run_records_what_its_report_shows(runs):
    rows = run_folder.read_metrics(runs / "rigl", 3)
    for row in rows:
        went, came, of_start, present = np.array(list(row["moved"].values())).T
        assert (went == came).all() and (of_start <= present).all()
    assert came.sum() == 0 < sum(counts[1] for counts in rows[0]["moved"].values()), "it stops before the end"
    fan_in = files.read_json(runs / "rigl" / run_folder.RESULTS)["sparsity"]["fan_in"]
    assert all(len(shares) == 5 and shares == sorted(shares) and 0 <= shares[0] <= shares[4] <= 1
               for shares in fan_in.values())  # fmt: skip
    assert titles(runs / "rigl") == [
        "Density of every layer", "Fan-in of the channels", "Weights that moved", "Overlap with the first topology",
        "What moved in every layer",
    ]  # fmt: skip
    page = (runs / "rigl" / run_folder.REPORT).read_text()
    assert all(f"<h3>{title}" in page for title in titles(runs / "rigl"))
    assert titles(runs / "static") == ["Density of every layer", "Fan-in of the channels"]
    assert titles(runs / "dense") == []


def test_a_resumed_run_has_moved_as_one_that_was_not_cut_off(runs, tmp_path):
    with killed_after(1):
        sm.train(SETTINGS, out=tmp_path / "run", progress=False)
    sm.train(SETTINGS, out=tmp_path / "run", progress=False, resume=True)
    moved = [[row["moved"] for row in run_folder.read_metrics(f, 3)] for f in (tmp_path / "run", runs / "rigl")]
    assert moved[0] == moved[1]


def test_older_runs_have_fewer_pictures(runs, tmp_path):
    record = read_record(runs / "rigl")
    for row in record.history:
        del row["moved"]
    for key in ("fan_in", "live_outputs"):
        del record.results["sparsity"][key]
    assert [picture.title for picture in topology_pictures(record)] == ["Density of every layer"]
    write_report(tmp_path, record)
    # of a run that was resumed since
    record = read_record(runs / "rigl")
    del record.history[0]["moved"], record.results["sparsity"]["live_outputs"]
    assert len(topology_pictures(record)) == 2 + (sum(map(bool, record.history[1]["moved"].values())) and 3)


@pytest.mark.parametrize("moved", [3, {"fc": 3}, {"fc": [1, 2, 3]}, {"fc": [1, 2, 3, None]}, {"fc": [1, 2, 3, "4"]}])
def test_damaged_records_are_named(runs, tmp_path, moved):
    record = read_record(runs / "rigl")
    for name in (run_folder.CONFIG, run_folder.RESULTS, run_folder.SCORES):
        (tmp_path / name).write_bytes((runs / "rigl" / name).read_bytes())
    run_folder.write_metrics(tmp_path, [*record.history[:2], {**record.history[2], "moved": moved}])
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: line 3/moved"):
        read_record(tmp_path)
    run_folder.write_metrics(tmp_path, record.history)
    results = files.read_json(tmp_path / run_folder.RESULTS)
    results["sparsity"]["fan_in"] = {"fc": [0.1]}
    files.write_json(tmp_path / run_folder.RESULTS, results)
    with pytest.raises(ValueError, match=r"results.json is damaged: sparsity/fan_in/fc should be 5 numbers"):
        read_record(tmp_path)


def test_dead_outputs_stand_below_the_fan_ins():
    svg = plots.fan_in_chart({"a": [0.0, 0.1, 0.2, 0.3, 0.4], "b": [0.1] * 5}, {"a": 0.25, "b": 0.0})
    assert svg.count("25%") == 1 and re.search(r">a</text>", svg)
    assert "layer199" not in plots.fan_in_chart({f"layer{i}": [0.1] * 5 for i in range(200)}, {f"layer{i}": 0.0
                                                for i in range(200)})  # fmt: skip


def test_bars_of_layers_are_as_high_as_their_shares():
    svg = plots.layer_bars({"one": {"a": 1.0, "b": 0.25}, "two": {"a": 0.5, "b": 0.5}}, "Bars")
    heights = []
    for d in re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--c[01]\)', svg):
        ys = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", d)]
        heights.append(max(ys) - min(ys))
    assert np.array(heights)[:4] / heights[0] == pytest.approx([1.0, 0.25, 0.5, 0.5], abs=1e-3)
