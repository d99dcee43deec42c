"""The instruments that have a part in the report: which modules, and in which order."""

from __future__ import annotations

from collections.abc import Callable

from liubai.report import (
    attention,
    bridge,
    hallucination,
    paths,
    scaling,
    thinker,
    unread,
    verse,
    whitebox,
)
from liubai.report.read import Run
from liubai.report.section import Section

#: each gives its part, or ``None`` where the recipe did not ask for it
INSTRUMENTS: tuple[Callable[[Run], Section | None], ...] = (
    thinker.section,
    paths.section,
    bridge.section,
    hallucination.section,
    verse.section,
    scaling.section,
    attention.section,
    unread.section,
    whitebox.section,
)


def sections(run: Run) -> list[Section]:
    return [part for make in INSTRUMENTS if (part := make(run)) is not None]
