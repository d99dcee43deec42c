"""Several paths to one answer: what may be asked for; votes, draws, beams and judges, each against its
definition written out here."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from searching import WORDS, ask, engine_of, local, outcome

from liubai.errors import UserError
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request, generate
from liubai.rollout.local import LocalWriter
from liubai.rollout.paths import Outcome, PathsConfig, answer, ballot, elect
from liubai.rollout.thinking import Path
from liubai.rollout.writer import Beams, Heard, Judge
from liubai.seeds import derive
from liubai.types import Sample, Span, Stop

# --- what may be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("greedy", {"kind": "greedy", "number": 1}),
        ("sample", {"kind": "sample", "number": 1}),
        ("sample:5", {"kind": "sample", "n": 5}),
        ("beam:6", {"kind": "beam", "width": 6}),
        ("beam", {"kind": "beam", "number": 4}),
        ("vote:16", {"kind": "vote", "n": 16, "number": 16}),
        ("vote", {"kind": "vote", "number": 8}),
        ("best:4:preference", {"kind": "best", "n": 4, "judge": "preference"}),
        ("tree:32", {"kind": "tree", "simulations": 32, "value": None}),
        ("tree:8:rollouts", {"kind": "tree", "simulations": 8, "value": "rollouts"}),
        ("tree:8:process", {"kind": "tree", "judge": "process"}),
    ],
)
def test_a_text_names_paths(text: str, expected: dict[str, Any]) -> None:
    config = PathsConfig.parse(text)
    assert {key: getattr(config, key) for key in expected} == expected
    assert PathsConfig.parse(config.name) == PathsConfig.parse(PathsConfig.parse(config.name).name)
    assert PathsConfig.model_validate_json(json.dumps(text), strict=True) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("votes:8", "did you mean 'vote'"),
        ("vote:", "no number"),
        ("vote:-1", "no number"),
        ("vote:0", "greater than or equal to 1"),
        ("vote:9999", "less than or equal to 1024"),
        ("vote:1e3", "no number"),
        ("vote:٣", "no number"),
        ("greedy:2", "takes no number"),
        ("best:4:taste", "'preference' or 'process'"),
        ("best:4:process:9", "KIND:N:JUDGE"),
        ("vote:4:process", "'judge' means nothing to vote"),
        ("tree:4:preference", "judges whole answers"),
        ("", "there is no kind ''"),
        ("vote:" + "9" * 80, "write KIND"),
    ],
)
def test_a_text_that_names_none_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PathsConfig.parse(text)


@pytest.mark.parametrize(
    "raw",
    [
        {"kind": "vote", "width": 3},
        {"kind": "beam", "n": 3},
        {"kind": "sample", "alpha": 1.0},
        {"kind": "vote", "simulations": 3},
        {"kind": "tree", "rollouts": 3},
        {"kind": "tree", "value": "rollouts", "judge": "process"},
        {"kind": "vote", "n": True},
        {"kind": "vote", "n": 2.0},
        {"kind": "vote", "n": "2"},
        {"kind": "vote", "many": 2},
        {"kind": "tree", "c_puct": math.inf},
        {"kind": "other"},
    ],
)
def test_a_key_that_does_not_belong_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PathsConfig.model_validate_json(json.dumps(raw))
    with pytest.raises(ValidationError):
        PathsConfig.model_validate(raw)


def test_how_many_are_written_at_once() -> None:
    names = ("greedy", "vote:5", "beam:3", "tree:50", "tree:50:process")
    assert [PathsConfig.parse(name).at_once for name in names] == [1, 5, 3, 6, 6]
    assert PathsConfig(kind="tree", value="process", branch=7).at_once == 7
    assert [PathsConfig.parse(name).in_all for name in names] == [1, 5, 3, 300, 300]
    assert PathsConfig(kind="tree", simulations=9, value="rollouts", branch=7, rollouts=3).in_all == 90


# --- the vote -------------------------------------------------------------------------------------


def path(said: str | None, logprob: float = -1.0, stop: Stop = Stop.EOS) -> Path:
    sample = Sample((1,), (2,), (logprob,), stop, (Span(0, 1),))
    return Path(sample, (False,), said or "", "", said or "", said, logprob, 0)


@pytest.mark.parametrize(
    ("answers", "chosen", "votes"),
    [
        ([("1", -1.0), ("2", -1.0), ("2", -5.0)], 1, [1, 2, 2]),
        ([("1", -9.0), ("2", -1.0), ("1", -9.0), ("2", -2.0)], 1, [2, 2, 2, 2]),  # a tie: the likelier
        ([("1", -2.0), ("2", -2.0)], 0, [1, 1]),  # in all: the first
        ([(None, 0.0), (None, 0.0), ("3", -50.0)], 2, [None, None, 1]),  # nothing said never wins
        ([(None, -3.0), (None, -2.0)], 1, [None, None]),
        # e⁻² + e⁻² > e⁻¹·⁵ though each is less likely; equal votes would need equal numbers
        ([("1", -1.5), ("1", -900.0), ("2", -2.0), ("2", -2.0)], 2, [2, 2, 2, 2]),
        ([("3.80", -1.0), ("3.8", -1.0), ("4", -0.1)], 0, [2, 2, 1]),
        ([("1/2", -1.0), (" 0.5 ", -1.0), ("2", -0.1)], 0, [2, 2, 1]),
        ([("( 1 + 2 )", -1.0), ("(1+2)", -1.0), ("3", -0.1)], 0, [2, 2, 1]),
    ],
)
def test_votes_by_hand(answers: list[tuple[str | None, float]], chosen: int, votes: list[int | None]) -> None:
    paths, winner = elect([path(said, logprob) for said, logprob in answers])
    assert winner == chosen
    assert [p.votes for p in paths] == votes


def test_who_was_cut_off_wins_only_against_others_who_were() -> None:
    paths = [path(None, -0.1, Stop.LENGTH), path(None, -9.0), path(None, -8.0)]
    assert elect(paths)[1] == 2
    assert elect(paths[:1])[1] == 0


@given(
    st.lists(
        st.tuples(st.sampled_from([None, "1", "2", "3"]), st.sampled_from([-1.0, -2.0, -800.0])), min_size=1
    )
)
def test_votes_by_the_book(answers: list[tuple[str | None, float]]) -> None:
    _, winner = elect([path(said, logprob) for said, logprob in answers])
    said = [a for a, _ in answers]
    if not any(said):
        assert answers[winner][1] == max(logprob for _, logprob in answers)
        return
    mass = {a: sum(Fraction(math.exp(p)) for b, p in answers if b == a) for a in said if a}
    most = max((said.count(a), mass[a]) for a in mass)
    # sums of tiny numbers are told apart by rounding; equal ones by who came first
    best = [a for a in mass if said.count(a) == most[0] and math.isclose(mass[a], most[1], rel_tol=1e-9)]
    assert said[winner] in best
    assert winner == said.index(said[winner])


@pytest.mark.parametrize("text", ["1/0", "1" * 5000, "1e999", "0x10", "", "½", "٣", "-", "1/", "nan"])
def test_no_answer_stops_the_vote(text: str) -> None:
    assert isinstance(ballot(text), str)


# --- draws, beams, judges -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "sample", "sample:3", "vote:5"])
def test_draws_are_the_engines(name: str) -> None:
    asked = ask()
    found, told = outcome(name, asked)
    config = PathsConfig.parse(name)
    temperature = 0.0 if name == "greedy" else 1.0
    seeds = [7, *(derive(7, "path", i) for i in range(1, config.number))]
    wanted = generate(
        engine_of(),
        [
            Request(id=i, prompt_ids=asked.prompt_ids, max_tokens=40, seed=s, temperature=temperature)
            for i, s in enumerate(seeds)
        ],
    )
    assert [p.sample.completion_ids for p in found.paths] == [s.completion_ids for s in wanted]
    for i, p in enumerate(found.paths):
        assert tuple(token for piece in told[i] for token in piece.ids) == p.sample.completion_ids
    assert found.spent.written == sum(p.tokens for p in found.paths)
    assert found.spent.read == config.number * len(asked.prompt_ids)
    assert found.chosen == (elect(found.paths)[1] if config.kind == "vote" else 0)


def test_the_best_is_the_judges() -> None:
    judged: list[tuple[str, str]] = []

    def judge(answers: Sequence[tuple[str, str]]) -> list[float]:
        judged.extend(answers)
        return [float(-len(response)) for _, response in answers]

    found, _ = outcome("best:6:process", ask(), local({"process": judge}))
    assert judged == [("a b", p.response) for p in found.paths]
    key = [(p.ended, p.answer is not None, -len(p.response), p.logprob) for p in found.paths]
    assert found.chosen == key.index(max(key))
    assert [p.score for p in found.paths] == [-len(p.response) for p in found.paths]
    assert found.spent.judged == sum(p.tokens + len(p.sample.prompt_ids) for p in found.paths)


def test_an_answer_comes_before_a_score() -> None:
    """What was cut off, and what nobody can read, is not the best whatever the judge says."""
    says = Said(["a", "</think> <answer> 1 </answer>", "a </think>"], {"preference": lambda r: -len(r)})
    found = asyncio.run(answer(says, ask(), PathsConfig.parse("best:3")))
    assert found.best.answer == "1"
    longer = Said(["a " * 60, "a </think> b"], {"preference": len})
    assert asyncio.run(answer(longer, ask(), PathsConfig.parse("best:2"))).chosen == 1
    thought = Said(["a a a a </think> <answer> 1 </answer>"], {"preference": len})
    spent = asyncio.run(answer(thought, ask(), PathsConfig.parse("best:1"))).spent
    assert spent.judged == len(ask().prompt_ids) + 4  # the thought is not read: three words, and the end


class Said:
    """A writer that gives the answers of a list in turn."""

    def __init__(self, answers: Sequence[str], judges: dict[Judge, Any]) -> None:
        self.answers, self._judges, self.count = answers, judges, 0

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        ids = [*WORDS.encode(self.answers[self.count]), WORDS.eos_id]
        self.count += 1
        stop = Stop.EOS if len(ids) <= request.max_tokens else Stop.LENGTH
        ids = ids[: request.max_tokens]
        return Sample(request.prompt_ids, tuple(ids), (-1.0,) * len(ids), stop, (Span(0, len(ids)),))

    async def beams(self, request: Request, width: int) -> Beams:
        raise NotImplementedError

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        return [float(self._judges[judge](response)) for _, response in answers]

    def judges(self) -> frozenset[Judge]:
        return frozenset(self._judges)


def test_of_two_judges_the_one_who_reads_the_thought() -> None:
    both: dict[Judge, Any] = {"preference": len, "process": lambda r: -len(r)}
    answers = ["a a </think> <answer> 1 </answer>", "</think> <answer> 2 </answer>"]
    for name, chosen in (("best:2", 1), ("best:2:preference", 0)):
        assert asyncio.run(answer(Said(answers, both), ask(), PathsConfig.parse(name))).chosen == chosen


def test_beams_are_scored_and_silent() -> None:
    found, told = outcome("beam:3", ask())
    assert told == {}
    scores = [p.score for p in found.paths if p.ended]
    assert scores == [pytest.approx(p.logprob) for p in found.paths if p.ended]
    assert found.chosen == 0
    engine, asked = engine_of(), ask()
    request = Request(id=0, prompt_ids=asked.prompt_ids, max_tokens=asked.max_tokens, seed=0)
    search, steps = BeamSearch(engine.model, request, 3, eos_ids=WORDS.eos_ids), 1
    while search.step():
        steps += 1
    assert [p.sample.completion_ids for p in found.paths] == [s.completion_ids for s in search.best()]
    assert found.spent.written == 3 * steps
    even = asyncio.run(answer_by_beams(PathsConfig(kind="beam", width=3, alpha=1.0), local()))
    assert [p.score for p in even.paths] == [pytest.approx(p.logprob / p.tokens) for p in even.paths]
    assert even.best.score == max(p.score for p in even.paths if p.ended)  # type: ignore[type-var]


def test_beams_cost_what_was_computed() -> None:
    """Not what is left of it: a search is sure of short answers only when it has looked further."""

    class Sure(Said):
        async def beams(self, request: Request, width: int) -> Beams:
            return Beams([await self.write(request) for _ in range(width)], 9)

    found = asyncio.run(answer(Sure(["</think> 1"] * 4, {}), ask(), PathsConfig.parse("beam:4")))
    assert max(p.tokens for p in found.paths) == 3
    assert found.spent.written == 4 * 9


async def answer_by_beams(config: PathsConfig, writer: LocalWriter) -> Outcome:
    serving = asyncio.create_task(writer.serve())
    try:
        return await answer(writer, ask(), config)
    finally:
        serving.cancel()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("best:4", {}, "needs a model that judges"),
        ("best:4:preference", {}, "needs a reward model"),
        ("tree:4:process", {}, "needs one"),
        ("vote:4", {"temperature": 0.0}, "raise the temperature"),
        ("tree:4:rollouts", {"temperature": 0.0}, "above 0"),
        ("beam:4", {"budget": 3}, "whole answers"),
        ("beam:4", {"at_least": 3}, "whole answers"),
    ],
)
def test_what_cannot_be_is_one_sentence(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        outcome(name, ask(**more))
