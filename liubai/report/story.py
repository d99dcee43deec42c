"""What a run says: before and after, the step at which reflection takes off, the one sentence.

Numbers come from eval.json as they are; nothing is recomputed here. Left out: any judgement of
whether a difference matters beyond showing its standard error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

from liubai.report.read import Curve, Run, Stage, number

Row = tuple[str, str, str]  #: (key in eval.json, label, how to print it: percent or number)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluated checkpoint. ``after`` says that reinforcement learning made it."""

    label: str
    stage: Stage
    after: bool

    def value(self, key: str) -> float | None:
        return number((self.stage.result or {}).get(key))

    @property
    def families(self) -> dict[str, dict[str, Any]]:
        """The figures of each family of problems; none in an evaluation of a single family."""
        raw = (self.stage.result or {}).get("families")
        if not isinstance(raw, dict):
            return {}
        return {str(name): figures for name, figures in raw.items() if isinstance(figures, dict)}

    @property
    def pass_curve(self) -> list[tuple[int, float]]:
        """``(k, pass@k)`` in rising k."""
        raw = (self.stage.result or {}).get("pass@k")
        if not isinstance(raw, dict):
            return []
        points = [(int(k), number(v)) for k, v in raw.items() if str(k).isdigit() and int(k) > 0]
        return sorted((k, v) for k, v in points if v is not None)


def evaluations(run: Run) -> list[Evaluated]:
    """The evaluated checkpoints: those before reinforcement learning first, then recipe order. The
    checkpoints of a pipeline (:func:`is_pipeline`) stay in the recipe's order, which is their story."""
    reinforced = {s.name for s in run.of_kind("rl")}
    found = [
        Evaluated(str((s.result or {}).get("label") or s.parent or s.name), s, s.parent in reinforced)
        for s in run.of_kind("eval")
        if s.result and "way" not in s.result  # one more way to ask is not one more checkpoint
    ]
    return found if is_pipeline(found) else sorted(found, key=lambda e: e.after)


def is_pipeline(evaluated: Sequence[Evaluated]) -> bool:
    """Is this a story of many stages, told over several families? At least two evaluations say so."""
    return sum(bool(e.families) for e in evaluated) > 1


def pair(run: Run) -> tuple[Evaluated, Evaluated] | None:
    """The story's before and after: the first rl stage that was evaluated, and what it began from."""
    evaluated = evaluations(run)
    for after in evaluated:
        made_by = run.stage(after.stage.parent)
        if after.after and made_by is not None:
            same = [e for e in evaluated if e.stage.parent == made_by.parent]
            if same or not evaluated[0].after:
                return (same or evaluated)[0], after
    return None


def columns(evaluated: Sequence[Evaluated]) -> list[Row]:
    """The headline's measures that at least one checkpoint has, with the largest k of each kind."""

    def largest(kind: str) -> list[Row]:
        pattern = re.compile(re.escape(kind) + r"@(\d+)")
        ks = {int(m[1]) for e in evaluated for key in e.stage.result or {} if (m := pattern.fullmatch(key))}
        return [(f"{kind}@{k}", f"{kind}@{k}", "%") for k in [max(ks - {1}, default=0)] if k]

    rows: list[Row] = [
        ("pass@1", "pass@1", "%"),
        *largest("pass"),
        *largest("cons"),
        ("mean_tokens", "mean tokens", "1"),
        ("reflections", "reflections per answer", "2"),
        ("format", "format", "%"),
        ("language", "language", "%"),
        ("readable", "readable", "%"),
        ("unsound", "unsound", "%"),
        ("truncated", "cut off", "%"),
    ]
    return [row for row in rows if any(e.value(row[0]) is not None for e in evaluated)]


def show(value: float | None, form: str, decimals: int = 1) -> str:
    """A share as a percentage with ``decimals``, a count with ``form`` decimals, "–" for what is missing."""
    if value is None:
        return "–"
    if form == "%":
        return f"{100 * value:.{decimals}f} %"
    return f"{value:,.{form}f}"


def wide(text: str) -> int:
    """How many columns ``text`` takes where a letter takes one."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# --- curves ---------------------------------------------------------------------------------------


def window(n: int) -> int:
    """How many steps a smoothed point averages: about a twelfth of the curve, odd; 1 when short."""
    return max(3, n // 12) | 1 if n >= 6 else 1


def smooth(curve: Curve) -> Curve:
    """A centred moving mean over :func:`window` steps; gaps are skipped, and stay gaps."""
    n, half = len(curve.xs), window(len(curve.xs)) // 2
    # Running sums: a window a point would make long curves quadratic.
    sums = list(accumulate((y or 0.0 for y in curve.ys), initial=0.0))
    counts = list(accumulate((y is not None for y in curve.ys), initial=0))
    ys: list[float | None] = []
    for i, y in enumerate(curve.ys):
        lo, hi = max(0, i - half), min(n, i + half + 1)
        ys.append((sums[hi] - sums[lo]) / (counts[hi] - counts[lo]) if y is not None else None)
    return Curve(curve.xs, tuple(ys))


TAKE_OFF_RULE = (
    "Take-off: the first step at which the smoothed reflections per answer exceed their start by 25 % of "
    "their total rise and stay above. No take-off is declared when the rise is under 0.1 a answer, under a "
    "fifth of the start, or within the noise."
).replace("a answer", "an answer")


def take_off(reflections: Curve) -> int | None:
    """The step of :data:`TAKE_OFF_RULE`, or ``None``.

    The noise is that of the smoothed curve: a robust spread of the raw points around it (undone of the
    share that a point has in its own mean) over the square root of the window, times six. A flat
    curve's start and maximum lie up to about five apart, for means at the edges rest on fewer points.
    """
    raw, points = reflections.known, smooth(reflections).known
    if len(points) < 4:
        return None
    start = points[0][1]
    rise = max(y for _, y in points) - start
    spread = median(abs(y - s) for (_, y), (_, s) in zip(raw, points, strict=True)) * 1.4826
    noise = 6 * spread / max(1, window(len(reflections.xs)) - 1) ** 0.5
    if rise <= max(0.1, 0.2 * start, noise):
        return None
    first: float | None = None
    for x, y in points:
        if y <= start + 0.25 * rise:
            first = None
        elif first is None:
            first = x
    return None if first is None else int(first)


def sentence(run: Run) -> str:
    """The result in one sentence, from what is there; "" where nothing was evaluated or learned from
    rewards."""
    both = pair(run)
    rl = run.of_kind("rl")
    if both is not None:
        before, after = both
        stage = run.stage(after.stage.parent)
        assert stage is not None
        steps = f"In {stage.steps} steps of reinforcement learning" if stage.steps else "After the training"
        return f"{steps}, {changes(before, after)}{_took_off(stage)}."
    if rl and rl[0].rows:
        known = smooth(rl[0].curve("accuracy")).known
        if known:
            change = f"{show(known[0][1], '%')} to {show(known[-1][1], '%')}"
            said = f"the accuracy of the training answers went from {change}"
            return f"So far, in {rl[0].steps} steps, {said}{_took_off(rl[0])}."
    if evaluated := evaluations(run):
        last = evaluated[-1]
        told = [
            f"{label} {show(value, form)}"
            for key, label, form in (("pass@1", "pass@1", "%"), ("mean_tokens", "mean tokens", "1"))
            if (value := last.value(key)) is not None
        ]
        return f"{last.label}: {', '.join(told)}." if told else ""
    return ""


def changes(before: Evaluated, after: Evaluated) -> str:
    """How accuracy and length went from one checkpoint to another, as a clause."""
    parts = _change(before, after, "pass@1", "pass@1 went", lambda v: show(v, "%"))
    parts += _change(before, after, "mean_tokens", "the mean answer", lambda v: f"{v:,.0f}", " tokens")
    said = " and ".join(parts) or "nothing comparable was measured"
    if "stayed" in said or len(parts) == 1:  # the second verb was borrowed from the first
        said = said.replace("the mean answer from", "the mean answer went from")
    return said


def _change(
    before: Evaluated, after: Evaluated, key: str, lead: str, form: Callable[[float], str], unit: str = ""
) -> list[str]:
    a, b = before.value(key), after.value(key)
    if a is None or b is None:
        return []
    if form(a) == form(b):
        return [f"{lead.removesuffix(' went')} stayed at {form(a)}{unit}"]
    return [f"{lead} from {form(a)} to {form(b)}{unit}"]


def _took_off(stage: Stage) -> str:
    curve = stage.curve("reflections")
    step = take_off(curve)
    if step is not None:
        return f"; reflection took off at step {step}"
    return "; reflection did not take off" if curve else ""
