"""Comparisons over any setting: names, tables by axis, published figures and paired differences."""

import json
import statistics
from dataclasses import replace
from importlib.resources import files as resources

import pytest
import yaml
from scipy import stats

from small_runs import CONFIG, write_run
from sparse_moon import files
from sparse_moon.app import comparison, run_folder
from sparse_moon.app.cli import main, presets
from sparse_moon.app.comparison_text import format_markdown
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import scores_for
from sparse_moon.app.experiment import experiment, run_key, run_name, unlike_name, varying_settings
from sparse_moon.app.published import published_figures
from sparse_moon.app.sweep import parse_sweeps

QUICK = [
    "--model", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "256", "--interval", "2", "--ood", "noise",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.* never updates the topology:UserWarning")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def results(folder):
    """Of each run in a folder, what its results hold."""
    return {path.parent.name: path.read_bytes() for path in folder.glob(f"*/{run_folder.RESULTS}")}


def test_commands_that_differ_in_any_option_fill_one_folder(tmp_path, capsys):
    """Each adds its own runs and no other's, and the same one again trains nothing."""
    out = tmp_path / "all"
    base = ["compare", *QUICK, "--out", str(out), "--reliability", "none", "moon", "--jobs", "2", "--quiet"]
    commands = [
        (base, {"rigl-none-0.9-seed0", "rigl-moon-0.9-seed0"}),
        # none has no final weight: its run is there
        ([*base, "--sweep", "final_weight=0.5,2"],
         {f"rigl-moon-0.9-final_weight={w}-seed0" for w in (0.5, 2)}),
        ([*base, "--final-weight", "0.5", "--lr", "0.05"],
         {"rigl-none-0.9-lr=0.05-seed0", "rigl-moon-0.9-final_weight=0.5-lr=0.05-seed0"}),
        (["compare", *QUICK, "--out", str(out), "--reliability", "none", "--quiet", "--sweep", "pattern=block8",
          "--sweep", "exclude=[fc],[]"], None),
    ]  # fmt: skip
    seen = set()
    for command, new in commands:
        main(command)
        assert new is None or results(out).keys() - seen == new
        assert len(results(out)) == len(seen) + 2
        seen = results(out).keys()
    before = results(out)
    for command, _ in commands:
        main([word for word in command if word != "--quiet"])
        assert "accuracy 0" not in capsys.readouterr().out.partition("# Comparison")[0]
    assert results(out) == before
    rows = files.read_json(out / comparison.TABLE)["rows"]
    assert len(rows) == len(before) == len({row["label"] for row in rows}) == 8
    settings = [files.read_json(out / name / run_folder.CONFIG) for name in before]
    assert len({run_key(one) for one in settings}) == 8

    # other OOD sets are no other run, but a finished one is evaluated on them
    main([*base, "--ood", "noise", "letters"])
    after = results(out)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"rigl-none-0.9-seed0", "rigl-moon-0.9-seed0"}
    for name in changed:
        old, new = json.loads(before[name])["ood"], json.loads(after[name])["ood"]
        assert new.keys() == {"noise", "letters"} and new["noise"] == old["noise"]
    assert "These rows have other OOD sets" in (out / comparison.MARKDOWN).read_text()

    # nor are other scores
    main([*base, "--ood", "noise", "letters", "--score", "msp", "dice:p=0.5"])
    changed = {name for name, text in results(out).items() if after[name] != text}
    assert changed == {"rigl-none-0.9-seed0", "rigl-moon-0.9-seed0"}
    for name in changed:
        old, new = json.loads(after[name])["ood"], json.loads(results(out)[name])["ood"]
        assert all(new[ood].keys() - old[ood].keys() == {"dice:p=0.5"} for ood in new)
        assert all(new[ood]["msp"] == old[ood]["msp"] for ood in new)


def test_a_folder_in_the_way_is_left_alone_and_a_run_is_found_by_its_settings(tmp_path, capsys):
    other = tmp_path / "rigl-none-0.9-seed0"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    command = ["compare", *QUICK, "--out", str(tmp_path), "--reliability", "none", "--quiet"]
    main(command)
    (name,) = results(tmp_path)
    assert name.startswith("rigl-none-0.9-seed0-") and [path.name for path in other.iterdir()] == ["notes.txt"]
    (tmp_path / name).rename(tmp_path / "called otherwise")
    main(command)
    assert results(tmp_path).keys() == {"called otherwise"} and not list(tmp_path.glob(".*"))
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "called otherwise").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="hold the same run: remove one of them"):
        comparison.write_table(tmp_path)


OTHER = {
    "dataset": "mnist", "image_size": 16, "model": "mlp", "width": 8, "method": "set", "reliability": "dac",
    "without": ("voting",), "sparsity": 0.5, "pattern": "block8", "allocation": "er", "exclude": ("fc",), "fuse": False,
    "selection": "magnitude",
    "epochs": 30, "batch_size": 32, "lr": 0.1, "lr_end": 0.01, "lr_until": 0.5, "momentum": 0.8, "weight_decay": 0.0,
    "interval": 10, "drop_fraction": 0.2, "stop": 0.6, "amp": "bfloat16", "seed": 1, "holdout": 0.1,
    "final_weight": 3.0, "warmup_epochs": 2, "vote_from": 0.9, "ece_bins": 10, "diagnostics": True,
    "resize": 20, "crops": "resized", "weights": "network.pt", "lr_milestones": (0.5, 0.75), "lr_gamma": 0.2,
    "lr_warmup": 0.1,
}  # fmt: skip


def test_any_setting_that_differs_makes_another_run():
    config = TrainConfig()
    tried = {*OTHER, "recompute"}  # which the CPU's kernels must be there for
    assert experiment(config.to_dict()).keys() == tried - {"seed"}
    known = {run_key(config.to_dict()), run_name(config)}
    for name, value in OTHER.items():
        needed = {"lr_milestones": (0.4,)} if name in ("lr_warmup", "lr_gamma") else {}
        other = replace(config, **needed, **{name: value})
        assert run_key(other.to_dict()) not in known, name
        known.add(run_key(other.to_dict()))
        varying = varying_settings([experiment(config.to_dict()), experiment(other.to_dict())])
        assert run_name(other, varying) != run_name(config, varying), name
        assert unlike_name(other) != unlike_name(config)
    for name, value in {"device": "cpu:0", "data_root": "x", "download": True, "workers": 2, "ood": ["noise"]}.items():
        assert run_key(replace(config, **{name: value}).to_dict()) == run_key(config.to_dict())


def test_settings_that_a_run_does_not_have_make_no_difference():
    none = TrainConfig(reliability="none")
    assert run_key(replace(none, final_weight=2.0, keep=0.5).to_dict()) == run_key(none.to_dict())
    dense = replace(none, method="dense", sparsity=0.0)
    assert run_key(replace(dense, pattern="block8", sparsity=0.5).to_dict()) == run_key(dense.to_dict())
    moon = TrainConfig(reliability="moon", without=("loss",))
    assert run_key(replace(moon, final_weight=2.0, warmup_epochs=1).to_dict()) == run_key(moon.to_dict())
    assert run_key(replace(moon, vote_from=0.9).to_dict()) != run_key(moon.to_dict())
    for method in ("dense", "static"):
        fixed = replace(none, method=method)
        assert run_key(replace(fixed, interval=9, drop_fraction=0.1).to_dict()) == run_key(fixed.to_dict())
    gmp = replace(none, method="gmp")
    assert run_key(replace(gmp, drop_fraction=0.1).to_dict()) == run_key(gmp.to_dict())
    assert run_key(replace(gmp, interval=9).to_dict()) != run_key(gmp.to_dict())
    for name, part, option in (
        ("moon", "tuning", {"warmup_epochs": 1}),
        ("cigl", "averaging", {"rescale": True}),
        ("cigl", "mask", {"rescale": True}),
    ):
        one = TrainConfig(reliability=name, without=(part,))
        assert run_key(replace(one, **option).to_dict()) == run_key(one.to_dict())
        assert run_key(replace(one, **option, without=()).to_dict()) != run_key(replace(one, without=()).to_dict())
    two = replace(moon, without=("loss", "voting"))
    assert run_key(replace(two, without=("voting", "loss")).to_dict()) == run_key(two.to_dict())
    older = {key: value for key, value in none.to_dict().items() if key != "holdout"}
    assert run_key(older) == run_key(none.to_dict()) == run_key({**older, "lr_until": 0.8, "seed": 0})
    assert run_key({**older, "interval": 50.0}) == run_key(older)
    assert run_key({**older, "method": "of_another.module.Method"}) != run_key(older)


def test_values_of_a_sweep_have_the_types_of_their_options():
    assert parse_sweeps(["final-weight=0.1,1,null", "exclude=[fc,conv1],[]", "fuse=true,false"], {}) == {
        "final_weight": [0.1, 1.0, None], "exclude": [("fc", "conv1"), ()], "fuse": [True, False],
    }  # fmt: skip
    assert parse_sweeps(["model=mlp,my_package.nets.net", "lr=1e-3"], {}) == {
        "model": ["mlp", "my_package.nets.net"], "lr": [0.001],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("final_wieght=1,2", "--sweep final_wieght: train has no such option; did you mean --final-weight?"),
        ("xyzzy=1", "--sweep xyzzy: train has no such option, see sparse-moon train --help"),
        ("lr=0.1,fast", "--sweep: --lr must be a number, got fast"),
        ("epochs=1.5", "--sweep: --epochs must be an integer, got 1.5"),
        ("model=mlp,resnet19", "--model must be one of mlp, "),
        ("model=mlp,resnet19", "got resnet19; did you mean resnet18?"),
        ("fuse=maybe", "--fuse must be true or false, got maybe"),
        ("keep=0.5,2", "--keep must be in (0, 1], got 2.0"),
        ("lr", "--sweep must be NAME=VALUE,VALUE, got 'lr'"),
        ("lr=", "--sweep lr: expected values, got none"),
        ("lr=0.1,0.10", "--sweep lr: 0.1 stands there twice"),
        ("sparsity=0.9,0.95", "--sweep sparsity: give its values to --sparsity"),
        ("without=loss", "--sweep without: give its values to --reliability (moon:-tuning)"),
        ("device=cpu,cuda", "--sweep device: runs that differ in device alone are the same experiment"),
        ("lr=0.1 --sweep lr=0.2", "--sweep lr: give all its values at once, as in lr=1,2"),
        ("out=a,b", "--sweep out: train has no such option"),
    ],
)  # fmt: skip
def test_mistakes_in_a_sweep_are_said_before_anything_runs(tmp_path, capsys, sweep, message):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *QUICK, "--out", str(tmp_path / "out"), "--sweep", *sweep.split()])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tables_by_axis(tmp_path):
    moon = replace(CONFIG, reliability="moon", sparsity=0.95)
    for i, weight in enumerate((10.0, 0.5, 2.0)):
        one = replace(moon, final_weight=weight)
        write_run(tmp_path, one, accuracy=0.8 + i / 100, near=0.7, far=(0.8, 1.0), seconds=[1.0], name=f"run{i}")
    write_run(tmp_path, replace(CONFIG, sparsity=0.95), accuracy=0.6, near=0.7, far=(0.8, 1.0), seconds=[1.0])
    write_run(tmp_path, CONFIG, accuracy=0.7, near=0.7, far=(0.8, 1.0), seconds=[1.0])
    table = comparison.write_table(tmp_path)
    assert table["axes"] == {"sparsity": [0.9, 0.95], "final_weight": [0.5, 2, 10]}
    assert [row["label"] for row in table["rows"]] == [
        "rigl none 0.9", "rigl moon 0.95 final_weight=0.5", "rigl moon 0.95 final_weight=2",
        "rigl moon 0.95 final_weight=10", "rigl none 0.95",
    ]  # fmt: skip
    text = (tmp_path / comparison.MARKDOWN).read_text()
    assert text == format_markdown(files.read_json(tmp_path / comparison.TABLE))
    by_weight = "## accuracy % by final_weight\n\n| final_weight | 0.5 | 2 | 10 |\n| --- | --- | --- | --- |\n"
    assert f"{by_weight}| rigl moon 0.95 | 81.00 | 82.00 | 80.00 |\n" in text
    by_sparsity = "## accuracy % by sparsity\n\n| sparsity | 0.9 | 0.95 |\n| --- | --- | --- |\n"
    assert f"{by_sparsity}| rigl none | 70.00 | 60.00 |\n\n" in text
    # one row holds the time of its kin: the run without a reliability method, whose final weight is nobody's
    assert table["rows"][1]["figures"]["relative_epoch_time"]["mean"] == 1.0


def test_a_table_names_the_groups_of_each_data_set(tmp_path):
    for dataset in ("digits", "d.npz"):
        config = replace(CONFIG, dataset=dataset)
        write_run(tmp_path, config, accuracy=0.8, near=0.7, far=(0.8, 1.0), seconds=[1.0], name=dataset)
    table = comparison.write_table(tmp_path)
    assert table["groups"] == {
        "d.npz": {"near": [], "far": [], "ungrouped": ["noise", "photos", "letters"]},
        "digits": {"near": ["letters"], "far": ["noise", "photos"], "ungrouped": []},
    }
    text = "OOD sets of d.npz, near: none; far: none; ungrouped: noise, photos, letters. OOD sets of digits, near: lett"
    assert f"\n{text}ers; far: noise, photos; ungrouped: none. AUROC and" in format_markdown(table)

    same = replace(CONFIG, dataset="other/digits.npz")
    files.write_json(tmp_path / "d.npz" / run_folder.CONFIG, same.to_dict())
    text = "OOD sets, near: letters; far: noise, photos; ungrouped: none. AUROC and"
    assert f"\n{text}" in format_markdown(comparison.write_table(tmp_path))


def test_paired_differences_by_hand(tmp_path):
    moon = replace(CONFIG, reliability="moon")
    accuracy = {"none": [0.90, 0.80, 0.70, 0.5], "moon": [0.92, 0.81, 0.75], "moon:-voting": [0.5]}
    for label, config in (("none", CONFIG), ("moon", moon), ("moon:-voting", replace(moon, without=("voting",)))):
        for seed, value in enumerate(accuracy[label]):
            near = 0.7 + 0.01 * (seed == 2 and label == "moon")
            one = replace(config, seed=seed)
            write_run(tmp_path, one, accuracy=value, near=near, far=(0.5, 0.5), seconds=[1.0])
    table = comparison.write_table(tmp_path)
    (pair,) = table["paired"]  # of one seed there is no interval
    assert (pair["axis"], pair["label"], pair["other"]) == ("reliability", "rigl moon 0.9", "rigl none 0.9")
    assert pair["seeds"] == [0, 1, 2]
    differences = [0.02, 0.01, 0.05]
    expected = stats.t.interval(0.95, 2, statistics.mean(differences), stats.sem(differences))
    figure = pair["figures"]["accuracy"]
    assert figure == {key: pytest.approx(value) for key, value in zip(
        ("mean", "low", "high"), (statistics.mean(differences), *expected), strict=True)}  # fmt: skip
    assert figure["high"] - figure["mean"] == pytest.approx(4.302653 * statistics.stdev(differences) / 3**0.5)
    assert pair["figures"]["auroc/far/msp"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "training_flops" not in pair["figures"]
    text = (tmp_path / comparison.MARKDOWN).read_text()
    assert "| reliability | rigl moon 0.9 | rigl none 0.9 | 3 | +2.67 [-2.50, +7.84] |" in text


def test_pairs_differ_on_one_axis_and_compare_the_same_ood_sets(tmp_path):
    configs = [
        replace(CONFIG, method=method, reliability=name, **options, seed=seed)
        for method in ("rigl", "set")
        for name, options in (("none", {}), ("moon", {"final_weight": 0.5}), ("moon", {"final_weight": 2.0}))
        for seed in (0, 1)
    ]
    for i, config in enumerate(configs):
        write_run(tmp_path, config, accuracy=0.5, near=0.7, far=(0.4, 0.8), seconds=[1.0], name=str(i))
    path = tmp_path / "0" / run_folder.RESULTS
    content = files.read_json(path)
    del content["ood"]["photos"]  # the easier of two
    files.write_json(path, content)
    pairs = comparison.write_table(tmp_path)["paired"]
    found = {(pair["axis"], pair["label"], pair["other"]) for pair in pairs}
    weights = [f"final_weight={w}" for w in (0.5, 2)]
    assert found == {
        *(("reliability", f"{m} moon 0.9 {w}", f"{m} none 0.9") for m in ("rigl", "set") for w in weights),
        *(("final_weight", f"{m} moon 0.9 {weights[1]}", f"{m} moon 0.9 {weights[0]}") for m in ("rigl", "set")),
        ("method", "set none 0.9", "rigl none 0.9"),
        *(("method", f"set moon 0.9 {w}", f"rigl moon 0.9 {w}") for w in weights),
    }
    assert all(pair["figures"]["auroc/far/msp"]["mean"] == pytest.approx(0.0) for pair in pairs)


def test_rows_that_an_axis_does_not_concern_are_paired_with_all_its_values(tmp_path):
    moon = [replace(CONFIG, reliability="moon", final_weight=w) for w in (0.5, 2.0)]
    sparse = [replace(CONFIG, sparsity=s) for s in (0.8, 0.95)]
    others = [replace(moon[0], without=("loss",)), replace(CONFIG, method="dense", sparsity=0.0)]
    for i, config in enumerate([CONFIG, *moon, *sparse, *others]):
        for seed in (0, 1):
            one, name = replace(config, seed=seed), f"{i}-{seed}"
            write_run(tmp_path, one, accuracy=0.5, near=0.7, far=(0.4, 0.8), seconds=[1.0], name=name)
    pairs = comparison.write_table(tmp_path)["paired"]
    found = {(pair["label"], pair["other"]) for pair in pairs if pair["axis"] in ("method", "reliability")}
    whole = [f"rigl moon 0.9 final_weight={w}" for w in (0.5, 2)]
    assert found == {
        *(("dense none", f"rigl none {s:g}") for s in (0.8, 0.9, 0.95)),
        *((label, "rigl none 0.9") for label in (*whole, "rigl moon:-loss 0.9")),
        *(("rigl moon:-loss 0.9", label) for label in whole),
    }


def test_published_figures_stand_beside_measured_ones(tmp_path):
    config = TrainConfig.from_dict(yaml.safe_load(presets()["moon-cifar10"].read_text()))
    assert config.sparsity == 0.95
    cifar = {"near_set": "cifar100"}
    for seed in (0, 1):
        one = replace(config, seed=seed, epochs=20)
        write_run(tmp_path, one, accuracy=0.9, near=0.88, far=(0.9, 0.9), seconds=[1.0], **cifar)
    half = replace(config, final_weight=0.5)
    write_run(tmp_path, half, accuracy=0.9, near=0.87, far=(0.9, 0.9), seconds=[1.0], **cifar, name="half")
    other = replace(config, final_weight=0.7)
    write_run(tmp_path, other, accuracy=0.9, near=0.87, far=(0.9, 0.9), seconds=[1.0], **cifar, name="other")
    rows = {row["label"]: row for row in comparison.write_table(tmp_path)["rows"]}
    label = "rigl moon 0.95 final_weight={} epochs={}"
    values = {one["figure"]: one for one in rows[label.format(1, 20)]["published"]}
    assert values["auroc/near/msp"]["value"] == 0.8871 and "auroc/far/knn" in values
    assert values["auroc/near/msp"]["other"][0] == "epochs 20 (paper 100)"
    (ablation,) = rows[label.format(0.5, 100)]["published"]
    assert ablation["value"] == 0.8666 and ablation["source"] == "MOON (arXiv 2403.20047), Table 12"
    assert rows[label.format(0.7, 100)]["published"] == []
    text = (tmp_path / comparison.MARKDOWN).read_text()
    assert "| run | figure | published | measured | source | settings that differ from the paper's preset |" in text
    source = "| MOON (arXiv 2403.20047) | epochs 20 (paper 100)"
    for group, published, measured in (("near", "88.71", "88.00 ± 0.00"), ("far", "91.62", "90.00 ± 0.00")):
        assert f"AUROC % {group}, msp | {published} | {measured} {source}" in text
    assert "AUROC % near, knn" not in text  # was not measured
    assert "printed as 87.66, but its columns average 86.66" in text


def _printed():
    """Paper, table, preset, what differs from it, and the numbers, apart from where the package has them."""
    moon, by_group = "MOON (arXiv 2403.20047)", ("auroc/near/msp", "auroc/far/msp")
    for sparsity, rigl, ours, knn in [
        (0.8, (0.8817, 0.9088), (0.9053, 0.9286), (0.9114, 0.9396)),
        (0.9, (0.8845, 0.9003), (0.8963, 0.9237), (0.9036, 0.9343)),
        (0.95, (0.8667, 0.8819), (0.8871, 0.9162), (0.8935, 0.9301)),
        (0.99, (0.8184, 0.8449), (0.8443, 0.8770), (0.8388, 0.9111)),
    ]:
        figures = dict(zip((*by_group, "auroc/near/knn", "auroc/far/knn"), (*ours, *knn), strict=True))
        yield moon, None, "moon-cifar10", {"sparsity": sparsity}, figures
        changes = {"reliability": "none", "sparsity": sparsity}
        yield moon, None, "moon-cifar10", changes, dict(zip(by_group, rigl, strict=True))
    at_95 = {"sparsity": 0.95}
    changes = {"method": "set", **at_95}
    yield moon, 4, "moon-cifar10", {**changes, "reliability": "none"}, {"ece": 0.035, "accuracy": 0.9256}
    yield moon, 4, "moon-cifar10", changes, {"ece": 0.020, "accuracy": 0.9359}
    for table, name, values in [
        (12, "final_weight", {0.1: 0.8441, 0.5: 0.8666, 2: 0.8711, 4: 0.8531}),
        (None, "warmup_epochs", {1: 0.8517, 2: 0.8533, 3: 0.8581}),
        (None, "vote_from", {0.98: 0.8477, 0.95: 0.8532, 0.9: 0.8584}),
    ]:
        for value, near in values.items():
            yield moon, table, "moon-cifar10", {**at_95, name: value}, {"auroc/near/msp": near}
    yield moon, 10, "moon-mnist", {"reliability": "none"}, dict(zip(by_group, (0.9145, 0.9851), strict=True))
    yield moon, 10, "moon-mnist", {}, dict(zip(by_group, (0.9731, 0.9905), strict=True))
    for sparsity, rigl, ours in [(0.8, 0.0423, 0.0356), (0.9, 0.0441, 0.0361), (0.95, 0.0504, 0.0385),
                                 (0.99, 0.0571, 0.0298)]:  # fmt: skip
        changes = {"reliability": "none", "sparsity": sparsity}
        yield "CigL (ICLR 2023)", None, "cigl-cifar10", changes, {"ece": rigl}
        yield "CigL (ICLR 2023)", None, "cigl-cifar10", {"sparsity": sparsity}, {"ece": ours}
    for preset, energy, dice in [("dice-cifar10", 0.2655, 0.2083), ("dice-cifar100", 0.6845, 0.4972)]:
        yield "DICE (arXiv 2111.09805)", None, preset, {}, {"fpr95/far/energy": energy, "fpr95/far/dice": dice}


def test_published_figures_are_those_of_the_papers():
    content = yaml.safe_load((resources("sparse_moon.app") / "published.yaml").read_text(encoding="utf-8"))
    ours = [
        (group["paper"], group["table"], group["preset"], row["changes"], row["figures"])
        for group in content
        for row in group["rows"]
    ]

    def by_text(rows):
        return sorted(json.dumps(row, sort_keys=True) for row in rows)

    assert by_text(ours) == by_text(_printed())


def test_published_figures_fit_presets_and_are_shares():
    content = yaml.safe_load((resources("sparse_moon.app") / "published.yaml").read_text(encoding="utf-8"))
    found = 0
    for group in content:
        preset = yaml.safe_load(presets()[group["preset"]].read_text())
        for row in group["rows"]:
            config = TrainConfig.from_dict({**preset, **row["changes"]})
            ood = [spec.partition("=")[0] for spec in config.ood or ()]
            ours = [one for one in published_figures(experiment(config.to_dict()), ood) if not one["other"]]
            assert {(one["figure"], one["value"]) for one in ours} == set(row["figures"].items())
            assert all(0 < value < 1 for value in row["figures"].values())
            scores = {name.rpartition("/")[2] for name in row["figures"] if "/" in name}
            assert scores <= set(scores_for(config))  # in the text that tables have them under
            found += len(ours)
    assert found > 40
