"""Answers to many problems, each by several paths: what ``paths`` of an evaluation asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liubai.errors import UserError
from liubai.rollout.local import Judging, LocalWriter, run
from liubai.rollout.paths import Outcome, PathsConfig, answer
from liubai.rollout.thinking import Ask
from liubai.rollout.writer import Judge
from liubai.seeds import derive
from liubai.stages.context import Context
from liubai.stages.rollouts import Scorer
from liubai.stages.scoring import (
    CALIBRATION,
    PROCESS_MODEL,
    REWARD_MODEL,
    Preference,
    Process,
    has_steps,
    problem_of,
)
from liubai.text.template import Template
from liubai.types import Problem

#: Kinds of paths that give the same answer each time.
SETTLED = ("greedy", "beam")
STEPLESS = (
    "the process model finds no steps in thoughts about this question, only in those about the problems that "
    "Liubai makes; let a reward model judge (best:N:preference), rollouts lead (tree:N:rollouts), or vote"
)


@dataclass(frozen=True, slots=True)
class Way:
    """How an answer is come to: by which paths, with thoughts of which length in tokens, before which judges
    (folders of their models)."""

    paths: PathsConfig
    budget: int | None = None
    at_least: int = 0
    judges: Mapping[Judge, Path] = field(default_factory=dict)


def answers_by(
    way: Way,
    writer: LocalWriter,
    template: Template,
    problems: Sequence[Problem],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[list[Outcome]], float]:
    """``samples`` answers to each problem, each by paths of its own (one, where all would be the same), and
    the seconds that all took. Seeds are those of :func:`liubai.stages.evaluate.evaluate`: by ``sample:1``
    the answers are its very answers."""
    each = 1 if way.paths.kind in SETTLED or temperature == 0 else samples
    asks = [
        Ask(
            question=problem.prompt,
            template=template,
            prompt_ids=tuple(template.prompt_ids(problem.prompt)),
            max_tokens=max_tokens,
            seed=derive(seed, "eval", i, j),
            temperature=temperature,
            top_p=top_p,
            budget=way.budget,
            at_least=way.at_least,
        )
        for i, problem in enumerate(problems)
        for j in range(each)
    ]
    done = 0

    async def one(ask: Ask) -> Outcome:
        nonlocal done
        outcome = await answer(writer, ask, way.paths)
        done += 1
        if progress:
            progress(done, len(asks))
        return outcome

    jobs: list[Coroutine[Any, Any, Outcome]] = [one(ask) for ask in asks]
    started = time.perf_counter()
    outcomes = run(writer, jobs)
    seconds = time.perf_counter() - started
    return [outcomes[i : i + each] for i in range(0, len(outcomes), each)], seconds


def judges_of(
    folders: Mapping[Judge, Path], problems: Sequence[Problem] | None, device: torch.device
) -> dict[Judge, Judging]:
    """The models that judge answers to these problems, by their questions; ``None``: to any question.

    A process model raises ``UserError`` for a question about which no thought has steps that can be found: it
    would give all answers the same score. (A thought without any, where they could be, scores 0.)"""
    known = None if problems is None else {problem.prompt: problem for problem in problems}
    kinds: dict[Judge, Callable[[Path, torch.device], Scorer]] = {
        "preference": Preference,
        "process": Process,
    }

    def judging(judge: Judge, scorer: Scorer) -> Judging:
        def scores(answers: Sequence[tuple[str, str]]) -> list[float]:
            questions = dict.fromkeys(question for question, _ in answers)
            asked = {q: problem_of(q) if known is None else known[q] for q in questions}
            if judge == "process" and not all(map(has_steps, asked.values())):
                raise UserError(STEPLESS)
            return scorer([(asked[question], response) for question, response in answers])

        return scores

    return {judge: judging(judge, kinds[judge](folder, device)) for judge, folder in folders.items()}


def settled(paths: PathsConfig, judges: Collection[Judge], question: str) -> PathsConfig:
    """``paths``, where nobody said who judges answers to ``question``: not the process model when it would
    find no step in them. The reward model then judges the best of several, if there is one, and rollouts lead
    a tree. Raises ``UserError`` when only the process model is there, or when it was asked for."""
    if "process" not in judges or paths.kind not in ("best", "tree") or paths.value == "rollouts":
        return paths
    if paths.judge == "preference" or has_steps(problem_of(question)):
        return paths
    if paths.judge is None and paths.value is None:
        if paths.kind == "tree":
            return paths.model_copy(update={"value": "rollouts"})
        if "preference" in judges:
            return paths.model_copy(update={"judge": "preference"})
    raise UserError(STEPLESS)


def judges_given(context: Context) -> dict[Judge, Path]:
    """The models that judge, of the stages that the evaluation is ``from``. Raises ``UserError`` for two of a
    kind."""
    names: dict[Judge, str] = {"preference": REWARD_MODEL, "process": PROCESS_MODEL}
    return {
        judge: context.the(name, f"a {judge} model that judges paths")
        for judge, name in names.items()
        if context.given(name)
    }


def way_of(paths: str | None, folders: Sequence[Path]) -> Way | None:
    """What a command line says: ``paths`` as :meth:`PathsConfig.parse` reads it, and folders of judges, of
    which only a reward model is calibrated. Raises ``UserError``."""
    if paths is None:
        if folders:
            raise UserError("--judge judges paths; name some, for example --paths best:8")
        return None
    config, judges = PathsConfig.parse(paths), dict[Judge, Path]()
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"'{folder}' is no model that judges; give a reward_model or process_model folder"
            )
        kind: Judge = "preference" if (folder / CALIBRATION).is_file() else "process"
        if kind in judges:
            raise UserError(f"'{judges[kind]}' and '{folder}' are both {kind} models; give one of them")
        judges[kind] = folder
    return Way(config, judges=judges)


def described(way: Way) -> dict[str, Any]:
    """For the report: how the answers were come to, with what was left open filled in."""
    paths, by = way.paths, None
    there = "process" if "process" in way.judges else None
    if paths.kind == "tree":
        by = paths.value or there or "rollouts"
    elif paths.kind == "best":
        by = paths.judge or there or "preference"
    return {
        "name": paths.name,
        "kind": paths.kind,
        "number": paths.number,
        "by": by,
        "thinking_budget": way.budget,
        "think_at_least": way.at_least,
    }
