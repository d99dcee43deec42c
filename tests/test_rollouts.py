"""From problems to graded groups: nothing lost, nothing doubled, nothing mixed up."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from scripted_engine import ScriptedEngine
from torch import Tensor

from liubai.grade import GraderPool, RewardWeights
from liubai.model.checkpoint import load
from liubai.model.transformer import Transformer
from liubai.problems import family, problem_at
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive, stream
from liubai.stages.rl_metrics import shuffle_rewards
from liubai.stages.rollouts import GradedGroup, Rollouts
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Group, Problem, Reward, Sample, Span, Stop

#: An untrained model is never right: the length is what its answers differ in.
REWARDS = RewardWeights(overlong=-0.5, overlong_from=0.0)


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool() as pool:
        yield pool


class Recorder(TorchEngine):
    """Remembers what it was asked and what it gave back."""

    def __init__(self, model: Transformer, eos: int, slots: int) -> None:
        super().__init__(model, eos_ids=[eos], slots=slots, max_length=256)
        self.asked: list[Request] = []
        self.given: dict[int, Sample] = {}

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self.asked += requests
        super().submit(requests)

    def step(self) -> list[tuple[Request, Sample]]:
        finished = super().step()
        for request, sample in finished:
            assert request.id not in self.given
            self.given[request.id] = sample
        return finished


def rollouts_of(
    base: Path, pool: GraderPool, *, ahead: int, max_tokens: int = 24, slots: int = 6
) -> Rollouts:
    model, tokenizer = load(base / "checkpoint")
    return Rollouts(
        Recorder(model, tokenizer.eos_id, slots),
        Template(tokenizer, BARE),
        lambda index: problem_at(family("countdown"), "train", 0, index),
        pool,
        samples=4,
        max_tokens=max_tokens,
        temperature=1.0,
        seed=11,
        weights=REWARDS,
        ahead=ahead,
    )


def weights_at(base: Path, version: int) -> dict[str, Tensor]:
    """Weights that wander a little with every version."""
    model, _ = load(base / "checkpoint")
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.01 * version)
    return model.state_dict()


def collect(rollouts: Rollouts, base: Path, version: int) -> list[GradedGroup]:
    rollouts.engine.load(weights_at(base, version), version)
    return rollouts.collect(3)


def test_plain_rollouts_are_complete_and_in_order(base: Path, pool: GraderPool) -> None:
    rollouts = rollouts_of(base, pool, ahead=0)
    lengths = set()
    for version in range(2):
        graded = collect(rollouts, base, version)
        assert [g.index for g in graded] == [3 * version, 3 * version + 1, 3 * version + 2]
        assert rollouts.engine.pending == 0
        model, tokenizer = load(base / "checkpoint")
        model.load_state_dict(weights_at(base, version))
        alone = TorchEngine(copy.deepcopy(model), eos_ids=tokenizer.eos_ids, slots=1, max_length=256)
        alone.load(model.state_dict(), version)
        for g in graded:
            problem = rollouts.problem_at(g.index)
            assert g.group.problem == problem
            assert len(g.group.samples) == len(g.answers) == len(g.group.rewards) == 4
            for j, (s, answer, reward) in enumerate(
                zip(g.group.samples, g.answers, g.group.rewards, strict=True)
            ):
                assert answer.sample is s
                assert s.prompt_ids == tuple(rollouts.template.prompt_ids(problem.prompt))
                assert s.versions == (Span(version, len(s.completion_ids)),)
                request = Request(
                    id=0, prompt_ids=s.prompt_ids, max_tokens=24, seed=derive(11, "sample", g.index, j)
                )
                (wanted,) = generate(alone, [request])
                assert s.completion_ids == wanted.completion_ids
                # the reward is that of this very answer
                assert reward.parts["overlong"] == pytest.approx(-0.5 * len(s.completion_ids) / 24)
                if s.stop is Stop.LENGTH:
                    assert (reward.parts["correct"], reward.parts["format"]) == (0, 0)
                lengths.add(len(s.completion_ids))
    assert len(lengths) > 5


@pytest.mark.parametrize(("max_tokens", "slots"), [(24, 6), (24, 40), (1, 40)])
def test_inflight_loses_and_doubles_nothing(
    base: Path, pool: GraderPool, max_tokens: int, slots: int
) -> None:
    """With a budget of one token all groups in the engine end at once: a step takes only its own."""
    rollouts = rollouts_of(base, pool, ahead=4, max_tokens=max_tokens, slots=slots)
    engine = rollouts.engine
    assert isinstance(engine, Recorder)
    taken: dict[int, Sample] = {}
    spans, ready = 0, set[int]()
    for version in range(6):
        graded = collect(rollouts, base, version)
        assert len(graded) == 3
        # what was complete before comes first: nothing waits for ever
        assert len(ready & {g.index for g in graded}) == min(3, len(ready))
        assert [g.index for g in graded] == sorted(g.index for g in graded)
        for g in graded:
            for j, s in enumerate(g.group.samples):
                number = g.index * 4 + j
                assert number not in taken
                assert s is engine.given[number]
                taken[number] = s
                spans = max(spans, len(s.versions))
        waiting = {int(i) * 4 + int(j) for i, done in rollouts.state()["open"].items() for j in done}
        ready = {int(i) for i, done in rollouts.state()["open"].items() if len(done) == 4}
        pending = {p.request.id for p in engine.partials()}
        assert not taken.keys() & (waiting | pending)
        assert not waiting & pending
        assert taken.keys() | waiting | pending == {r.id for r in engine.asked}
        assert {r.id for r in engine.asked} == set(range(rollouts.next_index * 4))
        assert rollouts.next_index == 3 * version + 7  # three taken a step, seven open
    assert len(taken) == 6 * 3 * 4
    # more slots than answers: all groups end in the same token, at the budget, and wait their turn
    assert spans > 1 or slots == 40


@pytest.mark.parametrize("saved_after", [1, 2])
@pytest.mark.parametrize(("ahead", "max_tokens", "slots"), [(0, 24, 6), (4, 24, 18), (4, 1, 40)])
def test_rollouts_go_on_elsewhere_bit_for_bit(
    base: Path, pool: GraderPool, ahead: int, max_tokens: int, slots: int, saved_after: int
) -> None:
    here = rollouts_of(base, pool, ahead=ahead, max_tokens=max_tokens, slots=slots)
    for version in range(saved_after):
        collect(here, base, version)
    state = json.loads(json.dumps(here.state()))
    finished = sum(len(done) for done in state["open"].values())
    assert (finished > 0) == (ahead > 0)  # answers whose groups are not complete, or not yet taken
    there = rollouts_of(base, pool, ahead=ahead, max_tokens=max_tokens, slots=slots)
    there.restore(state)
    assert json.loads(json.dumps(there.state())) == state
    for version in range(saved_after, 5):
        assert collect(here, base, version) == collect(there, base, version)
    assert json.dumps(here.state()) == json.dumps(there.state())


def number(request: Request) -> tuple[str, Stop]:
    return f"3 </think> <answer> {request.id} </answer>", Stop.EOS


@pytest.mark.parametrize("user_code", [False, True])
def test_every_verdict_reaches_its_own_sample(
    user_code: bool, world: TextTokenizer, pool: GraderPool, tmp_path: Path
) -> None:
    """Right is the answer that is the number of its group; also when a process of the pool says so."""
    (tmp_path / "checker.py").write_text("def check(gold, answer, meta):\n    return answer == gold\n")
    verifier = f"{tmp_path}/checker.py:check" if user_code else "exact"
    rollouts = Rollouts(
        ScriptedEngine(world, number, at_once=2),
        Template(world, BARE),
        lambda index: Problem(f"{index}", str(index * 4 + index % 4), verifier),
        pool,
        samples=4,
        max_tokens=20,
        temperature=1.0,
        seed=0,
        weights=RewardWeights(),
    )
    for first in (0, 3):
        graded = rollouts.collect(3)
        assert [g.index for g in graded] == [first, first + 1, first + 2]
        for g in graded:
            right = [j == g.index % 4 for j in range(4)]
            assert [a.verdict.error for a in g.answers] == [None] * 4
            assert [a.verdict.answer for a in g.answers] == [str(g.index * 4 + j) for j in range(4)]
            assert [a.verdict.correct for a in g.answers] == right
            # right 1, wrong −1, and half a point for the form
            assert [r.total for r in g.group.rewards] == [1.5 if ok else -0.5 for ok in right]


def test_shuffled_rewards_stay_in_their_group() -> None:
    sample = Sample((1,), (2,), (-1.0,), Stop.EOS, (Span(0, 1),))
    groups = [
        Group(Problem("", "", "exact"), (sample,) * 8, tuple(Reward({"correct": r}, r + g) for r in range(8)))
        for g in range(5)
    ]
    got = shuffle_rewards(groups, stream(0, "shuffle", 1))
    for before, after in zip(groups, got, strict=True):
        assert Counter(r.total for r in after.rewards) == Counter(r.total for r in before.rewards)
        assert after.samples == before.samples
        assert after.problem is before.problem
        assert after.rewards != before.rewards
    assert len({tuple(r.parts["correct"] for r in g.rewards) for g in got}) > 1  # not one order for all
    assert got == shuffle_rewards(groups, stream(0, "shuffle", 1))
