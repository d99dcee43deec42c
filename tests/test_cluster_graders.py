"""Graders on a cluster, without Ray: every verdict comes once, whoever is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from scripted_ray import Anywhere, OutOfMemoryError, ScriptedRay
from scripted_ray import ray as ray  # a fixture

from liubai.cluster.graders import LOSSES, GraderLost, RayGrader, RemoteGraders
from liubai.grade import GradeItem, Verdict, grade


class Scripted:
    """Grades as it should, and is lost with a chance of ``die``."""

    def __init__(self, die: float, seed: int) -> None:
        self.die, self.rng, self.ended = die, random.Random(seed), False

    def wait(self, closed: Callable[[], bool]) -> None:
        if self.rng.random() < self.die / 2:
            raise GraderLost("it never came up")

    def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
        assert not self.ended
        if self.rng.random() < self.die:
            self.ended = True
            raise GraderLost("its node is gone")
        return [grade(GradeItem("exact", i.gold, i.response, i.meta)) for i in items]

    def end(self) -> None:
        self.ended = True


class Mortal(Scripted):
    """Comes up each time."""

    def wait(self, closed: Callable[[], bool]) -> None: ...


def items_of(count: int, verifier: str) -> list[GradeItem]:
    return [GradeItem(verifier, str(i), f"<think></think><answer>{i - i % 2}</answer>") for i in range(count)]


@pytest.fixture
def checker(tmp_path: Any) -> str:
    """Never called: it only has to be there."""
    (tmp_path / "checker.py").write_text("def check(gold, answer, meta): return False\n")
    return f"{tmp_path}/checker.py:check"


@pytest.mark.parametrize("die", [0.0, 0.15])
def test_every_verdict_comes_once_whoever_is_lost(
    die: float, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)
    seeds = iter(range(1000))
    hired: list[int] = []
    lock = threading.Lock()

    def hire(place: int) -> Scripted:
        with lock:
            hired.append(place)
            return Scripted(die, next(seeds))

    closed: list[bool] = []
    with RemoteGraders(hire, 3, 5.0, lambda: closed.append(True)) as pool:
        tickets = pool.submit(items_of(900, checker))
        verdicts = pool.gather(tickets)
        assert [v.correct for v in verdicts] == [i % 2 == 0 for i in range(900)]
        assert pool.errors == 0
        assert pool.lost >= len(hired) - 3
        assert (pool.lost > 0) == (die > 0)
        assert pool.poll() == {}
        # bounded ones are graded at once, by nobody else
        before = len(hired)
        assert [v.correct for v in pool.gather(pool.submit(items_of(2, "exact")))] == [True, False]
        assert len(hired) == before
    assert closed == [True]


def test_answers_that_cost_one_grader_after_the_other_are_errors(checker: str) -> None:
    with RemoteGraders(lambda place: Mortal(1.0, 0), 1, 5.0) as pool:
        (verdict,) = pool.gather(pool.submit(items_of(1, checker)))
        pool.close()
        assert verdict.error == f"{LOSSES + 1} graders were lost: its node is gone"
        assert (pool.lost, pool.errors) == (LOSSES + 1, 1)


@pytest.mark.parametrize("good", [0, 1])
def test_where_no_grader_comes_up_others_have_its_work(
    good: int, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)

    class Absent(Scripted):
        def wait(self, closed: Callable[[], bool]) -> None:
            raise GraderLost("no room")

    hire = lambda place: Scripted(0, 0) if place < good else Absent(0, 0)  # noqa: E731
    with RemoteGraders(hire, 3, 5.0) as pool:
        errors = {v.error for v in pool.gather(pool.submit(items_of(100, checker)))}
        assert errors == ({None} if good else {"no grader comes up: no room"})


def test_whatever_a_grader_raises_nobody_waits_for_ever(checker: str) -> None:
    class Broken(Scripted):
        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            raise RuntimeError("no such file there")

    with RemoteGraders(lambda place: Broken(0, 0), 2, 5.0) as pool:
        verdicts = pool.gather(pool.submit(items_of(30, checker)))
        assert {v.error for v in verdicts} == {"no grader could say: no such file there"}
        assert pool.errors == 30


def test_a_grader_that_raised_is_asked_nothing_more(checker: str) -> None:
    hired: list[Scripted] = []

    class Once(Scripted):
        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            if len(hired) == 1:
                raise RuntimeError("its state is unknown")
            return super().grade(items, closed)

    def hire(place: int) -> Scripted:
        hired.append(Once(0, 0))
        return hired[-1]

    with RemoteGraders(hire, 1, 5.0) as pool:
        (first,) = pool.gather(pool.submit(items_of(1, checker)))
        assert first.error == "no grader could say: its state is unknown"
        assert {v.error for v in pool.gather(pool.submit(items_of(30, checker)))} == {None}
    assert [grader.ended for grader in hired] == [True, True]


@pytest.mark.parametrize("where", ["hire", "wait"])
def test_whatever_goes_wrong_in_hiring_another_place_has_its_work(
    where: str, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)
    tried: list[int] = []

    class Broken(Scripted):
        def wait(self, closed: Callable[[], bool]) -> None:
            raise ImportError("no such module there")

        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            raise AssertionError("it has never come up")

    def hire(place: int) -> Scripted:
        if place:
            return Scripted(0, 0)
        tried.append(place)
        if where == "hire":
            raise ValueError("the placement group is gone")
        return Broken(0, 0)

    with RemoteGraders(hire, 2, 5.0) as pool:
        verdicts = pool.gather(pool.submit(items_of(100, checker)))
        assert {v.error for v in verdicts} == {None}
        pool._threads[0].join(10)
        assert len(tried) == LOSSES + 1


def test_a_grader_killed_for_its_memory_costs_no_verdict(
    checker: str, ray: ScriptedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)
    killed = OutOfMemoryError("Task was killed due to the node running low on memory")
    ray.actors = [
        {"here": lambda: killed},
        {"grade": lambda items: killed},
        {"grade": lambda items: Scripted(0, 0).grade(items, bool)},
    ]
    places: Any = Anywhere(1)
    with RemoteGraders(lambda place: RayGrader(5.0, places, place), 1, 5.0) as pool:
        verdicts = pool.gather(pool.submit(items_of(5, checker)))
        assert [v.error for v in verdicts] == [None] * 5
        assert pool.lost == 2


def test_to_close_is_not_to_wait_for_an_answer(checker: str) -> None:
    class Slow(Scripted):
        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            while not closed():
                threading.Event().wait(0.01)
            raise GraderLost("the pool was closed")

    pool = RemoteGraders(lambda place: Slow(0, 0), 1, 5.0)
    tickets = pool.submit(items_of(3, checker))
    pool.close()
    verdicts = pool.gather(tickets)
    assert {v.error for v in verdicts} == {"the grader pool was closed"}
    assert pool.errors == pool.lost == 0
