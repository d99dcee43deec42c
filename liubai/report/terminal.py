"""What a run says, as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from liubai.report.read import read_run
from liubai.report.story import columns, evaluations, pair, show, wide


def headline(run: Path) -> str:
    """The headline table. Raises ``UserError`` when ``run`` is not a run folder.

    Two checkpoints read "before → after", a line a measure; more of them get a line each. Where no checkpoint
    was evaluated, what the instruments found.
    """
    read = read_run(run)
    evaluated = evaluations(read)
    if not evaluated:
        from liubai.report.instruments import sections  # some of them load torch

        found = [f"{part.title}: {part.finding}" for part in sections(read)]
        return "\n".join(found) or f"{read.name}: nothing has been evaluated yet"
    measures = columns(evaluated)
    both = pair(read)
    if both is not None and len(evaluated) == 2:
        before, after = both
        cells = [["", before.label, "", after.label]]
        cells += [
            [label, show(before.value(key), form), "→", show(after.value(key), form)]
            for key, label, form in measures
        ]
    else:
        cells = [["checkpoint", *(label for _, label, _ in measures)]]
        cells += [[e.label, *(show(e.value(key), form) for key, _, form in measures)] for e in evaluated]
    return align(cells)


def damaged(run: Path) -> list[str]:
    """What finished stages have lost: a sentence for each result that is not there or cannot be read. Raises
    ``UserError`` when ``run`` is not a run folder."""
    return read_run(run).damage


def align(cells: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first flush left; Chinese characters are two columns wide."""
    widths = [max(wide(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        pads = [" " * (w - wide(c)) for w, c in zip(widths, row, strict=True)]
        lines.append("  ".join([row[0] + pads[0], *(p + c for p, c in zip(pads[1:], row[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)
