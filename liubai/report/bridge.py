"""What thoughts are worth, from each bridge.json: the figures, and some thoughts step by step.

The part of a run's report, and a page of its own for a checkpoint without a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from liubai.files import write_text
from liubai.report.bridge_charts import Found, at, bits, charts, label
from liubai.report.bridge_draw import style
from liubai.report.bridge_view import tables, thoughts
from liubai.report.read import Run
from liubai.report.section import Section
from liubai.report.svg import Chart

HERE = Path(__file__).parent


def section(run: Run) -> Section | None:
    """``None`` when no stage has measured thoughts."""
    found = [told for stage in run.of_kind("bridge") if (told := stage.result)]
    return section_of(found) if found else None


def section_of(found: Sequence[Found]) -> Section:
    body = style(HERE / "bridge.css") + tables(found) + thoughts(found)
    return Section(
        "bridge", "The bridge from question to answer", "从问到答的桥", _finding(found), charts(found), body
    )


def write_alone(found: Sequence[Found], path: Path) -> Path:
    """A page of its own, for a checkpoint without a run. Atomic; returns ``path``."""
    part = section_of(found)
    figures = Markup("").join(_figure(chart) for chart in part.charts)
    page = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<title>{title} · Liubai 留白</title><style>{style}</style></head><body><main>"
        '<header><p class="seal"><span class="chop" lang="zh">留白</span> Liubai · {title}</p>'
        "<h1>{finding}</h1></header>"
        '<section id="bridge"><h2>{heading} <span lang="zh">{chinese}</span></h2>'
        '<div class="grid">{figures}</div>{body}</section></main></body></html>'
    ).format(
        title=", ".join(label(f) for f in found),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        finding=part.finding,
        heading=part.title,
        chinese=part.chinese,
        figures=figures,
        body=part.body,
    )
    write_text(path, page)
    return path


def _figure(chart: Chart) -> Markup:
    keys = Markup("").join(
        Markup(
            '<span class="key"><svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">'
            '<path class="line ink{} dash{}" d="M1 4H21"/></svg>{}</span>'
        ).format(line.ink, line.dash, line.label)
        for line in chart.legend
    )
    return Markup(
        '<figure class="chart" id="chart-{}"><h3>{}</h3><p class="legend">{}</p>{}'
        "<figcaption>{}</figcaption></figure>"
    ).format(chart.id, chart.title, keys, chart.svg, chart.caption)


def _finding(found: Sequence[Found]) -> str:
    parts = []
    for told in found:
        worth = at(told, "utility", "all")
        if worth is None:
            continue
        halves = [
            f"{bits(s.mean)} where the answer is {group}"
            for group in ("right", "wrong")
            if (s := at(told, "utility", group))
        ]
        between = f"{bits(worth.low)} to {bits(worth.high)}" if worth.sure else "of too few for an interval"
        about = f"{bits(worth.mean)} bits ({between})"
        parts.append(f"{label(told)} {about}, {' and '.join(halves)}")
    if not parts:
        return "There was no thought to measure."
    return f"By how much a thought makes a right answer likelier: {'; '.join(parts)}."
