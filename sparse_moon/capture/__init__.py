"""Training steps as CUDA graphs: the step, its graph, and what the graph takes for granted."""

from sparse_moon.capture.step import CapturedStep

__all__ = ["CapturedStep"]
