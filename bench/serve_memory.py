"""``python -m bench.serve_memory CHECKPOINT``: does a server under load grow?

The clients of :mod:`bench.serve` for ``--minutes``, and every ``--every`` seconds the resident memory of both
processes: HTTP's, and the model's. At the end the slope of each, by least squares over what comes after the
first fifth (caches fill, allocators find their size), with its standard error, an hour and an answer. A leak
is a slope of several standard errors that a longer run does not make smaller.
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

from bench.serve import Seen, below, client, command_of, free_port, resident_mb, running


@dataclass(frozen=True, slots=True)
class Look:
    """``seconds`` since the beginning, ``answers`` so far, megabytes."""

    seconds: float
    answers: int
    http_mb: float
    model_mb: float


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the line through the points, and its standard error."""
    line = statistics.linear_regression(x, y)
    rest = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return line.slope, math.sqrt(rest / (len(x) - 2) / spread)


async def looks(port: int, pid: int, clients: int, minutes: float, every: float, most: int) -> list[Look]:
    seen = Seen(counting=True)
    tasks = [asyncio.create_task(client(port, i, clients, most, seen, True)) for i in range(clients)]
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
    kept = found[len(found) // 5 :]
    if len(kept) < 3:
        sys.exit("bench: too few looks for a slope; give more --minutes, or look more often with --every")
    for name in ("http", "model"):
        megabytes = [getattr(look, f"{name}_mb") for look in kept]
        hourly, doubt = slope([look.seconds / 3600 for look in kept], megabytes)
        each, error = slope([float(look.answers) for look in kept], megabytes)
        print(
            f"{name:6} {hourly:+8.2f} ± {doubt:.2f} MB an hour   "
            f"{1024 * each:+8.4f} ± {1024 * error:.4f} kB an answer"
        )


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
