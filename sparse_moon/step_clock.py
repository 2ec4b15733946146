"""How long training steps take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

_FIRST = 5  # steps of a process that do not count: they make memory and plans


class StepClock:
    """How long steps take: on a GPU by its events, so that no step waits for it, elsewhere by the host's clock."""

    def __init__(self, device: torch.device, skip: int = _FIRST) -> None:
        self.device, self._skip = device, skip
        self._times: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begin: torch.cuda.Event | float | None = None

    def start(self) -> None:
        """At the beginning of a step."""
        self._begin = self._event() if self.device.type == "cuda" else time.perf_counter()

    def stop(self) -> None:
        """At its end; nothing where none has begun."""
        if isinstance(self._begin, float):
            self._times.append(1e3 * (time.perf_counter() - self._begin))
        elif self._begin is not None:
            self._events.append((self._begin, self._event()))
        self._begin = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        self.start()
        yield
        self.stop()

    def median_ms(self) -> float | None:
        """Of the steps since the last time it was asked, without the first ones of all; None where that is none."""
        for start, end in self._events:
            end.synchronize()
            self._times.append(start.elapsed_time(end))
        counted = self._times[self._skip :]
        self._skip = max(self._skip - len(self._times), 0)
        self._times, self._events = [], []
        return median(counted) if counted else None

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
