"""Dynamic sparse training: when and how the topology changes, and what happens to the optimizer state then.

method = RigL(model, optimizer, total_steps=len(loader) * epochs)
for images, labels in loader:
    criterion(model(images), labels).backward()
    method.step()  # the optimizer's step, or on an update batch the topology update in its place or after it
    optimizer.zero_grad()
"""

from sparse_moon.algorithms.dynamic import DynamicMethod
from sparse_moon.algorithms.method import ALGORITHMS, Dense, Method, Static
from sparse_moon.algorithms.pruning import GMP, GraNet
from sparse_moon.algorithms.regrowth import MEST, SET, RigL
from sparse_moon.algorithms.run import TrainingFlops, TrainingRun
from sparse_moon.algorithms.srigl import SRigL
from sparse_moon.algorithms.top_kast import TopKAST

__all__ = [
    "ALGORITHMS",
    "GMP",
    "MEST",
    "SET",
    "Dense",
    "DynamicMethod",
    "GraNet",
    "Method",
    "RigL",
    "SRigL",
    "Static",
    "TopKAST",
    "TrainingFlops",
    "TrainingRun",
]
