"""Accuracy against tokens: what several paths to an answer buy, from evaluations with ``paths``.

All evaluations of one checkpoint on the same problems, each by another way, are one comparison: a line a kind
of paths, over the tokens that an answer cost. What counts is what was written and what judges read, kept or
not; prompts that were read again are in the table. Left out: seconds on another machine than this one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from liubai.report.read import WITHOUT_MODEL, Curve, Run, Stage, number, read_object
from liubai.report.section import Section
from liubai.report.story import show
from liubai.report.svg import Chart, Line

#: (ink, dash) of each line. People who confuse red and green tell these apart: red, ink and blue first, then
#: by pattern; ochre and green come last.
LOOKS = ((0, 0), (1, 0), (3, 0), (2, 1), (1, 2), (3, 3), (4, 1), (5, 2))
#: What a kind is called, in the order in which it is drawn.
KINDS = {
    "sample": "one draw",
    "greedy": "greedy",
    "longer": "one draw, a longer thought",
    "shorter": "one draw, a shorter thought",
    "vote": "majority vote",
    "best": "best of n",
    "beam": "beam search",
    "tree": "tree search",
}
JUDGES = {"process": "process model", "preference": "reward model", "rollouts": "rollouts"}
#: Standard errors by which two shares must differ to be called different.
SURE = 2.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluation: accuracy and its standard error at ``tokens`` an answer."""

    line: str
    kind: str
    name: str
    tokens: float
    accuracy: float
    error: float
    read: float | None
    seconds: float | None
    #: question -> the mean over its answers
    scores: Mapping[str, float] = field(default_factory=dict)


def section(run: Run) -> Section | None:
    """``None`` when no evaluation went by paths."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for stage in run.of_kind("eval"):
        found = measured(stage)
        if found is not None:
            asked = [(stage.result or {}).get(key) for key in ("problems", "n_problems")]
            groups.setdefault((_checkpoint(run, stage), str(asked)), []).append(found)
    if not groups:
        return None
    listed = [(parent, each) for (parent, _), each in groups.items()]
    charts = [_chart(i, parent, each, len(listed) > 1) for i, (parent, each) in enumerate(listed)]
    said = " ".join(finding(each) for _, each in listed)
    tables = Markup("").join(_table(parent, each) for parent, each in listed)
    return Section("paths", "Several paths, equal tokens", "殊途同价", said, charts, tables)


def _checkpoint(run: Run, stage: Stage) -> str:
    """Whose answers they are: the stage's that made it, where it was not brought along."""
    made_by = run.stage(stage.parent)
    brought = made_by is not None and made_by.kind in WITHOUT_MODEL
    return stage.parent if stage.parent and not brought else "the model"


def measured(stage: Stage) -> Measured | None:
    result = stage.result or {}
    way = result.get("way")
    accuracy, written = number(result.get("pass@1")), number(result.get("tokens_spent"))
    if not isinstance(way, dict) or accuracy is None or not written:
        return None
    kind = str(way.get("kind", ""))
    line = _line_of(kind, way)
    by = JUDGES.get(str(way.get("by")), "")
    label = KINDS.get(line, line) + (f" ({by})" if by else "")
    tokens = written + (number(result.get("tokens_judged")) or 0.0)
    return Measured(
        label,
        line,
        _name_of(way),
        tokens,
        accuracy,
        number(result.get("stderr")) or 0.0,
        number(result.get("tokens_read")),
        number(result.get("seconds")),
        _scores(stage),
    )


def _scores(stage: Stage) -> dict[str, float]:
    """By question, where the evaluation left them."""
    found = read_object(stage.folder / "scores.json", []) if stage.folder else None
    rows = (found or {}).get("scores", [])
    return {prompt: statistics.fmean(values) for prompt, values in rows if values}


def _apart(a: Measured, b: Measured) -> float:
    """The standard error of the difference: over the questions, where both were asked the same, else of two
    independent means."""
    if len(a.scores) > 1 and a.scores.keys() == b.scores.keys():
        differences = [score - b.scores[question] for question, score in a.scores.items()]
        return statistics.stdev(differences) / math.sqrt(len(differences))
    return math.hypot(a.error, b.error)


def _line_of(kind: str, way: dict[str, Any]) -> str:
    if kind == "sample" and way.get("think_at_least"):
        return "longer"
    if kind == "sample" and way.get("thinking_budget") is not None:
        return "shorter"
    return kind


def _name_of(way: dict[str, Any]) -> str:
    bounds = [
        f"{words} {way[key]}"
        for key, words in (("thinking_budget", "at most"), ("think_at_least", "at least"))
        if way.get(key)
    ]
    return ", ".join([str(way.get("name", "")), *bounds])


def finding(found: Sequence[Measured]) -> str:
    """What the best way buys against one draw, and which one gets worse the more it costs."""
    return _gain(found) + _fall(found)


def _gain(found: Sequence[Measured]) -> str:
    best = max(found, key=lambda m: m.accuracy)
    plain = next((m for m in found if m.kind == "sample"), None) or min(found, key=lambda m: m.tokens)
    if best is plain:
        return f"Nothing is better than {plain.name} ({_share(plain)})."
    gap, error = best.accuracy - plain.accuracy, _apart(best, plain)
    cost = f"{best.tokens / plain.tokens:.1f} times the tokens"
    if gap < SURE * error:
        return (
            f"Nothing is surely better than {plain.name} ({_share(plain)}): {best.name} has {_share(best)} "
            f"at {cost}, which is within {SURE:.0f} standard errors."
        )
    # who is as good as the best for less?
    as_good = [m for m in found if m is best or best.accuracy - m.accuracy <= SURE * _apart(best, m)]
    cheap = min(as_good, key=lambda m: m.tokens)
    same = (
        "" if cheap is best else f"; {cheap.name} comes as far within the noise at {cheap.tokens:.0f} tokens"
    )
    return f"From {_share(plain)} by {plain.name} to {_share(best)} by {best.name}, at {cost}{same}."


def _fall(found: Sequence[Measured]) -> str:
    """The line that surely falls, and most."""
    lines = {m.line: sorted((n for n in found if n.line == m.line), key=lambda n: n.tokens) for m in found}
    ends = [(each[0], each[-1]) for each in lines.values()]
    falls = [
        (first, last) for first, last in ends if first.accuracy - last.accuracy > SURE * _apart(first, last)
    ]
    if not falls:
        return ""
    first, last = max(falls, key=lambda pair: pair[0].accuracy - pair[1].accuracy)
    name = first.line[:1].upper() + first.line[1:]
    return f" {name} falls from {_share(first)} to {_share(last)}."


def _share(m: Measured) -> str:
    return show(m.accuracy, "%").replace(" ", "\N{NO-BREAK SPACE}")  # a title must not break there


def _chart(number: int, parent: str, found: Sequence[Measured], several: bool) -> Chart:
    by_line: dict[str, list[Measured]] = {}
    order = list(KINDS)
    for m in sorted(found, key=lambda m: (order.index(m.kind) if m.kind in order else len(order), m.line)):
        by_line.setdefault(m.line, []).append(m)
    lines = []
    for place, (label, points) in enumerate(by_line.items()):
        points = sorted(points, key=lambda m: m.tokens)
        curve = Curve(tuple(m.tokens for m in points), tuple(m.accuracy for m in points))
        ink, dash = LOOKS[place % len(LOOKS)]
        lines.append(Line(label, curve, ink, dash, dots=True, errors=[m.error for m in points]))
    whose = f" Checkpoint: {parent}." if several else ""
    return Chart(
        f"paths-{number}",
        finding(found).rstrip("."),
        "Answers that are right, against the tokens that one answer cost: all that were written for it, kept "
        f"or not, and all that a judge read. Bars are one standard error over the questions.{whose}",
        "answers that are right (%)",
        lines,
        x_label="tokens an answer (log scale)",
        percent=True,
        zero=False,
        log_x=True,
    )


def _table(parent: str, found: Sequence[Measured]) -> Markup:
    rows = []
    for m in sorted(found, key=lambda m: m.tokens):
        cells = [
            f"{show(m.accuracy, '%')} <small>± {100 * m.error:.1f}</small>",
            show(m.tokens, "0"),
            show(m.read, "0"),
            show(1000 * m.seconds if m.seconds is not None else None, "0"),
        ]
        rows.append(
            f'<tr><th scope="row">{escape(m.line)}: {escape(m.name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return Markup(
        '<div class="scroll spaced" tabindex="0"><table class="numbers small">'
        f"<caption>{escape(parent)}, by what an answer cost</caption><thead>"
        '<tr><th scope="col">paths</th><th scope="col">right</th>'
        '<th scope="col">tokens</th><th scope="col">read again</th><th scope="col">ms</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
