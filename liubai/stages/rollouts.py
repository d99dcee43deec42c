"""From problems to graded groups: the left half of the RL loop.

Plain mode writes all answers of a step under one version of the weights. In-flight mode keeps the
engine full: a step takes the first groups that are complete, and unfinished answers go on under the
next weights, so no update waits for the longest answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, RewardWeights, Verdict, grade, is_bounded, reward
from liubai.grade.language import consistency
from liubai.measure.reflection import thought_span
from liubai.rollout.engine import Engine, Partial, Request
from liubai.seeds import derive
from liubai.text.template import Template, text_of
from liubai.types import Group, Problem, Sample, Span, Stop

#: What a learned judge says of many answers at once: a number each.
Scorer = Callable[[Sequence[tuple[Problem, str]]], list[float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished sample with its text and verdict, and what else was found about it (``language``,
    ``preference``, ``process``, ``faithful``; where it is rewarded)."""

    sample: Sample
    response: str
    verdict: Verdict
    findings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GradedGroup:
    """A :class:`Group` and what was said, for logs and instruments. ``index`` numbers the problem."""

    index: int
    group: Group
    answers: tuple[Answer, ...]


class Rollouts:
    """``collect(n)`` returns the next n complete groups.

    ``problem_at(index)`` gives problem number ``index``; request ``index·samples + j`` is its j-th
    sample, with a seed of its own. Cheap verifiers run here, all others in the grader pool, from the
    moment an answer ends.
    """

    def __init__(
        self,
        engine: Engine,
        template: Template,
        problem_at: Callable[[int], Problem],
        pool: GraderPool,
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        weights: RewardWeights,
        weights_of: Mapping[str, RewardWeights] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        ahead: int = 0,
        max_staleness: int | None = None,
    ) -> None:
        self.engine, self.template, self.problem_at, self.pool = engine, template, problem_at, pool
        self.samples, self.max_tokens = samples, max_tokens
        self.temperature, self.seed, self.weights = temperature, seed, weights
        self.weights_of, self.scorers = weights_of or {}, scorers or {}
        self.ahead = ahead  #: in-flight mode: groups begun beyond those that a step takes
        #: versions that the oldest token of an answer may be behind; older ones are dropped and written again
        self.max_staleness = max_staleness
        self._dropped = 0
        self.next_index = 0
        self._missing: list[int] = []  # several ranks: not begun, though later ones were
        self._open: dict[int, dict[int, Sample]] = {}  # begun and not yet taken: finished samples
        self._ended: list[int] = []  # those of the open groups whose answers have all ended, in order
        self._answers: dict[tuple[int, int], Answer] = {}
        self._tickets: dict[int, tuple[int, int]] = {}
        self._void: set[int] = set()  # tickets of answers that were dropped
        self.seconds_grading = 0.0

    def collect(self, groups: int) -> list[GradedGroup]:
        """The groups whose last answer ended first. That order is the tokens', not the graders'
        clock: a resumed run takes the same ones."""
        self._drop_stale()
        self._top_up(groups)
        while len(self._ended) < groups:
            self.step()
            self._poll()
        taken, self._ended = self._ended[:groups], self._ended[groups:]
        while not all((i, j) in self._answers for i in taken for j in range(self.samples)):
            time.sleep(0.001)  # the graders need the processor more than this loop does
            self._poll()
        taken.sort()
        started = time.perf_counter()
        self._judge(taken)
        self.seconds_grading += time.perf_counter() - started
        return [self._close(index) for index in taken]

    def step(self) -> list[tuple[Request, Sample]]:
        """Let the engine write. What ends of others' requests, whose ids are below 0, is returned."""
        others = []
        for request, sample in self.engine.step():
            if request.id < 0:
                others.append((request, sample))
            else:
                self._take(request, sample)
        return others

    def _top_up(self, groups: int) -> None:
        while len(self._open) < groups + self.ahead:
            index = self._next()
            prompt = tuple(self.template.prompt_ids(self.problem_at(index).prompt))
            self._open[index] = {}
            self.engine.submit(
                Request(
                    id=index * self.samples + j,
                    prompt_ids=prompt,
                    max_tokens=self.max_tokens,
                    seed=derive(self.seed, "sample", index, j),
                    temperature=self.temperature,
                )
                for j in range(self.samples)
            )

    def _next(self) -> int:
        """The number of the next problem."""
        if self._missing:
            return self._missing.pop(0)
        self.next_index += 1
        return self.next_index - 1

    @property
    def stale(self) -> int:
        """Answers that were dropped so far because they were too old, here or by the engine."""
        return self._stale_here()

    def _stale_here(self) -> int:
        return self._dropped + getattr(self.engine, "stale", 0)

    def _is_stale(self, sample: Sample) -> bool:
        bound = self.max_staleness
        return bound is not None and self.engine.version - sample.version > bound

    def _drop_stale(self) -> None:
        """Answers that waited for the rest of their group, or for their turn, until they were too old."""
        for index, done in self._open.items():
            if old := [j for j, sample in done.items() if self._is_stale(sample)]:
                self._dropped += len(old)
                if index in self._ended:
                    self._ended.remove(index)
                for j in old:
                    del done[j]
                    self._answers.pop((index, j), None)
                self._void |= {t for t, (i, j) in self._tickets.items() if i == index and j in old}
                self.engine.submit([self._request(index * self.samples + j) for j in old])

    def _take(self, request: Request, sample: Sample) -> None:
        if self._is_stale(sample):
            self._dropped += 1
            self.engine.submit([request])
            return
        index, j = divmod(request.id, self.samples)
        self._open[index][j] = sample
        if len(self._open[index]) == self.samples:
            self._ended.append(index)
        problem = self.problem_at(index)
        response = text_of(self.template, sample)
        item = GradeItem(problem.verifier, problem.gold, response, self._meta(problem))
        started = time.perf_counter()
        if is_bounded(problem.verifier):
            self._answer(index, j, grade(item))
        else:
            self._tickets[self.pool.submit([item])[0]] = (index, j)
        self.seconds_grading += time.perf_counter() - started

    def _meta(self, problem: Problem) -> dict[str, Any]:
        return {**problem.meta, "prefilled": self.template.prefilled}

    def _poll(self) -> None:
        if not self._tickets:
            return
        for ticket, verdict in self.pool.poll().items():
            at = self._tickets.pop(ticket)
            if ticket in self._void:  # on an answer that was dropped meanwhile
                self._void.remove(ticket)
            else:
                self._answer(*at, verdict)

    def _answer(self, index: int, j: int, verdict: Verdict) -> None:
        sample = self._open[index][j]
        response = text_of(self.template, sample)
        if not self.template.thinking:
            verdict = without_blank(verdict, response)
        self._answers[index, j] = Answer(sample, response, verdict)

    def _weights(self, problem: Problem) -> RewardWeights:
        return weights_for(problem, self.weights, self.weights_of)

    def _judge(self, taken: Sequence[int]) -> None:
        """What the models that judge say of the answers of some groups, all at once, in which language they
        are, and whether their passages support them; only where it counts."""
        problems = {index: self.problem_at(index) for index in taken}
        by_rule: dict[str, Scorer] = {
            "language": spoken,
            "faithful": partial(supported, prefilled=self.template.prefilled),
        }
        for name in ("language", "preference", "process", "faithful"):
            asked = [
                (index, j)
                for index in taken
                for j in range(self.samples)
                if getattr(self._weights(problems[index]), name)
            ]
            if not asked:
                continue
            scorer = by_rule.get(name) or self.scorers[name]
            scores = scorer([(problems[i], self._answers[i, j].response) for i, j in asked])
            for key, score in zip(asked, scores, strict=True):
                answer = self._answers[key]
                self._answers[key] = replace(answer, findings={**answer.findings, name: score})

    def _close(self, index: int) -> GradedGroup:
        del self._open[index]
        problem = self.problem_at(index)
        answers = tuple(self._answers.pop((index, j)) for j in range(self.samples))
        rewards = tuple(
            reward(
                a.verdict,
                formatted=a.sample.stop is Stop.EOS and a.verdict.parts["format"] > 0,
                tokens=len(a.sample.completion_ids),
                cap=self.max_tokens,
                truncated=a.sample.stop is not Stop.EOS,
                weights=self._weights(problem),
                **a.findings,
            )
            for a in answers
        )
        return GradedGroup(index, Group(problem, tuple(a.sample for a in answers), rewards), answers)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere, as JSON. Verdicts are not kept: grading is repeated."""
        return {
            "next_index": self.next_index,
            "ended": self._ended,
            "open": {i: {j: _dump(s) for j, s in done.items()} for i, done in self._open.items()},
            "partials": [
                [p.request.id, p.completion_ids, p.logprobs, [[v.version, v.count] for v in p.versions]]
                for p in self.engine.partials()
            ],
            "stale": self._stale_here(),
            **({"missing": self._missing} if self._missing else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.next_index = state["next_index"]
        self._missing = list(state.get("missing", ()))
        for index, done in state["open"].items():
            self._open[int(index)] = {}
            for j, raw in done.items():
                sample = _load(raw)
                self._take(self._request(int(index) * self.samples + int(j)), sample)
        self._ended = list(state["ended"])  # in the order of then, not of this reading
        self._dropped = state.get("stale", 0)  # a new engine has dropped none
        self.seconds_grading = 0.0
        self.engine.resume(
            [
                Partial(self._request(i), tuple(ids), tuple(lp), tuple(Span(*v) for v in versions))
                for i, ids, lp, versions in state["partials"]
            ]
        )

    def _request(self, id: int) -> Request:
        index, j = divmod(id, self.samples)
        return Request(
            id=id,
            prompt_ids=tuple(self.template.prompt_ids(self.problem_at(index).prompt)),
            max_tokens=self.max_tokens,
            seed=derive(self.seed, "sample", index, j),
            temperature=self.temperature,
        )


def spoken(answers: Sequence[tuple[Problem, str]]) -> list[float]:
    """The share of each thought's words that are of its question's language; 0 of none."""
    return [consistency(thought(response), problem.language) for problem, response in answers]


def supported(answers: Sequence[tuple[Problem, str]], prefilled: str = "") -> list[float]:
    """How far the problem's passage supports each answer, from 0 to 1 (:mod:`liubai.grade.faithful`); 0 of no
    answer. Raises ``UserError`` for a problem without a passage, or with one that cannot be judged by."""
    found = []
    for problem, response in answers:
        passage = passage_of(problem)
        if passage is None:
            raise UserError(
                f"nobody can say what an answer to '{problem.prompt[:60]}' is faithful to: {PASSAGES}"
            )
        verdict = grade(GradeItem("faithful", passage, response, {**problem.meta, "prefilled": prefilled}))
        if verdict.error is not None:
            raise UserError(f"rewards.faithful: {verdict.error}, at '{problem.prompt[:60]}'")
        found.append(verdict.parts["correct"])
    return found


#: where a faithfulness reward finds what to go by
PASSAGES = (
    "rewards.faithful is for the family passage, for the verifier faithful, and for questions whose column "
    "'passage' is among their meta columns"
)


def passage_of(problem: Problem) -> str | None:
    """The text that an answer has to go by, if there is one: the wide world's passages are their prompts."""
    if problem.family == "passage":
        return problem.prompt
    given = problem.gold if problem.verifier == "faithful" else problem.meta.get("passage")
    return given if isinstance(given, str) and given.strip() else None


def weights_for(
    problem: Problem, weights: RewardWeights, weights_of: Mapping[str, RewardWeights]
) -> RewardWeights:
    """The family's, or the verifier's, or those of all."""
    for kind in (problem.family, problem.verifier):
        if kind in weights_of:
            return weights_of[kind]
    return weights


def thought(response: str) -> str:
    start, end = thought_span(response)
    return response[start:end]


def without_blank(verdict: Verdict, response: str) -> Verdict:
    """The control without the blank: whoever thinks before ``<answer>`` all the same has said nothing.

    The prompt has closed the thought; this keeps the model from opening another place to think in.
    """
    if verdict.error is not None or not response.partition("<answer>")[0].strip():
        return verdict
    return Verdict(False, None, {**verdict.parts, "correct": 0.0, "format": 0.0})


def _dump(s: Sample) -> list[Any]:
    return [s.prompt_ids, s.completion_ids, s.logprobs, s.stop, [[v.version, v.count] for v in s.versions]]


def _load(raw: Sequence[Any]) -> Sample:
    prompt, completion, logprobs, stop, versions = raw
    return Sample(
        tuple(prompt), tuple(completion), tuple(logprobs), Stop(stop), tuple(Span(*v) for v in versions)
    )
