"""Answers from many actors: the ``Engine`` protocol over a :class:`~liubai.cluster.crew.Crew`.

An answer depends on its request and on the weights alone, so one that was lost is simply asked for again:
nothing is lost, and what comes twice is dropped by the number of its lot. There are two ways of sharing out.

*Exact*, where weights change between steps only: what is submitted before a step is cut into one lot an
actor, a group's answers together, and an actor is given one lot at a time. Who stands beside whom in a batch
decides the last bit of a log-probability; so it is decided by the lot alone, and a lot that was lost is
written again whole. A run in which actors were killed is, bit for bit, the run in which none was.

*In flight*, a lot is a group, an actor has several, and of a lost one only what is missing is asked for
again.

Left out on purpose: taking work from an actor that is slow but alive.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from liubai.cluster.crew import Crew, Lost, Report
from liubai.cluster.lots import Lot, Place, lot_of, tokens_at_most
from liubai.cluster.status import describe
from liubai.errors import UserError
from liubai.rollout.engine import Fresh, Partial, Request, StaleWeights
from liubai.types import Sample

#: Seconds that ``step`` waits for news.
PATIENCE = 0.05
#: Losses in a row, of one place whose actor never came up or over the same answers, after which the run ends.
LOSSES = 8
#: Seconds before a lost actor is started again, from the second loss in a row on: doubled each time, at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: Seconds of listening after which an actor that is silent over its work is taken for lost, and after which
#: the run ends when not a single one has come up. A model may be compiled or loaded from far away meanwhile.
SILENT = 300.0


class RemoteEngine:
    """See :class:`liubai.rollout.engine.Engine`. ``slots`` and ``max_length`` are of each actor's engine.

    ``room``: in flight, tokens that an actor is given to write at most, twice what it has slots for unless
    told otherwise, so that it has work during an update; the rest waits here. ``max_staleness``: an answer
    with a token that is more versions old is thrown away, counted in ``stale`` and asked for again.
    ``silent``: :data:`SILENT` unless told otherwise. ``warn`` is told of losses, ``status`` (a line) of what
    everybody does.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        slots: int,
        max_length: int,
        exact: bool = True,
        max_staleness: int | None = None,
        room: int | None = None,
        silent: float = SILENT,
        warn: Callable[[str], None] = lambda _: None,
        status: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.crew, self.slots, self.max_length = crew, slots, max_length
        self.exact, self.max_staleness, self.silent = exact, max_staleness, silent
        self.room = room or 2 * slots * max_length
        self.losses = self.doubled = self.stale = 0  #: actors lost, answers dropped as doubled, and as stale
        self._warn, self._status, self._clock = warn, status, clock
        self._version, self._closed = -1, False
        self._weights: object = None
        self._numbers = itertools.count()
        self._open: dict[int, Partial] = {}  # all that is pending, in order
        self._uncut: list[Partial] = []
        self._waiting: deque[Lot] = deque()
        self._out: dict[int, Lot] = {}
        self._ended: list[tuple[Request, Sample]] = []  # by the last step
        self._kept: list[tuple[Request, Sample]] = []  # for the next one
        self._born = self._told = self._clock()
        self._places = [Place() for _ in range(crew.size)]
        for place in range(crew.size):
            crew.start(place)

    # ---- the protocol ----

    @property
    def version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return len(self._open) + len(self._kept)

    @property
    def actors(self) -> int:
        """How many write at the same time."""
        return self.crew.size

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        if version <= self._version:
            raise StaleWeights(f"weights of version {version} are not newer than {self._version}")
        self._weights = None  # nobody needs the old ones any more: there need not be room for both
        self._weights, self._version = self.crew.share(weights), version
        for place, actor in enumerate(self._places):
            if actor.state == "there":  # one that comes later is given the newest
                self._load(place)

    def submit(self, requests: Iterable[Request]) -> None:
        self.resume([Partial(request) for request in requests])

    def resume(self, partials: Sequence[Partial]) -> None:
        for partial in partials:
            need = tokens_at_most(partial.request)
            if need > self.max_length:
                raise ValueError(
                    f"a request needs {need} tokens (prompt + max_tokens), the engine holds "
                    f"{self.max_length}; lower max_tokens or raise max_length"
                )
            if partial.request.id in self._open:
                raise ValueError(f"request {partial.request.id} is pending already")
            self._open[partial.request.id] = partial
            self._uncut.append(partial)

    def step(self) -> list[tuple[Request, Sample]]:
        """What has ended, if anything has within a moment."""
        if self._version < 0:
            raise StaleWeights("the engine has no weights yet: call load first")
        self._ended, self._kept = self._kept, []
        if not self._open:
            return self._ended
        self._start_again()
        self._hand_out()
        began = self._clock()
        news = self.crew.hear(PATIENCE)
        listened = self._clock() - began
        for one in news:
            if isinstance(one, Lost):
                self._lose(one.place, one.why)
            else:
                self._take(one)
        self._count_silence(listened)
        self._hand_out()
        self._tell()
        return self._ended

    def abort(self) -> list[tuple[Request, Sample]]:
        return self.cancel([*self._open, *(request.id for request, _ in self._kept)])

    def cancel(self, ids: Iterable[int]) -> list[tuple[Request, Sample]]:
        """What was begun elsewhere is not fetched: nothing comes back."""
        ids = set(ids)
        self._kept = [pair for pair in self._kept if pair[0].id not in ids]
        gone = {id for id in ids if self._open.pop(id, None) is not None}
        if not gone:
            return []
        self._uncut = [p for p in self._uncut if p.request.id not in gone]
        for place, actor in enumerate(self._places):
            for lot in actor.lots:
                if mine := [id for id in lot.left if id in gone]:
                    self.crew.cancel(place, lot.number, mine)
        for lot in (*self._waiting, *self._out.values()):
            lot.asked = {id: p for id, p in lot.asked.items() if id not in gone}
            lot.left = {id: n for id, n in lot.left.items() if id not in gone}
        self._clear()
        return []

    def fresh(self) -> list[Fresh]:
        """Answers come home whole: all tokens of those that the last step returned."""
        return [
            Fresh(request.id, token, logprob)
            for request, sample in self._ended
            for token, logprob in zip(sample.completion_ids, sample.logprobs, strict=True)
        ]

    def partials(self) -> list[Partial]:
        """As they were asked for: what actors have written of them since stays with the actors. An answer
        that has come home and that no step has returned yet is asked for again, too."""
        return [Partial(request) for request, _ in self._kept] + list(self._open.values())

    def close(self) -> None:
        """A second time does nothing."""
        if not self._closed:
            self._closed = True
            self.crew.close()

    # ---- beside it ----

    def ask(self, requests: Sequence[Request]) -> list[Sample]:
        """As :meth:`ask_each`, of one of those that answer."""
        return next(iter(self.ask_each(requests).values()), [])

    def ask_each(self, requests: Sequence[Request]) -> dict[int, list[Sample]]:
        """Answers to the same requests by every actor that is there, by its place, before all that waits.
        The ids must be below 0; an id belongs to one actor, so they are told apart by what they are lowered
        by. At least one actor answers; one that is lost, or has not come up, is not waited for."""
        if not requests:
            return {}
        lower = max(-request.id for request in requests)
        asked = {
            place: [replace(request, id=request.id - place * lower) for request in requests]
            for place in range(self.crew.size)
        }
        for place, mine in asked.items():
            uncut = len(self._uncut)
            self.submit(mine)
            self._waiting.appendleft(lot_of(self._uncut[uncut:], place))
            del self._uncut[uncut:]
        ids = {request.id for mine in asked.values() for request in mine}
        found: dict[int, Sample] = {}
        others: list[tuple[Request, Sample]] = []
        missing = set(asked)
        while missing == set(asked) or any(self._places[place].state == "there" for place in missing):
            for request, sample in self.step():
                if request.id in ids:
                    found[request.id] = sample
                else:
                    others.append((request, sample))
            missing = {place for place in missing if any(r.id not in found for r in asked[place])}
        self.cancel(ids - found.keys())
        self._kept = others
        return {p: [found[r.id] for r in asked[p]] for p in asked if p not in missing}

    # ---- what goes out ----

    def _load(self, place: int) -> None:
        oldest = None if self.max_staleness is None else self._version - self.max_staleness
        self.crew.load(place, self._weights, self._version, oldest)

    def _hand_out(self) -> None:
        """Lots to the least loaded, while there is room."""
        self._cut()
        for lot in list(self._waiting):
            place = self._taker(lot)
            if place is None and lot.place is None:
                return  # what comes after it waits for it
            if place is None:
                continue
            self._waiting.remove(lot)
            lot.number = next(self._numbers)
            self._out[lot.number] = lot
            self._places[place].lots.append(lot)
            self.crew.write(place, lot.number, list(lot.asked.values()), self._version)

    def _taker(self, lot: Lot) -> int | None:
        """The place that has room for it."""
        places = range(self.crew.size) if lot.place is None else (lot.place,)
        there = [place for place in places if self._places[place].state == "there"]
        place = min(there, key=lambda place: self._places[place].tokens, default=None)
        if place is None:
            return None
        actor = self._places[place]
        # whatever the room, an actor takes what is its own, and one without work what there is
        full = self.exact or (lot.place is None and actor.tokens + lot.tokens > self.room)
        return None if actor.lots and full else place

    def _cut(self) -> None:
        """What was submitted since the last time becomes lots."""
        if not self._uncut:
            return
        by_prompt = itertools.groupby(self._uncut, key=lambda partial: partial.request.prompt_ids)
        groups = [list(group) for _, group in by_prompt]
        if self.exact:
            n = min(self.crew.size, len(groups))
            edges = [i * len(groups) // n for i in range(n + 1)]
            lots = [list(itertools.chain(*groups[a:b])) for a, b in itertools.pairwise(edges)]
        else:
            lots = [g[i : i + self.slots] for g in groups for i in range(0, len(g), self.slots)]
        self._waiting.extend(lot_of(lot) for lot in lots)
        self._uncut = []

    # ---- what comes home ----

    def _take(self, report: Report) -> None:
        actor = self._places[report.place]
        if actor.state == "starting":
            actor.state = "there"
            if self._version >= 0:
                self._load(report.place)
        actor.silent = 0.0
        self.stale += report.begun_again
        now = self._clock()
        for one in report.answers:
            lot = self._out.get(one.lot)
            if lot is None or one.id not in lot.left:
                self.doubled += 1
                continue
            del lot.left[one.id]
            actor.losses = lot.losses = 0
            actor.lately.append((now, len(one.ids)))
            request = self._open[one.id].request
            sample = one.sample(request.prompt_ids)
            if self._is_stale(sample):
                self.stale += 1
                self._uncut.append(Partial(request))
                self._open[one.id] = Partial(request)
                continue
            del self._open[one.id]
            self._ended.append((request, sample))
        self._clear()

    def _is_stale(self, sample: Sample) -> bool:
        return self.max_staleness is not None and self._version - sample.version > self.max_staleness

    def _clear(self) -> None:
        """Forget lots of which nothing is left."""
        self._waiting = deque(lot for lot in self._waiting if lot.left)
        self._out = {number: lot for number, lot in self._out.items() if lot.left}
        for actor in self._places:
            actor.lots = [lot for lot in actor.lots if lot.left]

    # ---- losses ----

    def _lose(self, place: int, why: str) -> None:
        """Its work goes to the head of the queue; it is started again, later each time.

        Raises ``UserError`` when that has happened too often."""
        actor = self._places[place]
        if actor.state == "down":  # it was given up before
            return
        lots, actor.lots = actor.lots, []
        for lot in lots:
            del self._out[lot.number]
            lot.losses += 1
            if not self.exact:
                lot.asked = {id: partial for id, partial in lot.asked.items() if id in lot.left}
        self._waiting.extendleft(reversed(lots))
        self.losses += 1
        actor.losses += 1
        actor.unborn = actor.unborn + 1 if actor.state == "starting" else 0
        actor.lately.clear()
        left = sum(len(lot.left) for lot in lots)
        self._warn(
            f"rollout actor {place} was lost ({why}); it is started again"
            + (f", and {left} answers are written once more" if left else "")
        )
        if actor.unborn > LOSSES:
            raise UserError(
                f"rollout actor {place} was lost {actor.unborn} times in a row before it had come up "
                f"({why}); what was saved is whole: mend the cause and give the same command again"
            )
        if lots and max(lot.losses for lot in lots) > LOSSES:
            raise UserError(
                f"{LOSSES + 1} actors in a row were lost over the same {left} answers ({why}); fewer slots "
                "or a lower max_tokens need less memory. What was saved is whole"
            )
        waits = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (actor.losses - 2)) if actor.losses > 1 else 0.0
        actor.state, actor.silent, actor.due = "down", 0.0, self._clock() + waits

    def _start_again(self) -> None:
        for place, actor in enumerate(self._places):
            if actor.state == "down" and self._clock() >= actor.due and self.crew.vacant(place):
                actor.state = "starting"
                self.crew.start(place)

    def _count_silence(self, seconds: float) -> None:
        """Only while somebody listens, which in an update nobody does."""
        for place, actor in enumerate(self._places):
            actor.silent += seconds
            if actor.state == "there" and actor.lots and actor.silent > self.silent:
                self._lose(place, f"it has said nothing for {self.silent:.0f} s")
        absent = min(actor.silent if actor.state == "starting" else 0.0 for actor in self._places)
        if absent > self.silent:
            raise UserError(
                f"no rollout actor has come up within {self.silent:.0f} s: `ray status` says what the "
                "cluster has to give and what is asked of it; ask for fewer with --actors"
            )

    # ---- what everybody does ----

    def _tell(self) -> None:
        if (now := self._clock()) - self._told >= 1.0:
            self._told = now
            self._status(self.describe())

    def describe(self) -> str:
        """A line: what each actor does."""
        return describe(
            self._places,
            waiting=sum(len(lot.left) for lot in self._waiting),
            lost=self.losses,
            stale=self.stale,
            slots=self.slots,
            born=self._born,
            now=self._clock(),
        )
