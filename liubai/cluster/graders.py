"""Verdicts from other nodes: a ``GraderPool`` whose workers are actors on Ray, each with a pool of killable
processes of its own.

A checker that hangs or crashes is that pool's business. Here an actor may be lost with its node: its batch
goes to a new one, and a verdict counts once whatever comes twice. What the user's checker reads must be found
under the same path on every node.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from liubai.cluster.actors import ActorLost, fetched
from liubai.grade.judge import GradeItem, Verdict, error_verdict
from liubai.grade.pool import GraderPool

if TYPE_CHECKING:
    from liubai.cluster.placement import Places

#: Actors that may be lost over the same answers before these count as errors, or in a row in one place.
LOSSES = 5
#: Seconds before the next one is started.
PAUSE = 0.2
#: Seconds between two looks at whether the pool was closed meanwhile.
LOOK = 0.2


class GraderLost(Exception):
    """The actor is gone, and with it what it had not answered."""


class Grader(Protocol):
    """An actor as the pool sees it."""

    def wait(self, closed: Callable[[], bool]) -> None:
        """Until it is there. Raises as ``grade``."""

    def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
        """A verdict each. Raises :class:`GraderLost`, also once ``closed`` says so."""

    def end(self) -> None: ...


class RemoteGraders(GraderPool):
    """See :class:`liubai.grade.pool.GraderPool`. ``hire`` starts the actor of a place, whoever was there
    before; ``lost`` counts those that went."""

    def __init__(
        self,
        hire: Callable[[int], Grader],
        actors: int,
        timeout_s: float,
        done: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(workers=actors, timeout_s=timeout_s)
        self.lost = 0
        self._hire, self._done = hire, done
        self._places = itertools.count()
        self._abandoned = 0
        self._losses = Counter[int]()  # by ticket

    def close(self) -> None:
        super().close()
        done, self._done = self._done, None
        if done:
            done()

    def _serve(self) -> None:
        """Keep the actor of one place alive and feed it batches until the pool is closed."""
        place, grader, absent = next(self._places), None, 0
        batch: deque[tuple[int, GradeItem]] = deque()
        while not self._closed:
            try:
                if grader is None:  # before anything is taken: others may be free for it meanwhile
                    grader = self._hired(place)
                absent = 0
                if not (batch := self._take()):
                    break
                verdicts = grader.grade([item for _, item in batch], lambda: self._closed)
            except GraderLost as lost:
                if self._closed:
                    break
                _dismiss(grader)
                grader, absent = None, absent + 1
                self._put_back(batch, lost)
                if absent > LOSSES:
                    self._give_up(lost)
                    break
                time.sleep(PAUSE)
            except Exception as error:  # a thread that ended here would leave the pool waiting for ever
                _dismiss(grader)  # nobody knows in what state it is
                grader = None
                for ticket, item in batch:
                    self._finish(ticket, error_verdict(item, f"no grader could say: {error}"))
            else:
                for (ticket, _), verdict in zip(batch, verdicts, strict=True):
                    self._finish(ticket, verdict)
            batch = deque()
        _dismiss(grader)

    def _hired(self, place: int) -> Grader:
        """It is there. Raises :class:`GraderLost`, whatever went wrong."""
        grader = None
        try:
            grader = self._hire(place)
            grader.wait(lambda: self._closed)
        except Exception as error:
            _dismiss(grader)
            raise GraderLost(str(error) or type(error).__name__) from error
        return grader

    def _give_up(self, lost: GraderLost) -> None:
        """In this place no grader comes up. Others do, or nothing can be judged any more."""
        with self._changed:
            self._abandoned += 1
        while self._abandoned == self.workers and (batch := self._take()):
            for ticket, item in batch:
                self._finish(ticket, error_verdict(item, f"no grader comes up: {lost}"))

    def _put_back(self, batch: deque[tuple[int, GradeItem]], lost: GraderLost) -> None:
        """First in the queue again, but for answers that have cost too many graders."""
        for ticket, item in batch:
            self._losses[ticket] += 1
            if self._losses[ticket] > LOSSES:
                self._finish(ticket, error_verdict(item, f"{LOSSES + 1} graders were lost: {lost}"))
        with self._changed:
            self.lost += 1
            self._waiting.extendleft(job for job in reversed(batch) if job[0] in self._open)
            self._changed.notify_all()


def _dismiss(grader: Grader | None) -> None:
    if grader is not None:
        with suppress(Exception):  # it may be gone already
            grader.end()


class GraderActor:
    """On Ray: a pool of killable processes, and nothing else."""

    def __init__(self, timeout_s: float) -> None:
        self.pool = GraderPool(timeout_s=timeout_s)

    def here(self) -> list[Verdict]:
        return []

    def grade(self, items: Sequence[GradeItem]) -> list[Verdict]:
        return self.pool.gather(self.pool.submit(items))


class RayGrader:
    """See :class:`Grader`."""

    def __init__(self, timeout_s: float, places: Places, place: int) -> None:
        import ray

        kind = ray.remote(GraderActor)
        self._actor: Any = kind.options(**places.options(place), max_restarts=0).remote(timeout_s)

    def wait(self, closed: Callable[[], bool]) -> None:
        self._get(self._actor.here.remote(), closed)

    def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
        return self._get(self._actor.grade.remote(items), closed)

    def _get(self, ref: Any, closed: Callable[[], bool]) -> list[Verdict]:
        import ray

        while not ray.wait([ref], timeout=LOOK)[0]:
            if closed():
                raise GraderLost("the pool was closed")
        try:
            verdicts: list[Verdict] = fetched(ref)
        except ActorLost as lost:
            raise GraderLost(str(lost)) from lost
        return verdicts

    def end(self) -> None:
        import ray

        ray.kill(self._actor)
