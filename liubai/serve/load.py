"""How busy a host is: what it tells of itself, rates over the last seconds, and why it writes no answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: Rates are over so many seconds.
WINDOW = 10

State = Literal["new", "loading", "ready", "down", "stopped"]


class Unavailable(Exception):
    """No answer now; ``retry_after_s`` says when there may be one."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Busy(Unavailable):
    """Too many are waiting already."""


class HostDied(Unavailable):
    """The model's process is gone, and with it the answers that it was writing."""


@dataclass(frozen=True, slots=True)
class Figures:
    """For /health and /metrics. ``in_use`` slots and ``waiting`` requests are the process's own, as it last
    told; ``open`` are the answers that somebody waits for; ``trouble`` is why it is not ready. Totals outlive
    the process."""

    state: State
    slots: int
    in_use: int
    waiting: int
    open: int
    tokens_per_s: float
    answers_per_s: float
    tokens: int
    answers: int
    cancelled: int
    refused: int
    restarts: int
    load_s: float
    trouble: str | None


class Moving:
    """Events a second over the last ``WINDOW`` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.born = clock, clock()
        self._seconds: deque[list[float]] = deque()  # [second, events]

    def add(self, events: float) -> None:
        second = float(int(self.clock()))
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0.0])
        self._seconds[-1][1] += events
        self._forget()

    def per_second(self) -> float:
        self._forget()
        lived = max(1.0, min(WINDOW, self.clock() - self.born))
        return sum(events for _, events in self._seconds) / lived

    def _forget(self) -> None:
        while self._seconds and self._seconds[0][0] <= self.clock() - WINDOW:
            self._seconds.popleft()
