"""``python -m bench.serve_memory CHECKPOINT``: does a server under load grow?

The clients of :mod:`bench.serve` for ``--minutes``, and every ``--every`` seconds the resident memory of both
processes: HTTP's, and the model's. At the end, for each: the slope of its second third and that of its last
(in the first, caches fill and allocators find their size), an hour and an answer, with their standard errors;
and how often it grew by a megabyte or more from one look to the next, and by how much in all.

A leak has the same slope in both thirds. A staircase, of tables that double and of room for more answers at
once, has fewer and fewer steps: its slope falls. One look says nearly what the one before it said, so a
slope is that of the line through the means of a few blocks of looks, and its error that of these means.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.serve import Seen, below, client, command_of, free_port, resident_mb, running

#: Of the looks of a third.
BLOCKS = 4
#: Megabytes from one look to the next that are a step. (What comes and goes is less.)
STEP_MB = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """``seconds`` since the beginning, ``answers`` so far, megabytes."""

    seconds: float
    answers: int
    http_mb: float
    model_mb: float


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the line through the means of ``BLOCKS`` blocks of the points, and its standard error."""
    edges = [i * len(x) // BLOCKS for i in range(BLOCKS + 1)]
    at, means = ([statistics.fmean(values[a:b]) for a, b in pairwise(edges)] for values in (x, y))
    line = statistics.linear_regression(at, means)
    rest = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(at, means, strict=True))
    spread = sum((a - statistics.fmean(at)) ** 2 for a in at)
    return line.slope, math.sqrt(rest / (BLOCKS - 2) / spread)


def steps(megabytes: Sequence[float]) -> list[float]:
    """What was added from one look to the next, where that is ``STEP_MB`` or more."""
    return [b - a for a, b in pairwise(megabytes) if b - a >= STEP_MB]


async def looks(port: int, pid: int, clients: int, minutes: float, every: float, most: int) -> list[Look]:
    seen = Seen(counting=True)
    tasks = [asyncio.create_task(client(port, i, most, seen, True)) for i in range(clients)]
    began, found = time.perf_counter(), list[Look]()
    while not found or found[-1].seconds < 60 * minutes:
        await asyncio.sleep(every)
        seen.first.clear()  # our own memory is none of the question
        model = sum(map(resident_mb, below(pid)))
        look = Look(time.perf_counter() - began, seen.answers, resident_mb(pid), model)
        found.append(look)
        print(
            f"{look.seconds / 60:6.1f} min  {look.answers:8,} answers  http {look.http_mb:7.1f} MB  "
            f"model {look.model_mb:7.1f} MB",
            flush=True,
        )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if seen.wrong:
        sys.exit(f"bench: {len(seen.wrong)} answers were wrong, the first: {seen.wrong[0]}")
    return found


def report(found: Sequence[Look]) -> None:
    third = len(found) // 3
    if third < BLOCKS:
        sys.exit("bench: too few looks for a slope; give more --minutes, or look more often with --every")
    parts = {"second": found[third : 2 * third], "last": found[2 * third :]}
    for name in ("http", "model"):
        for which, looked in parts.items():
            megabytes = [getattr(look, f"{name}_mb") for look in looked]
            hourly, doubt = slope([look.seconds / 3600 for look in looked], megabytes)
            each, error = slope([float(look.answers) for look in looked], megabytes)
            print(
                f"{name:6} {which:6} third {hourly:+8.2f} ± {doubt:.2f} MB an hour   "
                f"{1024 * each:+8.4f} ± {1024 * error:.4f} kB an answer   {_grew(megabytes)}"
            )


def _grew(megabytes: Sequence[float]) -> str:
    found = steps(megabytes)
    return f"steps: {len(found)}, of {sum(found):.1f} MB together"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    port = free_port()
    command = command_of(given.checkpoint, port, given.clients, given.max_tokens, given.threads)
    with running(command, given.threads, f"127.0.0.1:{port}") as server:
        found = asyncio.run(
            looks(port, server.pid, given.clients, given.minutes, given.every, given.max_tokens)
        )
    report(found)


if __name__ == "__main__":
    main()
