"""The same question answered at several checkpoints, as safe HTML.

Model text is untrusted: it is escaped piece by piece, and only our own spans are markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from liubai.measure.reflection import reflection_spans, thought_span
from liubai.report.read import Stage, number
from liubai.report.story import take_off

MOST_COLUMNS, MOST_QUESTIONS = 4, 6
_TAG = re.compile(r"</?(?:think|answer)>|<\|[\w ]+\|>")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one checkpoint. ``body`` is escaped and marked up."""

    step: int
    body: Markup
    correct: bool
    answer: str | None
    tokens: int | None
    cut_off: bool
    reflections: int


@dataclass(frozen=True, slots=True)
class Question:
    """A probe prompt and its answers, in step order."""

    prompt: Markup
    answers: Sequence[Answer]


def probe_questions(stage: Stage) -> list[Question]:
    """The probe samples of an rl stage, by question, at up to four of its evaluations."""
    kept: dict[Any, dict[int, dict[str, Any]]] = {}
    for sample in stage.samples:
        step = number(sample.get("step"))
        if sample.get("probe") is True and step is not None:
            # str: the problem's number, whatever its type; a resumed run may repeat it: last wins
            kept.setdefault(str(sample.get("problem")), {})[int(step)] = sample
    steps = chosen_steps(
        sorted({step for by_step in kept.values() for step in by_step}),
        take_off(stage.curve("reflections")),
    )
    questions = []
    for by_step in list(kept.values())[:MOST_QUESTIONS]:
        answers = [_answer(step, by_step[step]) for step in steps if step in by_step]
        if answers:
            prompt = str(next(iter(by_step.values())).get("prompt", ""))
            questions.append(Question(_marked(prompt, []), answers))
    return questions


def chosen_steps(steps: Sequence[int], takeoff: int | None) -> list[int]:
    """The first, the last, the first at or after the take-off, and the widest gap's middle."""
    if len(steps) <= MOST_COLUMNS:
        return list(steps)
    chosen = {steps[0], steps[-1]}
    if takeoff is not None:
        chosen |= {next((s for s in steps if s >= takeoff), steps[-1])}
    while len(chosen) < MOST_COLUMNS:
        rest = [s for s in steps if s not in chosen]
        chosen.add(max(rest, key=lambda s: min(abs(steps.index(s) - steps.index(c)) for c in chosen)))
    return sorted(chosen)


def _answer(step: int, sample: dict[str, Any]) -> Answer:
    text = str(sample.get("response", "")).strip()  # its outer blanks say nothing and cost a line
    spans = reflection_spans(text)
    answer, tokens = sample.get("answer"), number(sample.get("tokens"))
    return Answer(
        step,
        _marked(text, spans),
        sample.get("correct") is True,
        None if answer is None else str(answer),
        None if tokens is None else int(tokens),
        sample.get("stop") == "length",
        len(spans),
    )


def _marked(text: str, reflections: Sequence[tuple[int, int]]) -> Markup:
    """``text`` escaped, with tags, reflection words and the thought wrapped in spans."""
    spans = [(a, b, "wait") for a, b in reflections]
    spans += [(m.start(), m.end(), "tag") for m in _TAG.finditer(text)]
    _, end = thought_span(text)
    pieces: list[str] = []
    at = 0
    for a, b, name in sorted(spans):
        pieces += [_plain(text, at, a, end), f'<span class="{name}">{escape(text[a:b])}</span>']
        at = b
    pieces.append(_plain(text, at, len(text), end))
    return Markup("".join(pieces))


def _plain(text: str, a: int, b: int, end: int) -> str:
    """``text[a:b]`` escaped; the part after the thought stands out, for it is what is graded."""
    piece = str(escape(text[a:b]))
    return f'<span class="said">{piece}</span>' if piece.strip() and a > end else piece
