"""Actors as the engine sees them: so many places, each with a process behind it that writes answers, or dies.

The engine says what it wants and returns at once; what came of it is heard later. That is all that
:class:`liubai.cluster.engine.RemoteEngine` knows of Ray, and a test can be a crew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from liubai.rollout.engine import Partial
from liubai.types import Sample, Span, Stop


class Written(NamedTuple):
    """An answer on its way home: of which lot and request; the prompt is known there. ``spans`` are
    (version, count)."""

    lot: int
    id: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: str
    spans: tuple[tuple[int, int], ...]

    def sample(self, prompt_ids: tuple[int, ...]) -> Sample:
        spans = tuple(Span(*span) for span in self.spans)
        return Sample(prompt_ids, self.ids, self.logprobs, Stop(self.stop), spans)


def written(lot: int, id: int, sample: Sample) -> Written:
    spans = tuple((span.version, span.count) for span in sample.versions)
    return Written(lot, id, sample.completion_ids, sample.logprobs, sample.stop.value, spans)


@dataclass(frozen=True, slots=True)
class Report:
    """What the actor in ``place`` has written since its last report. The first one says that it is there.
    ``begun_again`` counts answers that had become too old, and of which it has thrown away what there was."""

    place: int
    answers: tuple[Written, ...] = ()
    begun_again: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The actor in ``place`` is gone, with all that it had not reported."""

    place: int
    why: str


class Crew(Protocol):
    """Places 0 … ``size`` − 1. Nothing here waits but ``hear``."""

    size: int

    def start(self, place: int) -> None:
        """Put a new actor there. Whoever was there before is ended, and not heard any more."""

    def vacant(self, place: int) -> bool:
        """Is it known that who was lost there is gone? A new one may be lost with the same node otherwise."""

    def share(self, weights: Mapping[str, Tensor]) -> object:
        """Weights where every actor finds them, put there once; what is told to actors in their place."""

    def load(self, place: int, weights: object, version: int, oldest: int | None) -> None:
        """Use what was shared. What was begun under weights older than ``oldest`` is begun again."""

    def write(self, place: int, lot: int, asked: Sequence[Partial], version: int) -> None:
        """Write these, under weights of ``version`` at least."""

    def cancel(self, place: int, lot: int, ids: Sequence[int]) -> None:
        """Leave these requests of a lot unwritten."""

    def hear(self, seconds: float) -> list[Report | Lost]:
        """What there is to report, waiting for it so long at most. Raises what went wrong in an actor that
        would go wrong in any other, too."""

    def close(self) -> None:
        """End them all."""
