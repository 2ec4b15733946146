"""A run's figures as a table in plain text."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sparse_moon.app.config import TrainConfig
from sparse_moon.app.ood_groups import by_group
from sparse_moon.nn.plan import some
from sparse_moon.text_table import text_table

_COLUMNS = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out", "oscr": "OSCR"}


def format_results(results: Mapping[str, Any], config: TrainConfig, *, whole: bool = False) -> str:
    """ID and OOD figures of ``results.json``, or the part of it that an evaluation gives.

    Args:
        whole: all scores. By default the headline's, which is fixed before the test sets are seen, and the name of the
            score that happens to be the best on them.
    """
    figures = results["id"]
    bins = f"{config.ece_bins} bins, " * (config.ece_bins != TrainConfig.ece_bins)
    over_all = ", over K + 1 {ece_all_outputs:.4f}" * ("ece_all_outputs" in figures)
    lines = [
        f"in distribution   accuracy {{accuracy:.4f}}   ECE {{ece:.4f}} ({bins}classwise {{classwise_ece:.4f}}, "
        f"adaptive {{adaptive_ece:.4f}}{over_all})   NLL {{nll:.4f}}   Brier {{brier:.4f}}   "
        "AURC {aurc:.4f}".format(**figures)
    ]
    if "calibration" in results:
        lines.append(
            "temperature       {temperature:.3f} from held-out images: ECE {ece_before:.4f} -> {ece_after:.4f}   "
            "NLL {nll_before:.4f} -> {nll_after:.4f}".format(**results["calibration"])
        )
    if "sparsity" in results:
        memory, counts = results["memory"], results["flops"]
        lines.append(
            f"network           sparsity {results['sparsity']['actual']:.4f}   "
            f"forward FLOPs {counts['forward_sparse'] / counts['forward_dense']:.3f} x dense   "
            f"training FLOPs {counts['train_ratio']:.3f} x dense   "
            f"training memory {memory['ratio']:.3f} x dense   time {results['time_s']:.1f} s"
        )
    if "steps" in results:
        lines += _steps(results["steps"])
    return "\n".join([*lines, "", *_out_of_distribution(results["ood"], config, whole)])


def _steps(steps: Mapping[str, Any]) -> list[str]:
    """How long training steps took, and what ran in them."""
    said = [] if math.isnan(steps["median_ms"]) else [f"{steps['median_ms']:.2f} ms (median, without loading data)"]
    said += [kernels_line(steps["kernels"])] if steps["kernels"] else []
    lines = [f"training step     {'   '.join(said)}"] if said else []
    if dense := steps.get("beside_dense"):
        lines.append(
            f"made dense        {dense['dense_ms']:.2f} ms ({dense['dense_layout']})   sparse in turn with it "
            f"{dense['sparse_ms']:.2f} ms, {dense['dense_ms'] / dense['sparse_ms']:.2f} times as fast"
        )
    return lines


def kernels_line(kernels: Mapping[str, Mapping[str, str]]) -> str:
    """How many sparse layers ran on sparse kernels, of what :func:`sparse_moon.what_runs` returns, and which did not.

    Names are left out where all layers ran dense.
    """
    ran = {name: set(passes.values()) for name, passes in kernels.items()}
    dense = [name for name, backends in ran.items() if "kernel" not in backends]
    part = [name for name, backends in ran.items() if len(backends) > 1]
    line = f"{len(ran) - len(dense) - len(part)} of {len(ran)} sparse layers ran sparse kernels"
    if len(dense) == len(ran):
        return line
    return line + f", {len(part)} in part: {some(part)}" * bool(part) + f"; dense: {some(dense)}" * bool(dense)


def kernel_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of each sparse layer its name, sparsity, and what ran forward and for the gradients of input and weight."""
    rows: list[tuple[str, ...]] = [("layer", "sparsity", "forward", "input gradient", "weight gradient")]
    for name, ran in results["steps"]["kernels"].items():
        gradients = (ran.get(pass_, ran.get("grads", "not needed")) for pass_ in ("input_grad", "values_grad"))
        rows.append((name, f"{results['sparsity']['layers'][name]:.4f}", ran["forward"], *gradients))
    return rows


def format_kernels(results: Mapping[str, Any]) -> str:
    """:func:`kernel_rows` in plain text."""
    return text_table(kernel_rows(results), "lrlll")


def _out_of_distribution(ood: Mapping[str, Any], config: TrainConfig, whole: bool) -> list[str]:
    scores = list(dict.fromkeys(score for by_score in ood.values() for score in by_score))
    if not scores:
        return ["out of distribution: no sets, or no scores"]
    shown = scores if whole or config.headline not in scores else [config.headline]
    rows = [("", "set", "score", *_COLUMNS.values())]
    for group, names in by_group(config.dataset, ood).items():
        for score in shown:
            members = [(name, ood[name][score]) for name in names if score in ood[name]]
            if len(members) > 1:
                members.append(("mean", _mean([metrics for _, metrics in members])))
            for name, metrics in members:
                rows.append((group, name, score, *(f"{100 * metrics[key]:.2f}" for key in _COLUMNS)))
    lines = [
        "out of distribution, in %: AUROC; FPR95 = share of OOD taken for ID where 95 % of ID is kept; AUPR-in (ID",
        "positive), AUPR-out (OOD positive); OSCR (ID classified correctly)",
        "",
        text_table(rows, "lll" + "r" * len(_COLUMNS)),
    ]
    if len(shown) < len(scores):
        lines += ["", *_best(ood, config.headline)]
    return lines


def _best(ood: Mapping[str, Any], headline: str) -> list[str]:
    """What was found with the score that is the best afterwards, of those that all sets have."""
    common = [score for score in next(iter(ood.values())) if all(score in by_score for by_score in ood.values())]
    if headline not in common:
        return []
    means = {score: _mean([by_score[score] for by_score in ood.values()]) for score in common}
    best = max(common, key=lambda score: means[score]["auroc"])
    return [
        f"{headline} is the headline, fixed before these sets were seen (--headline); on them the best of "
        f"{len(common)} scores is {best}:",
        *(
            f"{score}: mean AUROC {100 * means[score]['auroc']:.2f}, FPR95 {100 * means[score]['fpr95']:.2f}"
            for score in dict.fromkeys((headline, best))
        ),
        f"scores: {', '.join(common)}",
    ]


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: fmean(one[key] for one in metrics) for key in _COLUMNS}
