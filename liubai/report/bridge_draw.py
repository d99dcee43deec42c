"""Charts whose points have intervals: whiskers over names, points in a plane, lines with bands.

They are charts of :mod:`liubai.report.svg` in every other way. What differs in colour differs in form, too: a
hollow dot, a dashed line. A section that shows them has :func:`style` in its body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from liubai.report.read import Curve, number
from liubai.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    Scale,
    _axes,
    nice_ticks,
    y_scale,
)  # fmt: skip

NOTHING = Curve((), ())


def style(*more: Path) -> Markup:
    """The looks of these charts, and the style sheets ``more``."""
    sheets = [Path(__file__).with_suffix(".css"), *more]
    text = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    return Markup("<style>{}</style>").format(Markup(text))


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean with the ends of its interval. Without one it is not ``sure``, and the ends are the mean itself:
    that is how it is drawn, and nothing can be said of how far it is from another one."""

    mean: float
    low: float
    high: float
    sure: bool = True

    def text(self, percent: bool = False) -> str:
        scale, unit = (100, " %") if percent else (1, "")
        mean, low, high = (f"{scale * v:.3g}".replace("-", "−") for v in (self.mean, self.low, self.high))
        return f"{mean}{unit} ({low} to {high})" if self.sure else f"{mean}{unit}"


def spread(cell: Any) -> Spread | None:
    """What the JSON of an estimate says; ``None`` for anything else."""
    mean = number(cell.get("mean")) if isinstance(cell, dict) else None
    if mean is None:
        return None
    low, high = number(cell.get("low")), number(cell.get("high"))
    if low is None or high is None:  # of fewer than two problems
        return Spread(mean, mean, mean, sure=False)
    return Spread(mean, low, high)


@dataclass(frozen=True, slots=True)
class Series:
    """``points[i]`` stands at ``xs[i]``, or at the i-th name. ``across`` are intervals along x. Dots that are
    ``hollow`` have dashed whiskers; lines have a ``dash``."""

    label: str
    points: Sequence[Spread | None]
    ink: int = 0
    hollow: bool = False
    dash: int = 0
    xs: Sequence[float] = ()
    across: Sequence[Spread] = ()

    @property
    def key(self) -> Line:
        return Line(self.label, NOTHING, self.ink, 1 if self.hollow else self.dash)


@dataclass(frozen=True, slots=True)
class Spreads(Chart):
    """Dots with whiskers; with ``bands``, lines in a band instead."""

    series: Sequence[Series] = ()
    bands: bool = False

    @property
    def legend(self) -> Sequence[Line]:
        return self.keys or ([s.key for s in self.series] if len(self.series) > 1 else ())

    @property
    def svg(self) -> Markup:
        return _draw(self)


def _draw(chart: Spreads) -> Markup:
    ends = [v for s in chart.series for p in s.points if p for v in (p.low, p.high)]
    if not ends:
        return Markup('<p class="none">Nothing was measured.</p>')
    ticks = y_scale(ends, chart.zero, chart.percent)
    low, high = ticks[0], max(ticks[-1], max(ends))
    if chart.x_names:
        x_low, x_high = -0.5, len(chart.x_names) - 0.5
    else:
        wide = [v for s in chart.series for a in s.across for v in (a.low, a.high)]
        reach = wide or [x for s in chart.series for x in s.xs]
        x_low, x_high = _reach(reach, bool(wide))
        if wide:
            x_ticks = nice_ticks(x_low, x_high)
            x_low, x_high = x_ticks[0], max(x_ticks[-1], x_high)

    def px(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [_axes(chart, x_low, x_high, ticks, px, py)]
    if low < 0:
        out.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(0):.1f}" y2="{py(0):.1f}"/>')
    hover = []
    for i, one in enumerate(chart.series):
        # beside each other where they stand at one name
        aside = (
            (i - (len(chart.series) - 1) / 2) * min(0.22, 0.7 / len(chart.series)) if chart.x_names else 0.0
        )
        xs: Sequence[float] = one.xs or [k + aside for k in range(len(one.points))]
        points = [(k, x, p) for k, (x, p) in enumerate(zip(xs, one.points, strict=True)) if p]
        out.append(_band(one, points, px, py) if chart.bands else _dots(chart, one, points, px, py))
        at = [[round(px(x), 1), k if chart.x_names else x, float(f"{p.mean:.4g}")] for k, x, p in points]
        hover.append({"label": one.label, "ink": one.ink, "points": at})
    data: dict[str, Any] = {"x": chart.x_label, "percent": chart.percent, "series": hover}
    data |= {"names": list(chart.x_names)} if chart.x_names else {}
    said = escape(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    label = f"{chart.title}: {chart.y_label} over {chart.x_label}"
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" data-hover="{said}">'
        f"{''.join(out)}</svg>"
    )  # everything that is text is escaped


def _reach(values: Sequence[float], zero: bool) -> tuple[float, float]:
    reach = [*values, 0.0] if zero else values
    return min(reach), max(reach)


def _dots(
    chart: Spreads, one: Series, points: Sequence[tuple[int, float, Spread]], px: Scale, py: Scale
) -> str:
    dash = " dash1" if one.hollow else ""
    out = []
    for k, x, p in points:
        cx, cy = px(x), py(p.mean)
        path = f"M{cx:.1f} {py(p.low):.1f}V{py(p.high):.1f}"
        said = p.text(chart.percent)
        if one.across:
            wide = one.across[k]
            path += f"M{px(wide.low):.1f} {cy:.1f}H{px(wide.high):.1f}"
            said = f"{wide.text()} · {said}"
        name = f"{chart.x_names[k]}, {one.label}" if chart.x_names else one.label
        hollow = " hollow" if one.hollow else ""
        out.append(
            f'<g class="ink{one.ink}"><title>{escape(f"{name}: {said}")}</title>'
            f'<path class="whisker{dash}" d="{path}"/>'
            f'<circle class="ink{one.ink}{hollow}" cx="{cx:.1f}" cy="{cy:.1f}" r="4.5"/></g>'
        )
    return "".join(out)


def _band(one: Series, points: Sequence[tuple[int, float, Spread]], px: Scale, py: Scale) -> str:
    if not points:
        return ""
    above = [f"{px(x):.1f} {py(p.high):.1f}" for _, x, p in points]
    below = [f"{px(x):.1f} {py(p.low):.1f}" for _, x, p in reversed(points)]
    line = [f"{px(x):.1f} {py(p.mean):.1f}" for _, x, p in points]
    return (
        f'<path class="band ink{one.ink}" d="M{"L".join([*above, *below])}Z"/>'
        f'<path class="line ink{one.ink} dash{one.dash}" d="M{"L".join(line)}"/>'
    )
