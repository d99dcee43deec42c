"""What the layers do to the tokens, from whitebox.json: sparsity and coding rates by layer."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from liubai.report.charts import stage_style
from liubai.report.read import Curve, Run, number
from liubai.report.section import Section
from liubai.report.story import show
from liubai.report.svg import Chart, Line

SILENT = (
    " Silent is a unit of CRATE's code that is zero, and of a Transformer, where none is, one below a "
    "hundredth of its layer's largest."
)


def section(run: Run) -> Section | None:
    """``None`` when no stage has looked."""
    found = [told for stage in run.of_kind("whitebox") if (told := stage.result)]
    if not found:
        return None
    charts = [
        _chart("sparsity", "How much of each layer is silent", "silent units (%)", found, SILENT, True),
        _chart("rate", "How widely the tokens spread", "nats a token", found),
        _compression(found),
    ]
    shown = [chart for chart in charts if chart.lines]
    return Section("white-box", "Inside the layers", "层中所见", _finding(found), shown, _words(found))


def _layers(told: dict[str, Any], key: str) -> list[float | None]:
    return [number(layer.get(key)) for layer in told.get("layers", [])]


def _chart(
    key: str, title: str, unit: str, found: list[dict[str, Any]], more: str = "", percent: bool = False
) -> Chart:
    lines = []
    for place, told in enumerate(found):
        values = _layers(told, key)
        if all(v is None for v in values):
            continue
        ink, dash = stage_style(place)
        xs = tuple(float(i + 1) for i in range(len(values)))
        lines.append(Line(str(told.get("label", "")), Curve(xs, tuple(values)), ink, dash, dots=True))
    caption = "Questions and the model's own answers, all their tokens together." + more
    return Chart(f"white-box-{key}", title, caption, unit, lines, x_label="layer", percent=percent)


def _compression(found: list[dict[str, Any]]) -> Chart:
    """Two lines a model: colour is the model, and the broken one is before attention."""
    lines = []
    for place, told in enumerate(found):
        for key, said, dash in (("before", "before attention", 1), ("compressed", "after it", 0)):
            values = _layers(told, key)
            if all(v is None for v in values):
                continue
            xs = tuple(float(i + 1) for i in range(len(values)))
            label = f"{told.get('label', '')}, {said}"
            lines.append(Line(label, Curve(xs, tuple(values)), stage_style(place)[0], dash, dots=True))
    return Chart(
        "white-box-compressed",
        "What attention finds and leaves in the subspaces",
        "The coding rate within the heads' subspaces. Where the whole line lies under the broken one, "
        "attention has compressed.",
        "nats a token",
        lines,
        x_label="layer",
    )


def _finding(found: list[dict[str, Any]]) -> str:
    means = [
        (str(told.get("label", "")), sum(known) / len(known))
        for told in found
        if (known := [v for v in _layers(told, "sparsity") if v is not None])
    ]
    listed = ", ".join(f"{name} {show(mean, '%', 0)}" for name, mean in means)
    return f"Silent units, the mean of the layers: {listed}.{_lowered(found)}"


def _lowered(found: list[dict[str, Any]]) -> str:
    """In how many layers attention compresses; nothing without subspaces."""
    parts = []
    for told in found:
        pairs = zip(_layers(told, "before"), _layers(told, "compressed"), strict=True)
        known = [(before, after) for before, after in pairs if before is not None and after is not None]
        if known:
            parts.append(f"{told.get('label', '')} {sum(a < b for b, a in known)} of {len(known)}")
    if not parts:
        return ""
    return f" Layers whose attention lowers the coding rate in its subspaces: {', '.join(parts)}."


def _words(found: list[dict[str, Any]]) -> Markup | None:
    """Some atoms of each dictionary, by the words that lie closest to them."""
    parts = []
    for told in found:
        for i, layer in enumerate(told.get("layers", []), 1):
            for words in layer.get("atoms", [])[:4]:
                said = " · ".join(str(escape(word)) for word in words)
                parts.append(f"<li>{escape(told.get('label', ''))}, layer {i}: {said}</li>")
    if not parts:
        return None
    return Markup(f"<p>Atoms of the dictionaries, by the words closest to them:</p><ul>{''.join(parts)}</ul>")
