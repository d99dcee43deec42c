"""Line charts as inline SVG: no script needed to read them, colours from the page's style sheet.

A chart is drawn in a box of 400 × 268 units and scaled by the page, so its text is sized in the
same units. Labels never meet because the legend stands outside, in HTML. Left out: everything but
lines, dots and vertical marks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

from liubai.report.read import Curve
from liubai.report.story import smooth, wide, window

Scale = Callable[[float], float]  #: from a value to its place in the box

WIDTH, HEIGHT = 400, 268
LEFT, RIGHT, TOP, BOTTOM, ROW = 48, 14, 28, 42, 17
LETTER = 8.5  #: units of a letter's width, about
LEAST_SHARE = 0.02  #: the least span of an axis of shares
MOST_POINTS = 400  #: longer curves are averaged in buckets; a chart has no more pixels than that


@dataclass(frozen=True, slots=True)
class Line:
    """``ink`` is a colour and ``dash`` a pattern of the style sheet.

    ``noisy`` draws the points faintly with their moving mean on top; ``dots`` marks each point; ``errors``
    are the half-lengths of bars, as many as there are points, or none.
    """

    label: str
    curve: Curve
    ink: int = 0
    dash: int = 0
    noisy: bool = False
    dots: bool = False
    errors: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at ``x`` with a label at its top."""

    x: float
    label: str
    ink: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel. ``percent`` shows shares as percentages; ``zero`` keeps 0 on the y axis."""

    id: str
    title: str
    caption: str
    y_label: str
    lines: Sequence[Line]
    x_label: str = "step"
    percent: bool = False
    zero: bool = True
    log_x: bool = False
    x_names: Sequence[str] = ()  #: what stands at x = 0, 1, 2 … in place of a scale
    marks: Sequence[Mark] = field(default_factory=tuple)
    keys: Sequence[Line] = ()  #: a shorter legend than one entry a line

    @property
    def legend(self) -> Sequence[Line]:
        """What the legend names; nothing when there is a single line."""
        return self.keys or (self.lines if len(self.lines) > 1 else ())

    @property
    def svg(self) -> Markup:
        return _draw(self)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high], roughly ``about`` steps of 1, 2, 2.5 or 5 × 10ⁿ."""
    if not high > low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def y_scale(values: Sequence[float], zero: bool, percent: bool) -> list[float]:
    """The ticks of a y axis. One of shares spans two points at least: what moves less is no movement to be
    shown as one, and its ticks would be rounding errors."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if percent and high - low < LEAST_SHARE:
        bound = 1.0 if high < 1 + LEAST_SHARE / 10 else math.inf  # 1.00000004 is 1
        high = min(bound, math.ceil((low + LEAST_SHARE) / LEAST_SHARE - 1e-3) * LEAST_SHARE)
        low = high - LEAST_SHARE if high - LEAST_SHARE <= low else high - 2 * LEAST_SHARE
    ticks = nice_ticks(low, high)
    return [t for t in ticks if t <= 1 + 1e-9] if percent and max(values) <= 1 + 1e-6 else ticks


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Powers of two inside [low, high]; powers of ten where those are more than ``most``, or long to say."""
    twos = [2.0**i for i in range(130) if low <= 2**i <= high]
    tens = [10.0**i for i in range(-12, 40) if low <= 10.0**i <= high]
    if twos and len(twos) <= most and twos[-1] < 1e4:
        return twos
    return tens or twos[:most] or [low]


def tick_text(value: float, ticks: Sequence[float], percent: bool = False) -> str:
    """``value`` with as many decimals as tell the ticks apart; 12k and 3M for large numbers."""
    scale = 100 if percent else 1
    step = abs(ticks[1] - ticks[0]) * scale if len(ticks) > 1 else 1.0
    value, largest = value * scale, max(map(abs, ticks)) * scale
    if value == 0:
        return "0%" if percent else "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= size:
            base = 1e3 if unit == "k" else size
            return f"{value / base:.{_decimals(step / base)}f}{unit}".replace("-", "−")
    if largest < 1e-3:
        values = [t * scale for t in ticks]
        exact = (d for d in range(3) if all(abs(float(f"{v:.{d}e}") - v) < step / 1e3 for v in values))
        return f"{value:.{next(exact, 3)}e}".replace("e-0", "e-").replace("-", "−")
    text = f"{value:.{_decimals(step)}f}".replace("-", "−")
    return f"{text}%" if percent else text


def log_tick_text(value: float, ticks: Sequence[float]) -> str:
    """``value`` in the unit of the largest of ``ticks``, with the decimals that it needs; as a power of ten
    where those would be many."""
    largest = max(ticks)
    base, unit = next(
        ((b, u) for size, b, u in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")) if largest >= size),
        (1.0, ""),
    )
    if min(ticks) / base < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")
    return f"{value / base:.4g}{unit}"


def _decimals(step: float) -> int:
    """Decimals that write a multiple of ``step`` exactly: 0.25 needs two, 0.2 one."""
    return next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * 10**d * step), 6)


def shortened(names: Sequence[str]) -> list[str]:
    """``names`` cut to what fits side by side under a chart. Where beginnings do not tell them apart, the
    middle goes: numbers are at the end."""
    room = max(3, int((WIDTH - LEFT - RIGHT) / max(1, len(names)) / LETTER))
    heads = [_cut(name, room) for name in names]
    if len(set(heads)) == len(set(names)):
        return heads
    return [_cut(name, room, tail=room // 3) for name in names]


def _cut(name: str, room: int, tail: int = 0) -> str:
    if wide(name) <= room:
        return name
    head, end = name, name[len(name) - tail :]
    while head and wide(head + end) >= room:
        head = head[:-1]
    return f"{head.rstrip(' (+_-')}…{end}"


def thin(curve: Curve) -> Curve:
    """At most :data:`MOST_POINTS` points: neighbours are averaged, gaps stay where a bucket is empty."""
    n = len(curve.xs)
    if n <= MOST_POINTS:
        return curve
    xs, ys = [], []
    for b in range(MOST_POINTS):
        lo, hi = b * n // MOST_POINTS, (b + 1) * n // MOST_POINTS
        known = [y for y in curve.ys[lo:hi] if y is not None]
        xs.append(curve.xs[(lo + hi - 1) // 2])
        ys.append(sum(known) / len(known) if known else None)
    return Curve(tuple(xs), tuple(ys))


def _draw(chart: Chart) -> Markup:
    lines = [line for line in chart.lines if line.curve]
    if not lines:
        return Markup('<p class="none">Nothing was measured.</p>')
    xs = [x for line in lines for x, _ in line.curve.known]
    ys = [y for line in lines for _, y in _shown(line).known]
    ys += [y + sign * error for line in lines for _, y, error in _barred(line) for sign in (-1, 1)]
    x_low, x_high = (-0.5, len(chart.x_names) - 0.5) if chart.x_names else (min(xs), max(xs))
    y_ticks = y_scale(ys, chart.zero, chart.percent)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys))

    # The labels of the marks have the rows between the y label and the plot to themselves.
    top = TOP + ROW * len(chart.marks)

    def px(x: float) -> float:
        a, b, v = (math.log(x_low), math.log(x_high), math.log(x)) if chart.log_x else (x_low, x_high, x)
        share = (v - a) / (b - a) if b > a else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        # One wild point must not throw the line out of the box: the moving mean sets the range.
        share = min(max((y - y_low) / (y_high - y_low), -0.02), 1.03)
        return HEIGHT - BOTTOM - share * (HEIGHT - top - BOTTOM)

    out = [_axes(chart, x_low, x_high, y_ticks, px, py)]
    out += [_mark(mark, i, px) for i, mark in enumerate(chart.marks)]
    out += [_bars(line, px, py) + _path(line, px, py) for line in lines]
    label = f"{chart.title}: {chart.y_label} over {chart.x_label}"
    data = escape(json.dumps(_hover(chart, lines, px), ensure_ascii=False, separators=(",", ":")))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-hover="{data}">{"".join(out)}</svg>'
    )


def _shown(line: Line) -> Curve:
    """What sets the range of the y axis: for noisy lines the mean and its near neighbourhood."""
    if not line.noisy:
        return line.curve
    known = sorted(y for _, y in line.curve.known)
    cut = len(known) // 50  # the outermost 2 % at either end may touch the edge
    low, high = known[cut], known[-1 - cut]
    mean = smooth(line.curve)
    inside = [y if y is None else min(max(y, low), high) for y in line.curve.ys]
    return Curve(mean.xs + line.curve.xs, mean.ys + tuple(inside))


def _axes(chart: Chart, x_low: float, x_high: float, y_ticks: list[float], px: Scale, py: Scale) -> str:
    out = [f'<text class="ylab" x="2" y="12">{escape(chart.y_label)}</text>']
    for t in y_ticks:
        y = py(t)
        kind = "base" if t == y_ticks[0] else "grid"
        out.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = tick_text(t, y_ticks, chart.percent)
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{text}</text>')
    if chart.log_x:
        ticks = log_ticks(x_low, x_high)
    else:
        ticks = [t for t in nice_ticks(x_low, x_high, 5) if x_low - 1e-9 <= t <= x_high + 1e-9]
        if chart.x_label == "step":  # a short run must not show half steps
            ticks = [t for t in ticks if t == round(t)]
        ticks = [x_low] if x_low == x_high else ticks
    names = dict(enumerate(shortened(chart.x_names)))
    for t in names or ticks:
        text = log_tick_text(t, ticks) if chart.log_x else tick_text(t, ticks)
        text = escape(names[int(t)]) if names else text
        y = HEIGHT - BOTTOM + 17
        out.append(f'<text class="tick" text-anchor="middle" x="{px(t):.1f}" y="{y}">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="xlab" text-anchor="middle" x="{middle}" y="{HEIGHT - 5}">')
    out.append(f"{escape(chart.x_label)}</text>")
    return "".join(out)


def _mark(mark: Mark, row: int, px: Scale) -> str:
    x = px(mark.x)
    right = x < LEFT + 0.6 * (WIDTH - LEFT - RIGHT)
    anchor, dx = ("start", -2) if right else ("end", 2)
    y = TOP + 6 + ROW * row  # a row each, so that the labels of several stages do not meet
    return (
        f'<g class="mark ink{mark.ink}" data-step="{mark.x:g}">'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 4}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text text-anchor="{anchor}" x="{x + dx:.1f}" y="{y}">{escape(mark.label)}</text></g>'
    )


def _barred(line: Line) -> list[tuple[float, float, float]]:
    """(x, y, error) of each point that has an error."""
    points = zip(line.curve.xs, line.curve.ys, line.errors, strict=True) if line.errors else ()
    return [(x, y, error) for x, y, error in points if y is not None and math.isfinite(error)]


def _bars(line: Line, px: Scale, py: Scale) -> str:
    """From one error below to one above, under the line."""
    strokes = (f"M{px(x):.1f} {py(y - error):.1f}V{py(y + error):.1f}" for x, y, error in _barred(line))
    path = "".join(strokes)
    return f'<path class="raw bars ink{line.ink}" d="{path}"/>' if path else ""


def _path(line: Line, px: Scale, py: Scale) -> str:
    style = f"ink{line.ink} dash{line.dash}"
    raw = thin(line.curve)
    if not line.noisy or window(len(line.curve.xs)) == 1:
        return _strokes(raw, f"line {style}", line.dots, px, py)
    return _strokes(raw, f"raw ink{line.ink}", False, px, py) + _strokes(
        thin(smooth(line.curve)), f"line {style}", line.dots, px, py
    )


def _strokes(curve: Curve, style: str, dots: bool, px: Scale, py: Scale) -> str:
    """One path, broken at gaps; a point with no neighbour is a dot, or it could not be seen."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.xs, curve.ys, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((px(x), py(y)))
    path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in piece) for piece in pieces if len(piece) > 1)
    circles = [p for piece in pieces if dots or len(piece) == 1 for p in piece]
    out = f'<path class="{style}" d="{path}"/>' if path else ""
    ink = next(word for word in style.split() if word.startswith("ink"))
    return out + "".join(f'<circle class="{ink}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in circles)


def _hover(chart: Chart, lines: Sequence[Line], px: Scale) -> dict[str, object]:
    """What the pointer shows: per line its places in pixels and its values, as measured."""
    series = []
    for line in lines:
        known = thin(line.curve).known
        points = [[round(px(x), 1), float(f"{x:.6g}"), float(f"{y:.4g}")] for x, y in known]
        series.append({"label": line.label, "ink": line.ink, "points": points})
    data: dict[str, object] = {"x": chart.x_label, "percent": chart.percent, "series": series}
    return data | ({"names": list(chart.x_names)} if chart.x_names else {})
