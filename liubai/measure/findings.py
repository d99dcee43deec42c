"""What was found about questions, as text: one entry for each mistake, with the lines that have it."""

from __future__ import annotations

import textwrap

from liubai.measure.soundness import Soundness

#: lines of the file that are named; the others are counted
NAMED = 8


def describe(path: str, found: Soundness, width: int | None = None) -> str:
    """The table of `liubai check`; what is wrong comes first. Lines are as long as they are without a
    ``width``, so that a file or a pipe gets one entry a line."""
    entries = [f"{path}: {found.train} to train on, {found.held_out} held out, {found.left_out} left out"]
    entries += [f"  '{name}': {1000 * mean:.1f} ms a verdict" for name, mean in found.seconds.items()]
    grouped: dict[tuple[bool, str, str], list[int]] = {}
    for f in sorted(found.findings, key=lambda f: not f.fatal):
        grouped.setdefault((f.fatal, f.kind, f.message), []).append(f.line)
    entries += [
        f"  {_lines(lines)}: {'WRONG ' if fatal else ''}{kind}: {message}"
        for (fatal, kind, message), lines in grouped.items()
    ]
    entries.append("sound" if found.sound else "not sound: what is WRONG would be learned")
    if width:
        entries = [textwrap.fill(entry, max(width, 30), subsequent_indent="    ") for entry in entries]
    return "\n".join(entries)


def _lines(lines: list[int]) -> str:
    numbers = list(dict.fromkeys(line for line in lines if line))
    if not numbers:
        return "all"
    rest = len(numbers) - NAMED
    named = ", ".join(map(str, numbers[:NAMED])) + (f" and {rest} more" if rest > 0 else "")
    return f"line {named}" if len(numbers) == 1 else f"lines {named}"
