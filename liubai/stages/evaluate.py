"""Evaluation: sample answers to held-out problems and measure them. A stage, and a library call.

With ``paths``, each answer is what several paths came to (:mod:`liubai.rollout.paths`), and what they cost in
tokens is measured, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from liubai import ranks
from liubai.errors import UserError
from liubai.files import read_json, write_json
from liubai.grade import GradeItem, GraderPool, Verdict, grade, is_bounded
from liubai.grade.language import LANGUAGES, consistency, words
from liubai.grade.readable import ReadableConfig, unreadable
from liubai.measure.audit import unsound_share
from liubai.measure.passk import clustered_stderr, cons_at_k, pass_curve
from liubai.measure.readiness import warn_unjudged
from liubai.measure.reflection import count_reflections
from liubai.model.checkpoint import load
from liubai.problems import family
from liubai.problems.family import distinct_problems
from liubai.problems.questions import Questions
from liubai.problems.source import Bank
from liubai.rollout.engine import Answerer, Request
from liubai.rollout.local import LocalWriter
from liubai.rollout.paths import PathsConfig
from liubai.rollout.thinking import Spent
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages.by_paths import Way, answers_by, described, judges_given, judges_of
from liubai.stages.config import Brought, Compute, FamilyName, Shares
from liubai.stages.context import WARNINGS, Context
from liubai.stages.rollouts import thought, without_blank
from liubai.text.template import Template, require_readable, template_for, text_of
from liubai.types import Problem, Sample, Stop

Progress = Callable[[int, int], None]
COMPUTE = Compute()
#: What each answer was worth, by problem: for comparing with another evaluation.
SCORES = "scores.json"
#: What says how to answer, and is left out of the config's own words where it says nothing: evaluations
#: that were made without it keep their fingerprints.
WAY = {"paths": None, "thinking_budget": None, "think_at_least": 0}
#: Verifiers of prompts that no rule of reasoning judges.
GENERAL = ("errand", "judge")


class Config(Brought, Compute):
    #: one family, or several with their shares of ``limit``
    problems: FamilyName | Shares = "countdown"
    label: str = ""
    limit: int = Field(200, gt=0, description="held-out problems")
    samples: int = Field(16, gt=0, description="answers a problem")
    max_tokens: int = Field(320, gt=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    slots: int = Field(256, gt=0)
    blank: bool = True
    #: what counts as a readable thought
    readable: ReadableConfig = ReadableConfig()
    #: several paths to each answer: a table, or "vote:8"; a tree and "best" take their judge from ``from``
    paths: PathsConfig | None = None
    thinking_budget: int | None = Field(None, ge=0, description="the longest thought, in tokens")
    think_at_least: int = Field(0, ge=0, description="the shortest; a sooner end becomes 'wait'")

    @model_serializer(mode="wrap")
    def _without_what_says_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {key: value for key, value in written.items() if key not in WAY or value != WAY[key]}

    @property
    def way(self) -> Way | None:
        """How to answer, where it is not one plain draw."""
        if self.paths is None and self.thinking_budget is None and not self.think_at_least:
            return None
        return Way(self.paths or PathsConfig(), self.thinking_budget, self.think_at_least)

    def families(self) -> Iterable[str]:
        return (self.problems,) if isinstance(self.problems, str) else self.problems


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers by problem: ``samples[i][j]`` is the j-th answer to ``problems[i]``. Of paths, it is the answer
    that was chosen; what they cost is ``spent[i][j]``, and all of it took so many ``seconds``."""

    problems: Sequence[Problem]
    samples: list[list[Sample]]
    responses: list[list[str]]
    verdicts: list[list[Verdict]]
    spent: list[list[Spent]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def correct(self) -> list[list[bool]]:
        """Right, and ended by the model itself: what was cut off is no answer, as in the reward."""
        return [
            [v.correct and s.stop is Stop.EOS for v, s in zip(*pair, strict=True)]
            for pair in zip(self.verdicts, self.samples, strict=True)
        ]

    def of(self, family: str) -> Evaluation:
        """The part on the problems of one family."""
        at = [i for i, problem in enumerate(self.problems) if problem.family == family]
        lists = (self.problems, self.samples, self.responses, self.verdicts, self.spent or self.samples)
        part = Evaluation(*([each[i] for i in at] for each in lists))  # type: ignore[arg-type]
        return part if self.spent else replace(part, spent=[])

    @property
    def scores(self) -> list[list[float]]:
        """What each answer is worth, from 0 to 1: nothing when it was cut off, NaN when it could not be
        graded."""

        def worth(verdict: Verdict, sample: Sample) -> float:
            if verdict.error is not None:
                return math.nan
            return verdict.parts["correct"] * (sample.stop is Stop.EOS)

        return [
            [worth(v, s) for v, s in zip(*pair, strict=True)]
            for pair in zip(self.verdicts, self.samples, strict=True)
        ]

    def process(self, readable: ReadableConfig) -> dict[str, float | None]:
        """What there is to say of the thoughts: their language, whether they can be read, and whether right
        answers are right for the right reasons."""
        problems = [p for p, row in zip(self.problems, self.responses, strict=True) for _ in row]
        responses = [r for row in self.responses for r in row]
        thoughts = [thought(response) for response in responses]
        right = [ok for row in self.correct for ok in row]
        # of questions in another language than these two it says nothing
        asked = [(t, p.language) for t, p in zip(thoughts, problems, strict=True) if p.language in LANGUAGES]
        return {
            "language": _mean_or_none([consistency(t, known) for t, known in asked if any(words(t))]),
            "readable": _mean_or_none([not unreadable(t, known, readable) for t, known in asked]),
            "unsound": unsound_share(problems, responses, right),
            "score": _mean_or_none([s for row in self.scores for s in row if not math.isnan(s)]),
        }

    def summary(self) -> dict[str, Any]:
        """The figures of ``liubai eval --json`` and ``eval.json``; shares are of all answers."""
        k = len(self.samples[0])
        samples = [s for row in self.samples for s in row]
        right = [v for row in self.correct for v in row]
        lengths = [len(s.completion_ids) for s in samples]
        formatted = [v.parts["format"] > 0 for row in self.verdicts for v in row]
        ended = [s.stop is Stop.EOS for s in samples]
        ks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= k]
        answers = [[v.answer for v in row] for row in self.verdicts]
        figures: dict[str, Any] = {"pass@1": pass_curve(self.correct, [1])[1]}
        if k > 1:
            figures[f"pass@{k}"] = pass_curve(self.correct, [k])[k]
            figures[f"cons@{k}"] = cons_at_k(answers, self.correct, key=lambda a: "".join(a.split()))
        return figures | {
            "mean_tokens": _mean(lengths),
            "tokens_right": _mean_or_none([n for n, ok in zip(lengths, right, strict=True) if ok]),
            "tokens_wrong": _mean_or_none([n for n, ok in zip(lengths, right, strict=True) if not ok]),
            "format": _mean([f and e for f, e in zip(formatted, ended, strict=True)]),
            "reflections": _mean([count_reflections(r) for row in self.responses for r in row]),
            "truncated": 1 - _mean(ended),
            "grade_errors": sum(v.error is not None for row in self.verdicts for v in row),
            "n_problems": len(self.problems),
            "samples": k,
            "pass@k": {str(n): p for n, p in pass_curve(self.correct, ks).items()},
            "stderr": clustered_stderr(self.correct) if len(self.problems) > 1 else None,
            **self.costs(),
        }

    def costs(self) -> dict[str, float]:
        """What an answer by paths cost: tokens that were written for it, read as prompts (anew by every
        request), and read by judges; and its share of the time."""
        spent = [s for row in self.spent for s in row]
        if not spent:
            return {}
        seconds = {"seconds": self.seconds / len(spent)} if self.seconds else {}
        return {
            "tokens_spent": _mean([s.written for s in spent]),
            "tokens_read": _mean([s.read for s in spent]),
            "tokens_judged": _mean([s.judged for s in spent]),
            **seconds,
        }

    def as_metrics(self) -> dict[str, float]:
        """The few figures that RL logs while it runs."""
        figures, k = self.summary(), len(self.samples[0])
        named = {
            "eval/pass@1": "pass@1",
            "eval/pass@k": f"pass@{k}",
            "eval/cons@k": f"cons@{k}",
            "eval/length": "mean_tokens",
            "eval/reflections": "reflections",
            "eval/format": "format",
        }
        return {metric: figures[name] for metric, name in named.items() if name in figures}


def evaluate(
    engine: Answerer,
    template: Template,
    problems: Sequence[Problem],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    pool: GraderPool | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Sample and grade. Verifiers that are not bounded by construction need a ``pool``. Of several ranks each
    asks its engine a share of the problems, and all have the whole evaluation."""
    mine = ranks.own(range(len(problems)))
    requests = [
        Request(
            id=i * samples + j,
            prompt_ids=tuple(template.prompt_ids(problem.prompt)),
            max_tokens=max_tokens,
            seed=derive(seed, "eval", i, j),
            temperature=temperature,
            top_p=top_p,
        )
        for i, problem in ((i, problems[i]) for i in mine)
        for j in range(samples)
    ]
    done: dict[int, Sample] = {}
    engine.submit(requests)
    while engine.pending:
        finished = engine.step()
        done.update((request.id, sample) for request, sample in finished)
        if progress and finished:
            progress(len(done), len(requests))
    rows = _rows([done[r.id] for r in requests], samples)
    return joined(problems, ranks.gather(graded(template, [problems[i] for i in mine], rows, pool)))


def joined(problems: Sequence[Problem], shares: Sequence[Evaluation]) -> Evaluation:
    """One of ``problems``, of which each rank has evaluated its own."""
    if len(shares) == 1:
        return shares[0]
    samples, responses, verdicts = (
        ranks.dealt([getattr(share, name) for share in shares])
        for name in ("samples", "responses", "verdicts")
    )
    return Evaluation(problems, samples, responses, verdicts)


def graded(
    template: Template, problems: Sequence[Problem], samples: list[list[Sample]], pool: GraderPool | None
) -> Evaluation:
    """``samples[i]`` are the answers to ``problems[i]``, as many for each."""
    responses = [text_of(template, sample) for row in samples for sample in row]
    asked = [problem for problem, row in zip(problems, samples, strict=True) for _ in row]
    items = [
        GradeItem(p.verifier, p.gold, response, {**p.meta, "prefilled": template.prefilled})
        for p, response in zip(asked, responses, strict=True)
    ]
    if pool and not all(is_bounded(item.verifier) for item in items):
        verdicts = pool.gather(pool.submit(items))
    else:
        verdicts = [grade(item) for item in items]
    if not template.thinking:
        verdicts = [without_blank(v, r) for v, r in zip(verdicts, responses, strict=True)]
    each = len(samples[0]) if samples else 1
    return Evaluation(problems, samples, _rows(responses, each), _rows(verdicts, each))


def _rows(flat: Sequence[Any], each: int) -> list[list[Any]]:
    return [list(flat[i : i + each]) for i in range(0, len(flat), each)]


def evaluate_checkpoint(**asked: Any) -> dict[str, Any]:
    """What ``liubai eval`` prints, but for the problems' name. What is ``asked``: see :func:`answered`."""
    result, way = answered(**asked), asked.get("way")
    named = {"paths": way.paths.name} if way else {}
    return named | result.summary() | result.process(ReadableConfig())


def answered(
    path: Path,
    problems: Sequence[Problem],
    samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    progress: Progress | None = None,
    slots: int = 256,
    thinking: bool = True,
    compute: Compute = COMPUTE,
    way: Way | None = None,
) -> Evaluation:
    """Answers of the checkpoint ``path``. Raises ``UserError`` for a bad one."""
    engine, template = engine_for(path, problems, max_tokens, slots, compute, thinking=thinking)
    protocol: dict[str, Any] = {
        "samples": samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "progress": progress,
    }
    with GraderPool() as pool:
        if way is None:
            return evaluate(engine, template, list(problems), pool=pool, **protocol)
        judges = judges_of(way.judges, problems, compute.where())
        writer = LocalWriter(engine, eos_ids=template.tokenizer.eos_ids, judges=judges)
        outcomes, seconds = answers_by(way, writer, template, list(problems), **protocol)
        chosen = [[outcome.best.sample for outcome in row] for row in outcomes]
        spent = [[outcome.spent for outcome in row] for row in outcomes]
        return replace(graded(template, list(problems), chosen, pool), spent=spent, seconds=seconds)


def engine_for(
    path: Path,
    problems: Sequence[Problem],
    max_tokens: int,
    slots: int,
    compute: Compute,
    *,
    thinking: bool = True,
) -> tuple[TorchEngine, Template]:
    """An engine with the checkpoint ``path``, and its template, for answers of ``max_tokens`` tokens. Raises
    ``UserError`` for a bad checkpoint, for one that cannot read the problems, and for one too short."""
    model, tokenizer = load(path, dtype=compute.dtype(), device=compute.where())
    if compute.compile:
        model.compile_decoding()
    template = template_for(tokenizer, path, thinking=thinking)
    require_readable(template, [p.prompt for p in problems])
    longest = max(len(template.prompt_ids(p.prompt)) for p in problems) + max_tokens
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"max_tokens {max_tokens} and the prompt need {longest} positions; the model has "
            f"{model.config.max_position_embeddings}"
        )
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=slots, max_length=longest)
    engine.load(model.state_dict(), version=0)
    return engine, template


def held_out_of(
    names: str | Mapping[str, float], limit: int, seed: int, questions: Questions | None = None
) -> list[Problem]:
    """``limit`` held-out problems: of the user's ``questions``, or of families, by their shares."""
    if questions:
        return Bank(questions).held_out(limit)
    shares = {names: 1.0} if isinstance(names, str) else names
    total = sum(shares.values())
    return [
        problem
        for name, share in shares.items()
        for problem in distinct_problems(family(name), "eval", seed, max(1, round(limit * share / total)))
    ]


def run(config: Config, context: Context) -> None:
    seed = derive(context.seed, "eval")
    way = config.way
    if way is not None and way.paths.kind in ("best", "tree"):
        way = replace(way, judges=judges_given(context))
    result = answered(
        context.parent_checkpoint(config.model),
        held_out_of(config.problems, config.limit, seed, config.questions),
        config.samples,
        config.max_tokens,
        config.temperature,
        config.top_p,
        seed,
        slots=config.slots,
        thinking=config.blank,
        compute=config,
        way=way,
    )
    warn_unjudged((v for row in result.verdicts for v in row), context.warn, context.folder / WARNINGS)
    asked = config.questions.path if config.questions else config.problems
    label = config.label or next(iter(context.inputs), config.model)
    figures: dict[str, Any] = {"label": label, "problems": asked, **result.summary()}
    if way is not None:
        figures["way"] = described(way)
    figures |= result.process(config.readable)
    if not isinstance(config.problems, str) and not config.questions:
        parts = {name: result.of(name) for name in config.problems}
        figures["families"] = {n: e.summary() | e.process(config.readable) for n, e in parts.items()}
    scores = [
        [p.prompt, [score for score in row if not math.isnan(score)]]
        for p, row in zip(result.problems, result.scores, strict=True)
    ]
    write_json(context.folder / SCORES, {"scores": scores})
    if context.given(SCORES):
        figures |= wins(result, context)
    write_json(context.folder / "eval.json", figures)
    numbers = {n: float(v) for n, v in figures.items() if isinstance(v, int | float)}
    context.log(1, 1, numbers)


def wins(result: Evaluation, context: Context) -> dict[str, Any]:
    """Against the evaluation that this one also comes ``from``: how often an answer to a general prompt is
    liked better than the other model's to the same prompt, a tie counting half. Where there are no general
    prompts, of all answers."""
    path = context.the(SCORES, "an evaluation to compare with")
    theirs = dict(read_json(path)["scores"])
    ours = list(zip(result.problems, result.scores, strict=True))
    general = [(p, row) for p, row in ours if p.verifier in GENERAL] or ours
    graded = [(p.prompt, a) for p, row in general for a in row if not math.isnan(a)]
    pairs = [(a, b) for prompt, a in graded for b in theirs.get(prompt, ())]
    if not pairs:
        raise UserError(f"the evaluation '{path.parent.name}' was asked other problems; give both the same")
    won = _mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    return {"win_rate": won, "against": read_json(path.parent / "eval.json").get("label", path.parent.name)}


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
