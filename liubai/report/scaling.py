"""What more compute buys, from scaling.json: points, the forms that fit, and what can be said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from liubai.report.read import Curve, Run, number, read_object
from liubai.report.section import Section
from liubai.report.svg import Chart, Line

#: (ink, dash) of the points, of the best form, and of others that the data cannot tell from it
LOOKS = {"points": (1, 0), "sigmoid": (0, 0), "saturating": (3, 1), "power": (2, 2)}
SHOWN = 8  #: series that are drawn


def section(run: Run) -> Section | None:
    """``None`` when no stage has fitted and nobody has kept the fits of `liubai scaling RUN --keep`."""
    told = [stage.result for stage in run.of_kind("scaling")]
    told.append(read_object(run.path / "scaling.json", run.notes))
    series = [one for found in told if found for one in found.get("series", []) if isinstance(one, dict)]
    if not series:
        return None
    fitted = [one for one in series if one.get("fits")]
    charts = [_chart(i, one) for i, one in enumerate(fitted[:SHOWN])]
    return Section("scaling", "What more compute buys", "算力所得", _finding(fitted), charts, _words(series))


def _finding(fitted: Sequence[dict[str, Any]]) -> str:
    """The first sentence on the first series that has one."""
    for one in fitted:
        if one.get("words"):
            return f"{one.get('series') or 'points'}: {one['words'][0]}"
    return "No series has enough points for a fit."


def _chart(place: int, one: dict[str, Any]) -> Chart:
    share = bool(one.get("share"))
    points = [(x, y) for x, y, *_ in one.get("points", []) if number(x) and number(y) is not None]
    unit, name = _unit(min((x for x, _ in points), default=1.0))
    xs, ys = tuple(x / unit for x, _ in points), tuple(y for _, y in points)
    order = sorted(range(len(xs)), key=xs.__getitem__)
    ink, dash = LOOKS["points"]
    # a dot each and no line between them: the line is the form's
    dots = [Line("measured", _dots([xs[i] for i in order], [ys[i] for i in order]), ink, dash, dots=True)]
    forms, edges = [], []
    for fit in one.get("fits", []):
        if (drawn := fit.get("curve")) and fit["form"] in LOOKS and _close(one, fit):
            ink, dash = LOOKS[fit["form"]]
            top = 3 * max(xs, default=1.0) * unit
            at = [i for i, x in enumerate(drawn[0]) if x <= top]
            curve = Curve(tuple(drawn[0][i] / unit for i in at), tuple(drawn[1][i] for i in at))
            forms.append(Line(str(fit["form"]), curve, ink, dash))
            if fit is one["fits"][0] and len(drawn) == 4:
                edges = [_edge(drawn, end, at, unit, ink) for end in (2, 3)]
    band = "; the dash-dotted lines are the 95 % band of the form that fits best" if edges else ""
    which = " or ".join(line.label for line in forms)
    return Chart(
        f"scaling-{place}",
        f"{one.get('series') or 'Points'}: {which}{'?' if len(forms) > 1 else ''}",
        f"{len(points)} points{band}.",
        "share that is right (%)" if share else "loss",
        [*edges, *forms, *dots],
        x_label=f"{one.get('axis', 'x')}{name}, log scale",
        percent=share,
        zero=share,
        log_x=True,
        keys=[*dots, *forms],
    )


def _close(one: dict[str, Any], fit: dict[str, Any]) -> bool:
    """The best, or one that the data cannot tell from it."""
    return fit is one["fits"][0] or fit["form"] in one.get("alike", [])


def _edge(drawn: list[list[float]], end: int, at: list[int], unit: float, ink: int) -> Line:
    xs, ys = tuple(drawn[0][i] / unit for i in at), tuple(drawn[end][i] for i in at)
    return Line(("lower", "upper")[end - 2] + " end of the band", Curve(xs, ys), ink, 3)


def _dots(xs: Sequence[float], ys: Sequence[float]) -> Curve:
    """Points with a gap after each, so that nothing joins them."""
    gaps = [(x, y) for pair in zip(xs, ys, strict=True) for x, y in (pair, (pair[0], None))]
    return Curve(tuple(x for x, _ in gaps), tuple(y for _, y in gaps))


def _unit(smallest: float) -> tuple[float, str]:
    """A power of a thousand to count x in, and how to say so; 1 for the tokens of an answer."""
    power = 3 * math.floor(math.log10(smallest) / 3)
    return (10.0**power, f" × 10{_raised(power)}") if power >= 6 else (1.0, "")


def _raised(power: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(power))


def _words(series: Sequence[dict[str, Any]]) -> Markup:
    rows, notes = [], []
    for one in series:
        name = escape(one.get("series") or "points")
        for fit in one.get("fits", []):
            numbers = ", ".join(_parameter(fit, key, value) for key, value in fit["params"].items())
            rows.append(
                f'<tr><th scope="row">{name}</th><td>{escape(fit["form"])}</td><td>{escape(numbers)}</td>'
                f"<td>{_aicc(fit)}</td></tr>"
            )
        said = " ".join(str(escape(words)) for words in one.get("words", []))
        notes.append(f"<li><b>{name}</b> {said}</li>")
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("series", "form", "parameters", "AICc"))
    table = (
        '<div class="scroll"><table class="numbers small"><caption>Forms, and their parameters with 95 % '
        f"intervals</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    return Markup((table if rows else "") + f"<ul>{''.join(notes)}</ul>")


def _parameter(fit: dict[str, Any], key: str, value: float) -> str:
    low, high = fit.get("intervals", {}).get(key, (value, value))
    return f"{key} {value:.3g} [{low:.3g}, {high:.3g}]"


def _aicc(fit: dict[str, Any]) -> str:
    value = number(fit.get("aicc"))
    return "–" if value is None else f"{value:.1f}".replace("-", "−")
