"""What :mod:`bench.serve_memory` makes of memory that grows: a staircase is no leak."""

from __future__ import annotations

import random

import pytest

from bench.serve_memory import Look, report, slope, steps

#: Megabytes after each look: it doubles its tables, ever more seldom.
STAIRCASE = [400.0 + 5 * sum(look >= at for at in (2, 5, 11, 23, 47)) for look in range(96)]
LEAK = [400.0 + 0.25 * look for look in range(96)]


def looks(megabytes: list[float]) -> list[Look]:
    rng = random.Random(3)
    return [
        Look(30.0 * i, 100 * i, 90.0, mb + rng.uniform(-0.05, 0.05))  # a hundred answers a look
        for i, mb in enumerate(megabytes)
    ]


def told(megabytes: list[float], capsys: pytest.CaptureFixture[str]) -> list[tuple[float, float, int]]:
    """Slope an hour, its error and the number of steps, of the second third and of the last."""
    report(looks(megabytes))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    return [(float(line[3]), float(line[5]), int(line[line.index("steps:") + 1][:-1])) for line in lines]


def test_a_staircase_ends_and_a_leak_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    (rises, _, once), (flat, doubt, never) = told(STAIRCASE, capsys)
    assert (once, never) == (1, 0)
    assert rises > 5
    assert abs(flat) < 0.5
    assert abs(flat) < 4 * doubt + 0.05
    (before, _, _), (after, doubt, _) = told(LEAK, capsys)
    assert before == pytest.approx(30, rel=0.05)
    assert after == pytest.approx(30, rel=0.05)
    assert after > 10 * doubt


def test_neighbours_are_no_independent_witnesses() -> None:
    """A walk at random has no slope: seldom may the one that is found be many standard errors."""
    surprising = 0
    for seed in range(200):
        rng, at, walk = random.Random(seed), 0.0, []
        for _ in range(200):
            at += rng.gauss(0, 1)
            walk.append(at)
        found, error = slope(list(map(float, range(200))), walk)
        surprising += abs(found) > 5 * error
    assert surprising < 60  # were each look a witness of its own: some 150


def test_steps_are_what_stays_out_of_the_noise() -> None:
    assert steps([1, 1.9, 1.2, 3, 3, 2, 4.5]) == pytest.approx([1.8, 2.5])


def test_too_few_looks_are_no_slope() -> None:
    with pytest.raises(SystemExit, match="too few looks"):
        report(looks(LEAK[:11]))
