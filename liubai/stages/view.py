"""What a person sees while stages run: plain lines in a log, a live picture in a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

#: Metrics worth a place in a line, in this order, with how to print them. The rest is in metrics.jsonl.
SHOWN = {
    "accuracy": "{:.3f}",
    "eval/pass@1": "{:.3f}",
    "pass@1": "{:.3f}",
    "loss": "{:.4f}",
    "length/mean": "{:.1f}",
    "reflections": "{:.2f}",
    "format": "{:.2f}",
    "entropy": "{:.3f}",
    "tokens/s": "{:,.0f}",
}
#: Metrics whose course is drawn.
DRAWN = ("accuracy", "length/mean", "reflections")
BARS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """What the runner and the stages tell. ``total`` 0 means that the number of steps is unknown."""

    def start(self, stage: str, kind: str, total: int) -> None: ...

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, stage: str, reused: bool) -> None: ...

    def warn(self, message: str) -> None: ...

    def status(self, line: str) -> None:
        """What other processes are doing at the moment; said about once a second."""


@dataclass
class Progress:
    """What both views remember of one stage."""

    stage: str
    kind: str
    total: int
    started: float
    step: int = 0
    # where this session's work began: a resumed stage's speed is not its past's, nor is its set-up
    measured_from: tuple[int, float] | None = None
    ended: float | None = None
    reused: bool = False
    latest: dict[str, float] = field(default_factory=dict)
    drawn: dict[str, list[float]] = field(default_factory=dict)

    def update(self, step: int, total: int, metrics: Mapping[str, float], now: float) -> None:
        if self.measured_from is None:
            self.measured_from = step, now
        self.step, self.total = step, total
        self.latest.update(metrics)  # an evaluation is not made at every step: keep the last one
        for name in DRAWN:
            if name in metrics and math.isfinite(metrics[name]):
                self.drawn.setdefault(name, []).append(metrics[name])

    def remaining(self, now: float) -> float | None:
        """Seconds to go at this session's speed; None while unknown."""
        if self.measured_from is None:
            return None
        first, since = self.measured_from
        if self.step <= first or self.step >= self.total:
            return None
        return (now - since) / (self.step - first) * (self.total - self.step)

    def numbers(self) -> str:
        return "  ".join(
            f"{name} {form.format(self.latest[name])}" for name, form in SHOWN.items() if name in self.latest
        )


class PlainView:
    """One line every few seconds, for logs and pipes; a stage's first and last are always printed."""

    def __init__(
        self,
        stream: TextIO | None = None,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._progress: Progress | None = None
        self._printed_at = -math.inf
        self._unprinted = False
        self._status_at = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()

    def start(self, stage: str, kind: str, total: int) -> None:
        self._progress = Progress(stage, kind, total, self._clock())
        self._printed_at = -math.inf
        self._unprinted = False
        self._print(f"{stage}: {kind}" + (f", {total} steps" if total else ""))

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if self._progress is None or self._progress.stage != stage:
            self._progress = Progress(stage, "", total, now)
        self._progress.update(step, total, metrics, now)
        self._unprinted = True
        if now - self._printed_at >= self._every or (total and step >= total):
            self._flush()

    def finish(self, stage: str, reused: bool) -> None:
        self._flush()
        seconds = self._clock() - self._progress.started if self._progress else 0.0
        self._print(f"{stage}: " + ("finished before, reused" if reused else f"done ({duration(seconds)})"))

    def warn(self, message: str) -> None:
        self._print(f"note: {message}")

    def status(self, line: str) -> None:
        if (now := self._clock()) - self._status_at >= 3 * self._every:
            self._print(f"  {line}")
            self._status_at = now

    def _flush(self) -> None:
        if self._progress is None or not self._unprinted:
            return
        p, now = self._progress, self._clock()
        remaining = p.remaining(now)
        to_go = f"  {duration(remaining)} to go" if remaining is not None else ""
        self._print(f"{p.stage} {steps(p)}  {p.numbers()}{to_go}")
        self._printed_at, self._unprinted = now, False

    def _print(self, line: str) -> None:
        print(line.rstrip(), file=self._stream or sys.stdout, flush=True)


class LiveView:
    """A picture that redraws itself: a bar a stage, its numbers, and the curves that matter."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._stages: dict[str, Progress] = {}
        self._notes: list[str] = []
        self._status = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        from rich.live import Live

        self._live = Live(console=self._console, get_renderable=self.picture, refresh_per_second=4)
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()  # draws once more and leaves the picture on the screen
            self._live = None

    def start(self, stage: str, kind: str, total: int) -> None:
        self._stages[stage] = Progress(stage, kind, total, self._clock())

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        progress = self._stages.setdefault(stage, Progress(stage, "", total, now))
        progress.update(step, total, metrics, now)

    def finish(self, stage: str, reused: bool) -> None:
        self._status = ""
        if stage in self._stages:
            self._stages[stage].ended, self._stages[stage].reused = self._clock(), reused

    def warn(self, message: str) -> None:
        self._notes.append(message)

    def status(self, line: str) -> None:
        self._status = line

    def picture(self) -> Group:
        """The whole picture as a rich renderable."""
        from rich.console import Group, RenderableType
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self._clock()
        lines: list[RenderableType] = []
        for p in list(self._stages.values()):  # a copy: the refreshing thread draws meanwhile
            row = Table.grid(padding=(0, 2))
            done = p.ended is not None
            bar = ProgressBar(total=max(p.total, 1), completed=p.total if done else p.step, width=24)
            remaining = p.remaining(now)
            clock = f"{duration(remaining)} to go" if remaining is not None else "…"
            if p.ended is not None:
                clock = "reused" if p.reused else duration(p.ended - p.started)
            name = Text(("✓ " if done else "▸ ") + p.stage, style="green" if done else "bold cyan")
            row.add_row(name, Text(p.kind, style="dim"), bar, steps(p), clock)
            lines.append(row)
            if numbers := p.numbers():
                lines.append(Text("  " + numbers, style="dim" if done else ""))
            lines += [
                Text(f"  {name:<12} {sparkline(values)}", style="cyan")
                for name, values in list(p.drawn.items())
                if len(values) > 1
            ]
        if self._status:
            lines.append(Text(f"  {self._status}", style="dim"))
        lines += [Text(f"! {note}", style="yellow") for note in self._notes[-5:]]
        return Group(*lines)


def make_view(live: bool = True) -> PlainView | LiveView:
    """The live picture in a terminal (unless ``live`` is off), plain lines everywhere else."""
    return LiveView() if live and sys.stdout.isatty() else PlainView()


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """``values`` as block characters, at most ``width`` of them; each is the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def steps(progress: Progress) -> str:
    return f"{progress.step}/{progress.total}" if progress.total else ""


def duration(seconds: float) -> str:
    """``7 s``, ``3:05`` (minutes), ``2:03:05`` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar(label: str, after: float = 2.0) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with (done, total); None where stderr is no terminal.

    The bar is drawn on stderr, so that stdout stays a program's, and only once ``after`` seconds have
    passed: what is quick needs no bar.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    bar = Bar(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None)
    begun = time.monotonic()

    def advance(done: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - begun > after:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()
