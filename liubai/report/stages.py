"""The story of a pipeline: every checkpoint against every measure, and how each measure went.

The table has the shape of Table 3 of DeepSeek-R1 (arXiv 2501.12948v2). Numbers come from eval.json as they
are. Left out: a verdict on which checkpoint is best, for the columns disagree, and that is the story.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from liubai.report.charts import NEUTRAL, stage_style
from liubai.report.read import Curve, Run, number
from liubai.report.story import Evaluated, changes, evaluations, is_pipeline, show
from liubai.report.svg import Chart, Line

Points = Sequence[tuple[str, float]]  #: (checkpoint, value) pairs in the recipe's order

LEAST = 0.05  #: a share that moves by less has not moved; what a title says must not be noise


@dataclass(frozen=True, slots=True)
class Cell:
    """One number. ``error`` is its standard error, ``against`` whom a win rate is over."""

    text: str
    error: str = ""
    against: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One measure. ``opens`` says that its group of columns begins here."""

    group: str
    label: str
    unit: str
    cells: Sequence[Cell]
    opens: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """``columns[j].cells[i]`` belongs to ``checkpoints[i]``, which the stage kind ``made_by[i]`` made."""

    checkpoints: Sequence[str]
    made_by: Sequence[str]
    columns: Sequence[Column]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each group of columns and how many it spans."""
        return [(name, len(list(columns))) for name, columns in groupby(self.columns, lambda c: c.group)]


def told_over_families(run: Run) -> list[Evaluated]:
    """The checkpoints of a pipeline in the recipe's order; none when the run is no pipeline."""
    evaluated = evaluations(run)
    return [e for e in evaluated if e.families] if is_pipeline(evaluated) else []


def stage_table(run: Run) -> Table | None:
    """Checkpoints against measures, or ``None`` when the run is no pipeline.

    A family counts by its pass@1, or by its score where no checkpoint has a pass@1. The best of a column
    is marked where at least two checkpoints can be compared; lengths have no best, and win rates only
    among those over the same checkpoint.
    """
    told = told_over_families(run)
    if not told:
        return None
    columns = []
    for name in _family_names(told):
        key = _measure(told, name)
        columns.append(_column("accuracy", name, key, _of(told, name, key), _of(told, name, "stderr")))
    for key, better in (("format", 1), ("language", 1), ("readable", 1), ("unsound", -1)):
        columns.append(_column("form and thought", key, "", [e.value(key) for e in told], better=better))
    tokens = [e.value("mean_tokens") for e in told]
    columns.append(_column("length", "tokens", "mean", tokens, form="0", better=0))
    columns.append(_wins(told))
    shown = [c for c in columns if any(cell.text != "–" for cell in c.cells)]
    opened = [
        Column(c.group, c.label, c.unit, c.cells, opens=i == 0 or shown[i - 1].group != c.group)
        for i, c in enumerate(shown)
    ]
    return Table([e.label for e in told], [origin(run, e) for e in told], opened)


def origin(run: Run, evaluated: Evaluated) -> str:
    """The kind of the stage that made a checkpoint; nothing when it was brought along."""
    made_by = run.stage(evaluated.stage.parent)
    return made_by.kind.replace("_", " ") if made_by is not None else ""


def _family_names(told: Sequence[Evaluated]) -> list[str]:
    """Every family, in the order in which they first appear."""
    return list(dict.fromkeys(name for e in told for name in e.families))


def _of(told: Sequence[Evaluated], name: str, key: str) -> list[float | None]:
    """One figure of one family, a checkpoint at a time."""
    return [number(e.families.get(name, {}).get(key)) for e in told]


def _measure(told: Sequence[Evaluated], name: str) -> str:
    """One measure a column: a score must not stand among accuracies."""
    return "pass@1" if any(value is not None for value in _of(told, name, "pass@1")) else "score"


def _column(
    group: str, label: str, unit: str, values: Sequence[float | None],
    errors: Sequence[float | None] = (), form: str = "%", better: int = 1, against: Sequence[str] = (),
) -> Column:  # fmt: skip
    """``better`` is the sign of an improvement, 0 where neither more nor less is one."""
    texts = [show(value, form) for value in values]
    known = [value for value in values if value is not None]
    best = show(max(known, key=lambda v: better * v), form) if known and better else None
    compared = len(known) > 1 and len({show(v, form) for v in known}) > 1
    cells = []
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        error = errors[i] if errors and value is not None else None
        over = f"over {against[i]}" if against and against[i] and value is not None else ""
        # what reads the same is equally good
        cells.append(
            Cell(text, f"± {100 * error:.1f}" if error is not None else "", over, compared and text == best)
        )
    return Column(group, label, unit, cells)


def _wins(told: Sequence[Evaluated]) -> Column:
    rates = [e.value("win_rate") for e in told]
    others = [(e.stage.result or {}).get("against") for e in told]
    against = [other if isinstance(other, str) else "" for other in others]
    rivals = {other for rate, other in zip(rates, against, strict=True) if rate is not None}
    return _column("preference", "win rate", "", rates, better=len(rivals) == 1, against=against)


# --- how it went ----------------------------------------------------------------------------------


def course(name: str, points: Points, least: float = LEAST) -> str | None:
    """One sentence, without its full stop, on how a share went; ``None`` for fewer than two points.

    A fall that is made good again is the first thing to tell, then a peak that did not last, then the
    way from first to last. ``least`` is the smallest change that counts.
    """
    if len(points) < 2:
        return None
    labels, values = zip(*points, strict=True)
    first, last = values[0], values[-1]
    inner = range(1, len(values) - 1)
    at = max(inner, key=lambda i: min(max(values[:i]) - values[i], last - values[i]), default=0)
    before = max(values[: at or 1])
    if at and min(before - values[at], last - values[at]) >= least:
        again = "is back at" if last > before - least else "recovers to"
        return (
            f"{name} falls to {_share(values[at])} in {labels[at]} and {again} {_share(last)} in {labels[-1]}"
        )
    at = max(inner, key=lambda i: values[i], default=0)
    if at and min(values[at] - last, values[at] - first) >= least:
        return (
            f"{name} peaks at {_share(values[at])} in {labels[at]} and ends at {_share(last)} in {labels[-1]}"
        )
    if abs(last - first) >= least:
        verb = "rises" if last > first else "falls"
        return f"{name} {verb} from {_share(first)} in {labels[0]} to {_share(last)} in {labels[-1]}"
    low, high = _share(min(values)), _share(max(values))
    return f"{name} stays at {low}" if low == high else f"{name} stays between {low} and {high}"


def _share(value: float) -> str:
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"  # a title must not break there


def pipeline_sentence(run: Run) -> str | None:
    """The result of a pipeline: from its first checkpoint to its last, and what became of the language."""
    told = told_over_families(run)
    if not told:
        return None
    said = f"From {told[0].label} to {told[-1].label}, {changes(told[0], told[-1])}."
    language = course("Language consistency", _points(told, "language"))
    return f"{said} {language}." if language else said


def stage_charts(run: Run) -> list[Chart]:
    """Accuracy of each family, and the form of the thoughts, over the checkpoints of a pipeline."""
    told = told_over_families(run)
    families = _family_names(told)
    by_family = [
        _line(name, _of(told, name, _measure(told, name)), stage_style(i)) for i, name in enumerate(families)
    ]
    if len(families) > 1:
        by_family.append(_line("overall", [e.value("pass@1") for e in told], (NEUTRAL, 2)))
    form = [
        _line(key, [e.value(key) for e in told], stage_style(i))
        for i, key in enumerate(("language", "readable", "format"))
    ]
    errors = [error for e in told if (error := e.value("stderr")) is not None]
    # three standard errors of the difference of two independent means
    noise = 3 * 2**0.5 * max(errors, default=0.0)
    accuracy = course("Overall accuracy", _points(told, "pass@1"), max(LEAST, noise))
    charts = [
        Chart(
            "families",
            accuracy or "Accuracy by family",
            "Share of answers that are right (pass@1), a line a family, over the checkpoints in the order in "
            "which the recipe makes them. A family that is graded in degrees shows its mean score.",
            "answers that are right (%)",
            [line for line in by_family if line.curve],
            x_label="checkpoint",
            x_names=[e.label for e in told],
            percent=True,
        ),
        Chart(
            "form",
            course("Language consistency", _points(told, "language")) or "The form of the thoughts",
            "Over the same checkpoints: the thought's words that are in the question's language, answers "
            "that pass the readability filter, answers with well-formed tags.",
            "share (%)",
            [line for line in form if line.curve],
            x_label="checkpoint",
            x_names=[e.label for e in told],
            percent=True,
        ),
    ]
    return [chart for chart in charts if chart.lines]


def _line(label: str, values: Sequence[float | None], look: tuple[int, int]) -> Line:
    ink, dash = look
    return Line(label, Curve(tuple(map(float, range(len(values)))), tuple(values)), ink, dash, dots=True)


def _points(told: Sequence[Evaluated], key: str) -> Points:
    return [(e.label, value) for e in told if (value := e.value(key)) is not None]
