"""A bound on staleness: what is too old is dropped, counted, and its problem asked again; nothing is lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rollouts import REWARDS, Recorder, weights_at

from liubai import ranks
from liubai.grade import GraderPool
from liubai.model.checkpoint import load
from liubai.problems import family, problem_at
from liubai.rollout.engine import Request
from liubai.stages.policy import PolicyConfig
from liubai.stages.rollouts import GradedGroup, Rollouts
from liubai.stages.together import Shared
from liubai.text.template import BARE, Template
from liubai.types import Problem, Sample


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool() as pool:
        yield pool


class Forgetful(Recorder):
    """Lets a request be asked for again."""

    def step(self) -> list[tuple[Request, Sample]]:
        self.given.clear()
        return super().step()


def rollouts_of(
    base: Path,
    pool: GraderPool,
    bound: int | None,
    verifier: str | None = None,
    ahead: int = 12,
    kind: type[Rollouts] = Rollouts,
) -> Rollouts:
    model, tokenizer = load(base / "checkpoint")

    def problem(index: int) -> Problem:
        found = problem_at(family("countdown"), "train", 0, index)
        return Problem(found.prompt, found.gold, verifier) if verifier else found

    return kind(
        Forgetful(model, tokenizer.eos_id, 40),
        Template(tokenizer, BARE),
        problem,
        pool,
        samples=4,
        max_tokens=24,
        temperature=1.0,
        seed=11,
        weights=REWARDS,
        ahead=ahead,
        max_staleness=bound,
    )


def staleness(graded: list[GradedGroup], version: int) -> int:
    return max(version - s.version for g in graded for s in g.group.samples)


@pytest.mark.parametrize("user_code", [False, True])
@pytest.mark.parametrize("bound", [0, 1, 2])
def test_nothing_older_is_learned_from(
    bound: int, user_code: bool, base: Path, pool: GraderPool, tmp_path: Path
) -> None:
    (tmp_path / "checker.py").write_text("def check(gold, answer, meta):\n    return False\n")
    verifier = f"{tmp_path}/checker.py:check" if user_code else None
    free = rollouts_of(base, pool, None)  # bounded verifiers: nothing of the pool that the other one has
    bounded = rollouts_of(base, pool, bound, verifier)
    taken = Counter[int]()
    oldest = 0
    for version in range(8):
        for rollouts in (free, bounded):
            rollouts.engine.load(weights_at(base, version), version)
        oldest = max(oldest, staleness(free.collect(3), version))
        graded = bounded.collect(3)
        assert staleness(graded, version) <= bound
        assert all(a.verdict.error is None for g in graded for a in g.answers)
        taken.update(g.index for g in graded)
        # every problem that was begun is taken, or is still to come
        assert set(taken.values()) == {1}
        assert taken.keys() | bounded._open.keys() == set(range(bounded.next_index))
        waiting = {i * 4 + j for i, done in bounded._open.items() for j in done}
        pending = Counter(p.request.id for p in bounded.engine.partials())
        assert not waiting & pending.keys()
        assert waiting | pending.keys() == {i * 4 + j for i in bounded._open for j in range(4)}
        assert set(pending.values()) <= {1}
    assert oldest > bound  # it would have been otherwise
    assert bounded.stale > 0
    assert free.stale == 0


def test_without_staleness_the_bound_changes_nothing(base: Path, pool: GraderPool) -> None:
    free, bounded = (rollouts_of(base, pool, bound, ahead=0) for bound in (None, 0))
    for version in range(2):
        for rollouts in (free, bounded):
            rollouts.engine.load(weights_at(base, version), version)
        assert free.collect(3) == bounded.collect(3)
    assert bounded.stale == 0


def test_the_bound_is_part_of_a_fingerprint_only_where_it_is_set() -> None:
    usual, bounded = PolicyConfig(steps=1), PolicyConfig(steps=1, max_staleness=2)
    assert "max_staleness" not in usual.model_dump(mode="json")
    assert bounded.model_dump(mode="json")["max_staleness"] == 2


def test_what_was_dropped_stays_counted(
    base: Path, pool: GraderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever goes on, alone or on several ranks: the count is that of the whole stage."""
    here = rollouts_of(base, pool, 0)
    for version in range(4):
        here.engine.load(weights_at(base, version), version)
        here.collect(3)
    assert (dropped := here.stale) > 0
    state = json.loads(json.dumps(here.state()))
    there = rollouts_of(base, pool, 0)
    there.restore(state)
    assert there.stale == dropped
    monkeypatch.setattr(ranks, "_world", 2)
    shared = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "_rank", rank)
        shared.append(rollouts_of(base, pool, 0, kind=Shared))
        shared[-1].restore(state)
    shared[1]._dropped += 3  # on one rank alone
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "gather", lambda value: [r._stale_here() for r in shared])
        assert [r.stale for r in shared] == [dropped + 3] * 2
    parts = [Rollouts.state(r) for r in shared]
    monkeypatch.setattr(ranks, "gather", lambda value: parts)
    assert shared[0].state()["stale"] == dropped + 3
