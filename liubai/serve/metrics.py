"""Counters and histograms, and their text for Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Seconds: from a token of a small model to a long thought of a big one.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """Sums that only grow, by their labels. The owner keeps the number of different labels small."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._sums: dict[Labels, float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self._sums[key] = self._sums.get(key, 0.0) + amount

    def value(self, **labels: str) -> float:
        return self._sums.get(tuple(sorted(labels.items())), 0.0)

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, "counter", self.text)
        for labels, amount in sorted(self._sums.items()):
            yield _line(self.name, labels, amount)


class Histogram:
    """How many took how long, in seconds."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self._counts: dict[Labels, list[int]] = {}  # of each bucket by itself; the last has no bound
        self._sums: dict[Labels, float] = {}

    def add(self, seconds: float, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        counts = self._counts.setdefault(key, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, seconds)] += 1
        self._sums[key] = self._sums.get(key, 0.0) + seconds

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, "histogram", self.text)
        for labels, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
                total += count
                yield _line(f"{self.name}_bucket", (*labels, ("le", bound)), total)
            yield _line(f"{self.name}_sum", labels, self._sums[labels])
            yield _line(f"{self.name}_count", labels, total)


class Metrics:
    """All that the server counts. Labels: ``model`` is a served name, ``path`` one of ours or "other"."""

    def __init__(self) -> None:
        self.requests = Counter("liubai_requests_total", "Requests by path and status.")
        self.tokens = Counter(
            "liubai_tokens_total", "Tokens of answered requests: kind prompt, completion or reasoning."
        )
        self.routes = Counter("liubai_routed_total", "Answers by the way that the router chose.")
        self.gone = Counter("liubai_disconnected_total", "Requests whose client left before the end.")
        self.broken = Counter(
            "liubai_broken_streams_total", "Streams that had begun, as 200, and ended with an error."
        )
        self.first = Histogram("liubai_first_token_seconds", "From the request to its first token.")
        self.total = Histogram("liubai_answer_seconds", "From the request to the end of its answer.")

    def text(self, gauges: Mapping[str, tuple[str, Iterable[tuple[Labels, float]]]]) -> str:
        """All of it, with what is measured now: name -> (what it is, values by labels)."""
        lines: list[str] = []
        counters = (self.requests, self.tokens, self.routes, self.gone, self.broken)
        for counted in (*counters, self.first, self.total):
            lines += counted.lines()
        for name, (text, values) in gauges.items():
            lines += _head(name, "gauge", text)
            lines += [_line(name, labels, value) for labels, value in values]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
