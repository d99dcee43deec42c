"""A part of the report that an instrument adds: a heading, a sentence that says the finding, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from liubai.report.svg import Chart


@dataclass(frozen=True, slots=True)
class Section:
    """``body`` is finished HTML of the instrument's own (everything in it escaped), below the charts;
    ``script`` is JavaScript of its own, which the page's policy allows by its hash."""

    id: str
    title: str
    chinese: str
    finding: str
    charts: Sequence[Chart] = ()
    body: Markup | None = None
    script: str = ""
