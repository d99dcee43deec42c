"""What thoughts are worth: answers to held-out problems, each of whose thoughts is measured.

A stage of a recipe, and a library call; what is measured stands in :mod:`liubai.measure.bridge`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from liubai.errors import UserError
from liubai.files import write_json, write_text
from liubai.grade import GradeItem, GraderPool, Verdict, grade, is_bounded
from liubai.measure.bridge import Asked, Bridged, Written, bridge
from liubai.measure.bridge_figures import figures
from liubai.measure.bridge_gold import Gold, golds, normal
from liubai.measure.bridge_steps import Cutter, frame_of
from liubai.seeds import derive
from liubai.stages.config import Brought, Compute, FamilyName, Shares
from liubai.stages.context import Context
from liubai.stages.evaluate import COMPUTE, Evaluation, engine_for, evaluate, held_out_of
from liubai.text.tokenizer import END_THINK, THINK
from liubai.types import Problem, Stop

RESULT, THOUGHTS = "bridge.json", "thoughts.jsonl"
#: Thoughts that are shown: the first one about each of so many problems, turn by turn of the families.
SHOWN = 6

Progress = Callable[[int, int], None]


class Config(Brought, Compute):
    #: one family, or several with their shares of ``limit``
    problems: FamilyName | Shares = "countdown"
    label: str = ""
    limit: int = Field(64, gt=0, description="held-out problems")
    samples: int = Field(8, gt=0, description="thoughts a problem")
    max_tokens: int = Field(320, gt=0)
    temperature: float = Field(1.0, ge=0)
    slots: int = Field(256, gt=0)
    #: of the model's own answers to a problem, how many are followed beside the right ones
    answers: int = Field(4, ge=0)

    def families(self) -> Iterable[str]:
        return (self.problems,) if isinstance(self.problems, str) else self.problems


@dataclass(frozen=True, slots=True)
class Measured:
    """``figures`` are those of bridge.json, ``thoughts`` the lines of thoughts.jsonl."""

    figures: dict[str, Any]
    thoughts: list[dict[str, Any]]


def run(config: Config, context: Context) -> None:
    seed = derive(context.seed, "eval")
    found = measured(
        context.parent_checkpoint(config.model),
        held_out_of(config.problems, config.limit, seed, config.questions),
        samples=config.samples,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=seed,
        slots=config.slots,
        answers=config.answers,
        compute=config,
    )
    asked = config.questions.path if config.questions else config.problems
    label = config.label or next(iter(context.inputs), context.stage)
    write_result(context.folder, {"label": label, "problems": asked, **found.figures}, found.thoughts)
    of = found.figures
    numbers = {
        "bridge/utility": of["utility"]["all"]["mean"],
        "bridge/utility/right": of["utility"]["right"]["mean"],
        "bridge/utility/wrong": of["utility"]["wrong"]["mean"],
        "bridge/entropy": of["thought"]["all"]["entropy"]["mean"],
        "bridge/empty": of["empty"],
    }
    context.log(1, 1, {name: value for name, value in numbers.items() if value is not None})


def write_result(folder: Path, figures: dict[str, Any], thoughts: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in thoughts)
    write_text(folder / THOUGHTS, "".join(lines))
    write_json(folder / RESULT, figures)


def measured(
    path: Path,
    problems: Sequence[Problem],
    *,
    samples: int = 8,
    max_tokens: int = 320,
    temperature: float = 1.0,
    seed: int = 0,
    slots: int = 256,
    answers: int = 4,
    compute: Compute = COMPUTE,
    progress: Progress | None = None,
) -> Measured:
    """Thoughts of the checkpoint ``path`` about ``problems``, measured. Raises ``UserError`` for a checkpoint
    that is bad or never thinks, and where no right answer is known."""
    engine, template = engine_for(path, problems, max_tokens, slots, compute)
    model, tokenizer = engine.model, template.tokenizer
    if template.prefilled.endswith(END_THINK):
        raise UserError("the chat template closes the thought before it begins: there is nothing to measure")
    whole = 2 * len(problems) * samples  # every thought is written, then measured
    began = time.perf_counter()
    with GraderPool() as pool:
        said = evaluate(
            engine, template, list(problems), samples=samples, max_tokens=max_tokens,
            temperature=temperature, seed=seed, pool=pool,
            progress=(lambda done, _: progress(done, whole)) if progress else None,
        )  # fmt: skip
        wrote = time.perf_counter()
        cutter = Cutter(tokenizer, frame_of([r for row in said.responses for r in row]))
        right = [
            [v.answer for v, ok in zip(*row, strict=True) if ok and v.answer]
            for row in zip(said.verdicts, said.correct, strict=True)
        ]
        known = golds(problems, right, lambda items: _judged(items, pool), cutter.known)
    if all(gold.source == "none" for gold in known):
        raise UserError("no right answer is known for any of these problems: there is nothing to measure")
    opened = template.prefilled.endswith(THINK)
    begin = [] if opened else tokenizer.encode(THINK)
    asked = [
        Asked(
            (*template.prompt_ids(p.prompt), *begin),
            gold.answers,
            _others(said, i, gold, cutter, answers),
            p.family,
        )
        for i, (p, gold) in enumerate(zip(problems, known, strict=True))
    ]
    written, whose = _written(said, known, cutter, opened)
    if not written:
        raise UserError(f"this checkpoint never begins a thought with {THINK}: there is nothing to measure")
    found = bridge(
        model, cutter, asked, written, seed=seed,
        progress=(lambda done: progress(whole // 2 + done, whole)) if progress else None,
    )  # fmt: skip
    ended = time.perf_counter()
    result = _summary(problems, said, known, written, found, lambda id: tokenizer.decode([id]))
    result["seconds"] = {"writing": round(wrote - began, 2), "measuring": round(ended - wrote, 2)}
    told = [at for at, w in zip(whose, written, strict=True) if w.thought.ids]
    rows = [_row(problems, said, known, *at, b) for at, b in zip(told, found, strict=True)]
    result["shown"] = _shown(problems, rows)
    return Measured(result, rows)


def _judged(items: Sequence[GradeItem], pool: GraderPool) -> list[Verdict]:
    if all(is_bounded(item.verifier) for item in items):
        return [grade(item) for item in items]
    return pool.gather(pool.submit(items))


def _others(said: Evaluation, i: int, gold: Gold, cutter: Cutter, most: int) -> tuple[str, ...]:
    """What else the model answers to problem ``i``, the most frequent first."""
    times = Counter(normal(v.answer) for v in said.verdicts[i] if v.answer)
    return tuple(a for a, _ in times.most_common() if a not in gold.answers and cutter.known(a))[:most]


def _written(
    said: Evaluation, known: Sequence[Gold], cutter: Cutter, opened: bool
) -> tuple[list[Written], list[tuple[int, int]]]:
    """The thoughts about problems with a right answer, and whose they are: (problem, sample)."""
    written, whose = [], []
    for i, problem in enumerate(said.problems):
        if known[i].source == "none":
            continue
        for j, sample in enumerate(said.samples[i]):
            ids = sample.completion_ids[:-1] if sample.stop is Stop.EOS else sample.completion_ids
            thought = cutter.thought(problem, ids, opened)
            if thought is None:
                continue
            closed = END_THINK in said.responses[i][j]
            written.append(Written(i, thought, said.correct[i][j], closed))
            whose.append((i, j))
    return written, whose


def _summary(
    problems: Sequence[Problem],
    said: Evaluation,
    known: Sequence[Gold],
    written: Sequence[Written],
    found: Sequence[Bridged],
    word: Callable[[int], str],
) -> dict[str, Any]:
    names = dict.fromkeys(p.family for p in problems)
    by_family = {name: [b for b in found if problems[b.written.problem].family == name] for name in names}
    answers = [ok for row in said.correct for ok in row]
    return {
        "n_problems": len(problems),
        "samples": len(said.samples[0]),
        "pass@1": sum(answers) / len(answers),
        "thoughts": len(found),
        "empty": 1 - len(found) / len(written),
        "right": sum(b.written.right for b in found),
        "gold": dict(Counter(gold.source for gold in known)),
        **figures(found, word),
        "families": {
            name: {key: value for key, value in figures(row).items() if key in ("nll", "utility", "gain")}
            for name, row in by_family.items()
            if len(by_family) > 1 and row
        },
    }


def _row(
    problems: Sequence[Problem], said: Evaluation, known: Sequence[Gold], i: int, j: int, b: Bridged
) -> dict[str, Any]:
    problem, verdict = problems[i], said.verdicts[i][j]
    return {
        "problem": i,
        "sample": j,
        "family": problem.family,
        "prompt": problem.prompt,
        "gold": list(known[i].answers),
        "right": b.written.right,
        "answer": verdict.answer,
        "response": said.responses[i][j],
        "nll": {name: round(bits, 4) for name, bits in b.nll.items()},
        "steps": [
            {"text": piece.text, "tokens": piece.cut, "right": piece.right}
            for piece in b.written.thought.pieces
        ],
        "curve": [round(bits, 4) for bits in b.curve],
        "entropy": [round(bits, 4) for bits in b.entropy],
    }


def _shown(problems: Sequence[Problem], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first thought about each problem, a problem of every family in turn: nobody has chosen them."""
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["problem"], row)
    by_family: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        by_family.setdefault(problem.family, []).append(i)
    most = max(map(len, by_family.values()), default=0)
    turns = [row[n] for n in range(most) for row in by_family.values() if n < len(row)]
    return [first[i] for i in turns[:SHOWN] if i in first]
