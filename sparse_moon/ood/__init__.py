"""Out-of-distribution (OOD) detection: what a trained network says about an input, and detectors that score it.

A detector reads `Outputs`, what one pass over a data set leaves behind, so one pass serves all detectors. A new one
subclasses `Detector`, has a ``name`` and implements ``score``; if it learns from training data, also ``start``,
``update`` and ``finish``, with the tensors it sets named in ``learned``; if it changes the input, ``perturb``. For
every detector a higher score means in-distribution (ID).

``K`` is the number of classes. A network trained for unknown-awareness (MOON) has ``K + 1`` outputs, the extra
"unknown" one last, with softmax probability ``u``.
"""

from sparse_moon.ood.cosine import CosineHead
from sparse_moon.ood.detector import Detector
from sparse_moon.ood.dice import DICE, choose_p
from sparse_moon.ood.evaluation import Evaluation, evaluate, fit_detectors
from sparse_moon.ood.features import KNN, GeneralizedODIN, GradNorm, Mahalanobis, ViM
from sparse_moon.ood.logits import GEN, KLM, MSP, ODIN, Energy, MaxLogit, TemperatureScaling, Unknown
from sparse_moon.ood.options import check_score, make_detector, parse_score, score_name
from sparse_moon.ood.outputs import Head, Outputs
from sparse_moon.ood.passes import Batches, Perturb, classifier_head, collect
from sparse_moon.ood.registry import DETECTORS, SCORES, detector_class
from sparse_moon.ood.saving import load_detector, save_detector, threshold
from sparse_moon.ood.shaping import ASH, SCALE, ReAct, Shaping

__all__ = [
    "ASH",
    "DETECTORS",
    "DICE",
    "GEN",
    "KLM",
    "KNN",
    "MSP",
    "ODIN",
    "SCALE",
    "SCORES",
    "Batches",
    "CosineHead",
    "Detector",
    "Energy",
    "Evaluation",
    "GeneralizedODIN",
    "GradNorm",
    "Head",
    "Mahalanobis",
    "MaxLogit",
    "Outputs",
    "Perturb",
    "ReAct",
    "Shaping",
    "TemperatureScaling",
    "Unknown",
    "ViM",
    "check_score",
    "choose_p",
    "classifier_head",
    "collect",
    "detector_class",
    "evaluate",
    "fit_detectors",
    "load_detector",
    "make_detector",
    "parse_score",
    "save_detector",
    "score_name",
    "threshold",
]
