"""From problems to graded groups: the left half of the RL loop.

Plain mode writes all answers of a step under one version of the weights. In-flight mode keeps the
engine full: a step takes the first groups that are complete, and unfinished answers go on under the
next weights, so no update waits for the longest answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liubai.grade import GradeItem, GraderPool, RewardWeights, Verdict, grade, is_bounded, reward
from liubai.rollout.engine import Engine, Partial, Request
from liubai.seeds import derive
from liubai.text.template import Template, text_of
from liubai.types import Group, Problem, Sample, Span, Stop


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished sample with its text and verdict."""

    sample: Sample
    response: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class GradedGroup:
    """A :class:`Group` and what was said, for logs and instruments. ``index`` numbers the problem."""

    index: int
    group: Group
    answers: tuple[Answer, ...]


class Rollouts:
    """``collect()`` returns the next ``groups`` complete groups.

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
        groups: int,
        samples: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        weights: RewardWeights,
        ahead: int = 0,
    ) -> None:
        self.engine, self.template, self.problem_at, self.pool = engine, template, problem_at, pool
        self.groups, self.samples, self.max_tokens = groups, samples, max_tokens
        self.temperature, self.seed, self.weights = temperature, seed, weights
        self.ahead = ahead  #: in-flight mode: groups begun beyond those that a step takes
        self.next_index = 0
        self._open: dict[int, dict[int, Sample]] = {}
        self._answers: dict[tuple[int, int], Answer] = {}
        self._tickets: dict[int, tuple[int, int]] = {}
        self.seconds_grading = 0.0

    def collect(self) -> list[GradedGroup]:
        self._top_up()
        done: list[GradedGroup] = []
        while len(done) < self.groups:
            for request, sample in self.engine.step():
                self._take(request, sample)
            self._poll()
            done += [self._close(i) for i in list(self._open) if self._complete(i)]
            if self.ahead:
                # one step's surplus (several groups can end in the same token) waits for the next
                done, surplus = done[: self.groups], done[self.groups :]
                for graded in surplus:
                    self._reopen(graded)
        return sorted(done, key=lambda graded: graded.index)

    def _top_up(self) -> None:
        while len(self._open) < self.groups + self.ahead:
            index = self.next_index
            self.next_index += 1
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

    def _take(self, request: Request, sample: Sample) -> None:
        index, j = divmod(request.id, self.samples)
        self._open[index][j] = sample
        problem = self.problem_at(index)
        response = text_of(self.template, sample)
        item = GradeItem(problem.verifier, problem.gold, response, self._meta(problem))
        started = time.perf_counter()
        if is_bounded(problem.verifier):
            self._answers[index, j] = Answer(sample, response, grade(item))
        else:
            self._tickets[self.pool.submit([item])[0]] = (index, j)
        self.seconds_grading += time.perf_counter() - started

    def _meta(self, problem: Problem) -> dict[str, Any]:
        return {**problem.meta, "prefilled": self.template.prefilled}

    def _poll(self) -> None:
        if not self._tickets:
            return
        for ticket, verdict in self.pool.poll().items():
            index, j = self._tickets.pop(ticket)
            sample = self._open[index][j]
            self._answers[index, j] = Answer(sample, text_of(self.template, sample), verdict)

    def _complete(self, index: int) -> bool:
        return all((index, j) in self._answers for j in range(self.samples))

    def _close(self, index: int) -> GradedGroup:
        del self._open[index]
        answers = tuple(self._answers.pop((index, j)) for j in range(self.samples))
        rewards = tuple(
            reward(
                a.verdict,
                formatted=a.sample.stop is Stop.EOS and a.verdict.parts["format"] > 0,
                tokens=len(a.sample.completion_ids),
                cap=self.max_tokens,
                truncated=a.sample.stop is not Stop.EOS,
                weights=self.weights,
            )
            for a in answers
        )
        group = Group(self.problem_at(index), tuple(a.sample for a in answers), rewards)
        return GradedGroup(index, group, answers)

    def _reopen(self, graded: GradedGroup) -> None:
        self._open[graded.index] = {j: a.sample for j, a in enumerate(graded.answers)}
        self._answers.update({(graded.index, j): a for j, a in enumerate(graded.answers)})

    def state(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere, as JSON. Verdicts are not kept: grading is repeated."""
        return {
            "next_index": self.next_index,
            "open": {i: {j: _dump(s) for j, s in done.items()} for i, done in self._open.items()},
            "partials": [
                [p.request.id, p.completion_ids, p.logprobs, [[v.version, v.count] for v in p.versions]]
                for p in self.engine.partials()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.next_index = state["next_index"]
        for index, done in state["open"].items():
            self._open[int(index)] = {}
            for j, raw in done.items():
                sample = _load(raw)
                self._take(self._request(int(index) * self.samples + int(j)), sample)
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


def _dump(s: Sample) -> list[Any]:
    return [s.prompt_ids, s.completion_ids, s.logprobs, s.stop, [[v.version, v.count] for v in s.versions]]


def _load(raw: Sequence[Any]) -> Sample:
    prompt, completion, logprobs, stop, versions = raw
    return Sample(
        tuple(prompt), tuple(completion), tuple(logprobs), Stop(stop), tuple(Span(*v) for v in versions)
    )
