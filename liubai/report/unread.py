"""Plain text that no model has read: bits a byte, over the tokens and over the time that a model had.

Models are compared at the end of their training, where the learning rate has come down; what a curve shows on
the way is higher than a shorter training would have come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from markupsafe import Markup, escape

from liubai.measure.ratio import ratio_and_error
from liubai.report.charts import stage_style
from liubai.report.read import Curve, Run, Stage, number, read_object
from liubai.report.section import Section
from liubai.report.svg import Chart, Line

BITS = "eval/bits_per_byte"


@dataclass(frozen=True, slots=True)
class Reader:
    """A pre-training stage: at each look the ``tokens`` read by then, the ``seconds`` of learning (looks and
    saving left out) and the ``bits`` a byte. At the end, of each text: how many bytes it has (``sizes``) and
    how many bits it took (``each``); nothing in results of before these were kept."""

    name: str
    architecture: str
    parameters: float | None
    texts: float | None
    size: float | None
    tokens: Sequence[float]
    seconds: Sequence[float]
    bits: Sequence[float]
    sizes: Sequence[float] = ()
    each: Sequence[float] = ()


def section(run: Run) -> Section | None:
    """``None`` when no stage has read plain text, or none has looked yet."""
    readers = [reader for stage in run.of_kind("pretrain") if (reader := _reader(stage, run))]
    if not readers:
        return None
    charts = [
        _chart("tokens", "Bits a byte over what was read", "tokens read", readers),
        _chart("seconds", "Bits a byte over the time it took", "seconds of learning", readers),
    ]
    return Section("unread", "Text that was not read", "未读之文", _finding(readers), charts, _table(readers))


def _reader(stage: Stage, run: Run) -> Reader | None:
    seconds = list(accumulate(_seconds(stage)))
    looks = [
        (tokens, spent, bits)
        for row, spent in zip(stage.rows, seconds, strict=True)
        if (bits := number(row.get(BITS))) is not None and (tokens := number(row.get("tokens"))) is not None
    ]
    if not looks:
        return None
    told = (read_object(stage.folder / "held_out.json", run.notes) if stage.folder else None) or {}
    return Reader(
        stage.name,
        str(told.get("architecture", "")).removesuffix("ForCausalLM"),
        number(told.get("parameters")),
        number(told.get("texts")),
        number(told.get("bytes")),
        *zip(*looks, strict=True),
        *(_numbers(told.get(key)) for key in ("sizes", "bits")),
    )


def _numbers(values: Any) -> list[float]:
    listed = values if isinstance(values, list) else []
    return [known for value in listed if (known := number(value)) is not None]


def _seconds(stage: Stage) -> list[float]:
    """Of each step."""
    tokens = [number(row.get("tokens")) or 0.0 for row in stage.rows]
    speeds = [number(row.get("tokens/s")) for row in stage.rows]
    before = [0.0, *tokens][: len(tokens)]
    return [(b - a) / s if s else 0.0 for a, b, s in zip(before, tokens, speeds, strict=True)]


def _finding(readers: Sequence[Reader]) -> str:
    """Who needs fewest bits at the end, the others in order; whether the first two can be told apart; and who
    had read too often by then."""
    order = sorted(readers, key=lambda reader: reader.bits[-1])
    listed = ", ".join(f"{reader.name} {reader.bits[-1]:.3f}" for reader in order)
    past = [reader.name for reader in readers if reader.bits[-1] > 1.01 * min(reader.bits)]
    said = f"Bits for a byte of text that was not read, at the end: {listed}.{_apart(*order[:2])}"
    return said + (
        f" {', '.join(past)} had been better before: what it read, it knew by heart." if past else ""
    )


def _apart(best: Reader, next_: Reader | None = None) -> str:
    """By the paired difference on the same texts; nothing where they read other texts, or these were not
    kept."""
    if (
        next_ is None
        or best.sizes != next_.sizes
        or not len(best.sizes) == len(best.each) == len(next_.each) > 1
    ):
        return ""
    more = [b - a for a, b in zip(best.each, next_.each, strict=True)]
    difference, error = ratio_and_error(more, best.sizes)
    by = f"{difference:.3f} ± {2 * error:.3f}"
    if difference > 2 * error:
        said = f"{best.name} needs {by} fewer than {next_.name}"
    else:
        said = f"{best.name} and {next_.name} are not told apart: {by}"
    return f" {said} (twice the standard error over {len(more)} texts)."


def _chart(key: str, title: str, x_label: str, readers: Sequence[Reader]) -> Chart:
    lines = []
    for place, reader in enumerate(readers):
        ink, dash = stage_style(place)
        xs = reader.tokens if key == "tokens" else reader.seconds
        lines.append(Line(reader.name, Curve(tuple(xs), tuple(reader.bits)), ink, dash, dots=True))
    caption = "Fewer is better. Only the last point of a line is a model whose learning rate has come down."
    return Chart(f"unread-{key}", title, caption, "bits a byte", lines, x_label=x_label, zero=False)


def _table(readers: Sequence[Reader]) -> Markup:
    rows = "".join(
        f'<tr><th scope="row">{escape(r.name)} <small>{escape(r.architecture)}</small></th>'
        f"<td>{_count(r.parameters)}</td><td>{_count(r.tokens[-1])}</td><td>{r.seconds[-1]:.0f}</td>"
        f"<td>{r.bits[-1]:.3f}</td><td>{min(r.bits):.3f}</td></tr>"
        for r in readers
    )
    heads = ("stage", "parameters", "tokens read", "seconds of learning", "bits a byte", "the lowest")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    known = next((r for r in readers if r.size), readers[0])
    caption = f"On {_count(known.texts)} texts, {_count(known.size)} bytes"
    return Markup(
        f'<div class="scroll"><table class="numbers small" id="unread-numbers"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
