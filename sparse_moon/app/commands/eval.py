"""``sparse-moon eval``."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from sparse_moon.app.commands import check_own
from sparse_moon.app.evaluate import FinishedRun, evaluate_model, fit_detector, load_run
from sparse_moon.app.parsers import Namespace
from sparse_moon.app.run_data import load_ood_sets
from sparse_moon.app.tables import format_results
from sparse_moon.ood import save_detector


def run(arguments: Namespace) -> None:
    """Evaluate a finished run, and print its figures or write a detector as well."""
    finished = load_run(Path(arguments.run), device=arguments.device, data_root=arguments.data_root)
    check_own(vars(arguments), finished.config)
    if arguments.save_detector is not None:
        if len(arguments.score or ()) != 1:
            raise ValueError(f"--save-detector needs one --score, got {arguments.score or 'none'}")
        _save_detector(finished, arguments.score[0], arguments.tpr, Path(arguments.save_detector))
    asked = {"ood": arguments.ood, "ece_bins": arguments.ece_bins}
    given = {name: value for name, value in asked.items() if value is not None}
    config = replace(finished.config, score=None, **given)
    sets = load_ood_sets(config, finished.dataset)
    figures, _ = evaluate_model(finished.predictor, config, finished.dataset, sets, arguments.score)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    print(format_results(figures, config, whole=arguments.score is not None))
    if arguments.score is None:
        print("\nall scores: --json, or those of --score")


def _save_detector(finished: FinishedRun, score: str, tpr: float, target: Path) -> None:
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist")
    detector = fit_detector(score, finished.predictor, finished.config, finished.dataset, tpr)
    save_detector(target, detector)
    images = "ID test images" if finished.dataset.holdout is None else "ID images held out of training"
    print(
        f"wrote {target}: {score} with threshold {detector.threshold:.6g}, which {tpr:g} of the {images} reach",
        file=sys.stderr,
    )
