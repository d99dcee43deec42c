"""The attention atlas in the report, from attention.json: who does what, since when, and how it looks."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

from markupsafe import Markup, escape

from liubai.measure.attention import KINDS
from liubai.report.charts import stage_style
from liubai.report.read import Curve, Run, number
from liubai.report.section import Section
from liubai.report.story import show
from liubai.report.svg import Chart, Line

#: a head does not live for something on which it has less of its weight than this, beyond chance: beyond what
#: one that looks everywhere alike has there
GOOD = 0.3
INK = (0x17, 0x35, 0x5E)  #: the colour of a weight of 1; 0 is white


def section(run: Run) -> Section | None:
    """``None`` when no stage has looked."""
    found = [told for stage in run.of_kind("attention") if (told := stage.result)]
    if not found:
        return None
    charts = [chart for place, told in enumerate(found) for chart in _charts(place, told)]
    body = Markup("").join(_body(place, told) for place, told in enumerate(found))
    return Section("attention", "What the heads look at", "各头所观", _finding(found[-1]), charts, body)


def _finding(told: dict[str, Any]) -> str:
    parts = [
        f"{kind} ({KINDS[kind]}): head {b['layer'] + 1}.{b['head'] + 1}, {_share(b['score'])} of its weight"
        f"{_by_chance(told, kind)}"
        for kind, b in told.get("best", {}).items()
        if kind in KINDS and b["score"] - (_chance(told, kind) or 0) >= GOOD
    ]
    if not parts:
        return "No head of this model has specialised in anything that is measured here."
    return f"Nobody told the heads of {told.get('label', 'this model')} what to do. Now: {'; '.join(parts)}."


def _chance(told: dict[str, Any], kind: str) -> float | None:
    """``None`` in results of before it was kept."""
    return number(told.get("chance", {}).get(kind))


def _by_chance(told: dict[str, Any], kind: str) -> str:
    chance = _chance(told, kind)
    return "" if chance is None else f" (by chance {_share(chance)})"


def _best(table: Any) -> float | None:
    values = [v for row in table or [] for cell in row if (v := number(cell)) is not None]
    return max(values) if values else None


def _mean(table: Any) -> float | None:
    values = [v for row in table or [] for cell in row if (v := number(cell)) is not None]
    return sum(values) / len(values) if values else None


def _charts(place: int, told: dict[str, Any]) -> list[Chart]:
    """How the division of labour arose; nothing without snapshots."""
    history = told.get("history", [])
    if len(history) < 2:
        return []
    label = str(told.get("label", ""))
    chance = ", ".join(f"{kind} {_share(c)}" for kind in KINDS if (c := _chance(told, kind)) is not None)
    xs = tuple(float(h["step"]) for h in history)

    def lines(group: str, names: list[str], of: Any) -> list[Line]:
        found = []
        for i, name in enumerate(names):
            ys = tuple(of(h.get(group, {}).get(name)) for h in history)
            if any(y is not None for y in ys):
                ink, dash = stage_style(i)
                found.append(Line(name, Curve(xs, ys), ink, dash, dots=True))
        return found

    return [
        Chart(
            f"attention-rise-{place}",
            f"The heads of {label} divide the labour",
            "The best head at each thing, on the same texts, at checkpoints of pre-training."
            + (f" One that looks everywhere alike: {chance}." if chance else ""),
            "share of its weight",
            lines("scores", list(KINDS), _best),
            x_label="step of pre-training",
            percent=True,
        ),
        Chart(
            f"attention-spaces-{place}",
            "What Q, K and V read",
            "Mean over heads: overlap of row spaces (1: the same), and how nearly a head copies.",
            "overlap",
            lines("subspaces", ["q·k", "k·v", "v·embedding", "copy"], _mean),
            x_label="step of pre-training",
        ),
    ]


def _body(place: int, told: dict[str, Any]) -> Markup:
    """The table of heads, and every head's pattern, small and large."""
    scores, silent, errors = (told.get(key) or {} for key in ("scores", "ablation", "ablation_error"))
    kinds = [k for k in KINDS if _best(scores.get(k)) is not None]
    head_row = "".join(f'<th scope="col" title="{escape(KINDS[k])}">{k}</th>' for k in kinds)
    rows = []
    for layer, cells in enumerate(silent):
        for head, lost in enumerate(cells):
            told_of = "".join(f"<td>{_cell(scores[k][layer][head], _chance(told, k))}</td>" for k in kinds)
            error = number(errors[layer][head]) if errors else None
            without = f"{number(lost) or 0:+.3f}" + (f" ± {2 * error:.3f}" if error is not None else "")
            rows.append(f'<tr><th scope="row">{layer + 1}.{head + 1}</th>{told_of}<td>{without}</td></tr>')
    if any(_chance(told, k) is not None for k in kinds):
        by_chance = "".join(f"<td>{_share(_chance(told, k))}</td>" for k in kinds)
        rows.append(f'<tr><th scope="row">by chance</th>{by_chance}<td></td></tr>')
    table = (
        '<div class="scroll" tabindex="0"><table class="numbers small"><caption><span>'
        f"{escape(told.get('label', ''))}: where each head's weight goes, and the nats a token that its "
        "answers lose when it is silent (± twice the standard error)</span></caption>"
        f'<thead><tr><th scope="col">head</th>{head_row}<th scope="col">without it</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    texts = Markup("").join(_pictures(text) for text in told.get("texts", []))
    return Markup(table) + texts  # everything in it is a number or escaped


def _cell(value: Any, chance: float | None) -> str:
    known = number(value)
    lives_for_it = known is not None and known - (chance or 0) >= GOOD
    return f"<b>{_share(known)}</b>" if lives_for_it else _share(known)


def _share(value: float | None) -> str:
    return "–" if value is None else show(value, "%", 0)


def _pictures(text: dict[str, Any]) -> Markup:
    layers, heads, T, _ = text["shape"]
    weights = zlib.decompress(base64.b64decode(text["patterns"]))
    tokens = [str(token) for token in text["tokens"]]
    length = int(number(text.get("length")) or T)
    figures = []
    for layer in range(layers):
        for head in range(heads):
            at = (layer * heads + head) * T * T
            source = picture(weights[at : at + T * T], T)
            name = f"layer {layer + 1}, head {head + 1}"
            figures.append(
                f'<details><summary><img alt="attention of {name}" src="{source}" width="{T}" height="{T}">'
                f"<span>{layer + 1}.{head + 1}</span></summary>{_large(name, source, tokens)}</details>"
            )
    said, cut = escape(" ".join(tokens)), f" (its first {T} tokens of {length})" if length > T else ""
    return Markup(
        '<p class="note">Each square is a head on one text: a row a token that looks, a column a token that '
        f"is looked at, the stronger the more weight. Open one to read it. The text{cut}: <q>{said}</q></p>"
        f'<div class="atlas">{"".join(figures)}</div>'
    )


def _large(name: str, source: str, tokens: list[str]) -> str:
    """One head with its tokens along both sides, as SVG around the same picture."""
    T, cell = len(tokens), 11
    side, room = T * cell, 64
    names = [
        f'<text x="{room - 4}" y="{room + i * cell + 9}" text-anchor="end">{escape(t[:9])}</text>'
        f'<text transform="translate({room + i * cell + 9},{room - 4}) rotate(-90)">{escape(t[:9])}</text>'
        for i, t in enumerate(tokens)
    ]
    return (
        f'<div class="scroll" tabindex="0"><svg class="large" role="img" aria-label="attention of {name}" '
        f'viewBox="0 0 {room + side} {room + side}" width="{room + side}" height="{room + side}">'
        f'<image href="{source}" x="{room}" y="{room}" width="{side}" height="{side}"/>'
        f"{''.join(names)}</svg></div>"
    )


def picture(weights: bytes, side: int) -> str:
    """``side × side`` weights in bytes as a PNG, in a data URI: white for 0, ink for 255, by the root of the
    weight, so that small ones are seen, too."""
    ramp = [(w / 255) ** 0.5 for w in range(256)]
    palette = b"".join(bytes(round(255 + (ink - 255) * r) for ink in INK) for r in ramp)
    rows = b"".join(b"\x00" + weights[i * side : (i + 1) * side] for i in range(side))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 3, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette)
    png += chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
