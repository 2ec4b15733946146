"""A CUDA graph of a function: how it is rehearsed, captured and replayed."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...] | None

# Of torch's warnings: what is looked for, and that looking is new.
_SYNCHRONIZES, _OF_THE_LOOK = "synchronizing CUDA operation", "Synchronization debug mode"


class StepGraph:
    """A CUDA graph of a step, and the stream on which the step is rehearsed and captured.

    Steps that are not replayed run on that stream, too: autograd keeps the stream on which it met a parameter first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why there can be none on this device, or None."""
        return None if device.type == "cuda" else f"the model is on {device}, and only a GPU has graphs"

    def run(self, step: Callable[[], Outputs]) -> Outputs:
        """An eager step."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = step()
        current.wait_stream(self.stream)
        return outputs

    def rehearse(self, step: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
        """An eager step, and what of it waits for the device, which no graph can."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                torch.cuda.set_sync_debug_mode("warn")
                outputs = self.run(step)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = None
        for warning in caught:
            if _SYNCHRONIZES in str(warning.message):
                waits = f"it waits for the device ({warning.filename}, line {warning.lineno})"
            elif _OF_THE_LOOK not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return outputs, waits

    def capture(self, step: Callable[[], Outputs]) -> Outputs:
        """Record a step, which does not run; its outputs are what :meth:`replay` writes."""
        self.graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # other threads may go on, such as those that pin the memory of the next batches
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                return step()
        finally:
            torch.cuda.set_stream(current)  # which torch leaves where it is, if CUDA has given the capture up

    def forget(self) -> None:
        """Free what was recorded, and its memory."""
        self.graph = torch.cuda.CUDAGraph()

    def replay(self) -> None:
        """Run what was recorded, on the current stream."""
        self.graph.replay()
