"""One self-contained HTML page a run, its headline as plain text, and one figure as a PNG.

Names are loaded on first use: a command line that only prints ``--help`` pays for no template
engine, and no page needs matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liubai.report.figure import save_figure
    from liubai.report.page import write_report
    from liubai.report.terminal import damaged, headline

__all__ = ["damaged", "headline", "save_figure", "write_report"]

_HOMES = {"damaged": "terminal", "headline": "terminal", "save_figure": "figure", "write_report": "page"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
