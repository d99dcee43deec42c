"""Actors without processes: they write what the request says, die when they are told, and remember all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from liubai.cluster.crew import Lost, Report, Written, written
from liubai.cluster.engine import RemoteEngine
from liubai.rollout.engine import Partial, Request
from liubai.types import Sample, Span, Stop


def tokens_at_most(request: Request) -> int:
    return len(request.prompt_ids) + request.max_tokens


def answer(request: Request, lot: Sequence[int], spans: Sequence[Span]) -> Sample:
    """Its tokens are the request's; its log-probabilities depend on who stands beside it, as they do."""
    rng = random.Random(request.seed)
    ids = tuple(rng.randrange(2, 60) for _ in range(sum(span.count for span in spans)))
    beside = random.Random(str(lot)).random()
    return Sample(
        request.prompt_ids, ids, tuple(-rng.random() - 1e-6 * beside for _ in ids), Stop.EOS, tuple(spans)
    )


def length_of(request: Request) -> int:
    return random.Random(request.seed + 1).randint(1, request.max_tokens)


@dataclass
class Told:
    """A lot that an actor has. ``spans`` of each request as far as it is written."""

    number: int
    asked: tuple[Request, ...]
    spans: dict[int, list[Span]]


@dataclass
class Hand:
    version: int = -1
    reported: bool = False
    lots: list[Told] = field(default_factory=list)


class ScriptedCrew:
    """``die``: the chance that an actor dies when somebody listens; ``twice``: that an answer is told twice;
    ``rush``: that an answer ends then. With 0, 0 and 1 it is a crew without accidents."""

    def __init__(
        self, size: int, seed: int = 0, *, die: float = 0.0, twice: float = 0.0, rush: float = 1.0
    ) -> None:
        self.size, self.rng = size, random.Random(seed)
        self.die, self.twice, self.rush = die, twice, rush
        self.hands: dict[int, Hand] = {}
        self.starts = [0] * size
        self.written: list[tuple[int, tuple[int, ...]]] = []  # (place, ids), in the order of the telling
        self.most = 0  # tokens that an actor with more than one lot had to write
        self.told_twice = 0
        self.closed = False

    # ---- a crew ----

    def start(self, place: int) -> None:
        self.hands[place] = Hand()
        self.starts[place] += 1

    def vacant(self, place: int) -> bool:
        return True

    def share(self, weights: Mapping[str, Tensor]) -> object:
        return dict(weights)

    def load(self, place: int, weights: object, version: int, oldest: int | None) -> None:
        hand = self.hands[place]
        assert hand.reported, "it would be given every version that there was meanwhile"
        assert version > hand.version
        hand.version = version

    def write(self, place: int, lot: int, asked: Sequence[Partial], version: int) -> None:
        hand = self.hands[place]
        assert hand.reported, "an actor that has not said that it is there"
        assert asked
        assert hand.version >= version
        requests = tuple(partial.request for partial in asked)
        hand.lots.append(Told(lot, requests, {p.request.id: list(p.versions) for p in asked}))
        self.written.append((place, tuple(r.id for r in requests)))
        if len(hand.lots) > 1:
            self.most = max(self.most, self.outstanding(place))

    def cancel(self, place: int, lot: int, ids: Sequence[int]) -> None:
        for told in self.hands[place].lots:
            if told.number == lot:
                for id in ids:
                    del told.spans[id]

    def hear(self, seconds: float) -> list[Report | Lost]:
        news: list[Report | Lost] = []
        for place in sorted(self.hands):
            hand = self.hands[place]
            if self.rng.random() < self.die:
                del self.hands[place]
                news.append(Lost(place, "it was told to"))
            elif not hand.reported:
                hand.reported = True
                news.append(Report(place))
            elif ended := self.advance(hand):
                news.append(Report(place, tuple(ended)))
        self.rng.shuffle(news)
        return news

    def close(self) -> None:
        self.closed = True

    # ---- what they do ----

    def advance(self, hand: Hand) -> list[Written]:
        ended = []
        for told in hand.lots:
            numbers = [request.id for request in told.asked]
            for request in told.asked:
                spans = told.spans.get(request.id)
                if spans is None:
                    continue
                left = length_of(request) - sum(span.count for span in spans)
                if self.rng.random() < self.rush or left <= 1:
                    spans = grown(spans, Span(hand.version, left))
                    ended.append(written(told.number, request.id, answer(request, numbers, spans)))
                    del told.spans[request.id]
                else:
                    told.spans[request.id] = grown(spans, Span(hand.version, 1))
        hand.lots = [told for told in hand.lots if told.spans]
        again = [one for one in ended if self.rng.random() < self.twice]
        self.told_twice += len(again)
        return ended + again

    def outstanding(self, place: int) -> int:
        lots = self.hands[place].lots
        return sum(tokens_at_most(r) for told in lots for r in told.asked if r.id in told.spans)


def grown(spans: list[Span], more: Span) -> list[Span]:
    if not more.count:
        return spans
    if spans and spans[-1].version == more.version:
        return [*spans[:-1], Span(more.version, spans[-1].count + more.count)]
    return [*spans, more]


def requests_of(groups: int, samples: int, first: int = 0, max_tokens: int = 12) -> list[Request]:
    return [
        Request(id=g * samples + j, prompt_ids=(5, g, 7), max_tokens=max_tokens, seed=1000 * g + j)
        for g in range(first, first + groups)
        for j in range(samples)
    ]


def engine_of(crew: ScriptedCrew, **settings: object) -> RemoteEngine:
    plain: dict[str, object] = {"slots": 8, "max_length": 32}
    return RemoteEngine(crew, **(plain | settings))  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
