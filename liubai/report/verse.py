"""How the parts of verse went while it was rewarded: tones, rhyme and the rest, one by one."""

from __future__ import annotations

from collections.abc import Sequence

from liubai.report.charts import style
from liubai.report.read import Curve, Run, Stage
from liubai.report.section import Section
from liubai.report.story import show
from liubai.report.svg import Chart, Line

#: what a stage logs, and what a poem's score weighs most
PREFIXES, TOLD = ("verse/", "sonnet/"), ("tones", "metre", "rhyme")
ENDS = 0.1  #: the share of the steps at either end that is averaged for the sentence


def section(run: Run) -> Section | None:
    """``None`` when no stage has written verse for a reward."""
    found = [(stage, keys) for stage in run.of_kind("rl") if (keys := _keys(stage))]
    if not found:
        return None
    charts = [_chart(stage, keys) for stage, keys in found]
    return Section("verse", "The form of the poems", "格律", _finding(found), charts)


def _keys(stage: Stage) -> list[str]:
    return [key for prefix in PREFIXES for key in stage.keys(prefix)]


def ends(curve: Curve) -> tuple[float, float] | None:
    """Means over the first and the last tenth of the steps; ``None`` of fewer than two."""
    ys = [y for _, y in curve.known]
    if len(ys) < 2:
        return None
    n = max(1, round(ENDS * len(ys)))
    return sum(ys[:n]) / n, sum(ys[-n:]) / n


def _finding(found: Sequence[tuple[Stage, list[str]]]) -> str:
    said = []
    for stage, keys in found:
        parts = [
            (key.partition("/")[2], both) for key in keys if (both := ends(stage.curve(key))) is not None
        ]
        told = [
            f"{name} {show(first, '%', 0)} → {show(last, '%', 0)}"
            for name, (first, last) in parts
            if name in TOLD
        ]
        if told:
            said.append(f"{stage.name}: {', '.join(told)}")
    if not said:
        return "There are too few steps to say how the form went."
    return f"From the first tenth of the steps to the last, {'; '.join(said)}."


def _chart(stage: Stage, keys: Sequence[str]) -> Chart:
    lines = []
    for place, key in enumerate(keys):
        ink, dash = style(place)
        lines.append(Line(key.partition("/")[2], stage.curve(key), ink, dash, noisy=True))
    return Chart(
        f"verse-{stage.name}",
        f"The form of the poems, part by part: {stage.name}",
        "Mean over the answers of a step; an answer that is none has no form.",
        "share of the part (%)",
        lines,
        percent=True,
    )
