"""A run of reinforcement learning on many machines, event by event: engines that write, a trainer that
learns.

Every engine has slots; its answers go on together, a token each a decoding step, and the step takes longer
the more there are. Who ends makes room. The trainer takes the first groups that are complete, learns, and
sends new weights, for which the engines pause. How far writing may run ahead is one number, ``staleness``: in
version v no more groups are begun than the updates up to v + staleness use (AReaL, arXiv 2505.24298, eq. 3),
and a complete group that was begun more versions ago than that is dropped. 0 is synchronous. An engine that
is lost loses what it was writing, and its answers begin again elsewhere.

Between two events an engine's speed is constant, so nothing happens at single tokens: a thousand engines and
a million answers take seconds. Left out on purpose: grading (it is done while others write), groups kept
together on one engine, the order of a real network. A trainer that is lost pauses and repeats its update:
every update is a resume point.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

from liubai.errors import UserError

Lengths = Callable[[random.Random], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """``step[n]`` are the seconds of a decoding step of n answers, n = 0 … slots; ``update(tokens)`` those of
    an update on so many; ``transfer`` those in which all wait for weights, and ``reread`` those more for each
    answer that an engine goes on with. ``failures`` and ``trainer_failures`` are expected losses a second, of
    an engine and of the trainer; ``restart``, seconds until it is back."""

    engines: int
    step: Sequence[float]
    update: Callable[[float], float]
    lengths: Lengths
    groups: int
    samples: int
    staleness: float = 0
    transfer: float = 0.0
    reread: float = 0.0
    failures: float = 0.0
    trainer_failures: float = 0.0
    restart: float = 300.0
    seed: int = 0

    @property
    def slots(self) -> int:
        return len(self.step) - 1


@dataclass(slots=True)
class Group:
    """The answers to one problem. ``version`` is that of the weights under which the first was begun."""

    number: int
    version: int
    left: int
    tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of it. ``written`` counts every token, ``trained`` those learned from, ``lost`` those of
    engines that went down; ``fates`` say of each group that it was "trained" or "dropped"; the rest is
    unfinished."""

    seconds: float = 0.0
    updates: int = 0
    begun: int = 0
    trained: int = 0
    written: float = 0.0
    lost: float = 0.0
    resubmitted: int = 0
    idle: float = 0.0  #: of the trainer, seconds in which it waits for groups
    occupied: float = 0.0  #: of the engines' slots, the mean share that is in use
    lengths_trained: list[int] = field(default_factory=lambda: [0, 0])  #: tokens and answers
    lengths_begun: list[int] = field(default_factory=lambda: [0, 0])
    staleness: Counter[int] = field(default_factory=Counter)  #: versions -> groups learned from
    fates: dict[int, str] = field(default_factory=dict)
    clock: list[tuple[float, int]] = field(
        default_factory=list
    )  #: of each update, its end and ``trained`` then

    def rate_after(self, updates: int) -> float:
        """``rate`` without the first so many updates, in which a pipeline fills."""
        begun, before = self.clock[updates - 1] if updates else (0.0, 0)
        return (self.trained - before) / (self.seconds - begun)

    @property
    def rate(self) -> float:
        """Tokens a second that were learned from."""
        return self.trained / self.seconds

    @property
    def dropped(self) -> float:
        """Of the groups that were completed, the share that was too old."""
        return sum(f == "dropped" for f in self.fates.values()) / max(1, len(self.fates))

    @property
    def shortening(self) -> float:
        """Mean length of the answers learned from, over that of all that were begun: 1 is unbiased."""
        (a, n), (b, m) = self.lengths_trained, self.lengths_begun
        return (a / max(1, n)) / (b / max(1, m))


class _Engine:
    """``done`` tokens have been written by each answer that was there all the time, as of ``at``; an answer
    ends when that reaches the number beside it."""

    __slots__ = ("answers", "at", "done", "number", "stamp", "up")

    def __init__(self, number: int) -> None:
        self.number, self.stamp, self.up = number, 0, True
        self.at, self.done = 0.0, 0.0
        self.answers: list[tuple[float, int, Group, int]] = []  # a heap: end, ticket, group, length


def simulate(pipeline: Pipeline, updates: int) -> Outcome:
    """The same seed gives the same events, and the same lengths whatever the machines."""
    return _Run(pipeline).until(updates)


class _Run:
    def __init__(self, pipeline: Pipeline) -> None:
        self.p = pipeline
        self.out = Outcome()
        self.now, self.version, self.live, self.dropped = 0.0, 0, 0, 0
        # streams of their own: how long an answer is must not depend on who fails
        self.length_rng = random.Random(f"lengths {pipeline.seed}")
        self.failure_rng = random.Random(f"failures {pipeline.seed}")
        self.engines = [_Engine(i) for i in range(pipeline.engines)]
        #: engines by the number of their answers, in the order in which they came to it
        self.by_load: list[dict[int, None]] = [{} for _ in range(pipeline.slots + 1)]
        self.by_load[0] = dict.fromkeys(range(pipeline.engines))
        self.least = 0
        self.waiting: deque[tuple[Group, int]] = deque()
        self.complete: deque[Group] = deque()
        self.learning: list[Group] = []  # what the trainer is at; nothing when it waits or sends
        self.trainer_free_at = 0.0
        self.trainer_stamp = 0
        self.events: list[tuple[float, int, str, int, int]] = []  # time, ticket, kind, who, stamp
        self.tickets = 0
        self.changed: dict[int, None] = {}

    def until(self, updates: int) -> Outcome:
        self._draw_failure("engine lost", self.p.failures * self.p.engines)
        self._draw_failure("trainer lost", self.p.trainer_failures)
        self._fill()
        while True:
            if not self.events:
                raise UserError("the simulated run stands still: no engine has room for an answer")
            time, _, kind, who, stamp = heappop(self.events)
            if kind == "ends" and self.engines[who].stamp != stamp:
                continue
            if kind in ("learned", "sent") and self.trainer_stamp != stamp:
                continue
            self.out.occupied += self.live * (time - self.now)
            self.now = time
            match kind:
                case "ends":
                    self._end(self.engines[who])
                case "learned":
                    self._learned()
                case "engine lost":
                    self._lose_engine()
                    self._draw_failure(kind, self.p.failures * self.p.engines)
                case "engine back":
                    self._return(self.engines[who])
                case "trainer lost":
                    self._lose_trainer()
                    self._draw_failure(kind, self.p.trainer_failures)
            if self.out.updates == updates:
                return self._closed()
            self._fill()
            self._learn()

    def _closed(self) -> Outcome:
        for engine in self.engines:
            self._advance(engine)
        self.out.written += sum(
            max(0.0, length - (end - e.done)) for e in self.engines for end, _, _, length in e.answers
        )
        self.out.seconds = self.trainer_free_at  # the last weights have arrived
        self.out.occupied /= max(self.now, 1e-12) * self.p.engines * self.p.slots
        return self.out

    # engines

    def _advance(self, engine: _Engine) -> None:
        if self.now > engine.at:
            if engine.answers:
                engine.done += (self.now - engine.at) / self.p.step[len(engine.answers)]
            engine.at = self.now

    def _move(self, engine: _Engine, before: int) -> None:
        load = len(engine.answers)
        del self.by_load[before][engine.number]
        self.by_load[load][engine.number] = None
        self.least = min(self.least, load)
        self.live += load - before
        self.changed[engine.number] = None

    def _end(self, engine: _Engine) -> None:
        before = len(engine.answers)
        engine.done = engine.answers[0][0]  # exactly, whatever the sums have been rounded to
        engine.at = self.now
        while engine.answers and engine.answers[0][0] <= engine.done:
            _, _, group, length = heappop(engine.answers)
            group.left -= 1
            group.tokens += length
            self.out.written += length
            if not group.left:
                self.complete.append(group)
        self._move(engine, before)

    def _fill(self) -> None:
        """Answers go where the fewest are, while there is room, and something to write."""
        while True:
            while self.least < self.p.slots and not self.by_load[self.least]:
                self.least += 1
            if self.least == self.p.slots or not (self.waiting or self._begin()):
                break
            group, length = self.waiting.popleft()
            engine = self.engines[next(iter(self.by_load[self.least]))]
            self._advance(engine)
            self.tickets += 1
            heappush(engine.answers, (engine.done + length, self.tickets, group, length))
            self._move(engine, self.least)
        for number in self.changed:
            self._expect(self.engines[number])
        self.changed.clear()

    def _begin(self) -> bool:
        """One more group, if the bound on staleness lets it begin."""
        p = self.p
        if self.out.begun - self.dropped >= (self.version + 1 + p.staleness) * p.groups:
            return False
        group = Group(self.out.begun, self.version, p.samples)
        self.out.begun += 1
        for _ in range(p.samples):
            length = p.lengths(self.length_rng)
            self.out.lengths_begun[0] += length
            self.out.lengths_begun[1] += 1
            self.waiting.append((group, length))
        return True

    def _expect(self, engine: _Engine) -> None:
        engine.stamp += 1
        if engine.answers:
            left = engine.answers[0][0] - engine.done
            time = max(engine.at, self.now) + left * self.p.step[len(engine.answers)]
            self._push(time, "ends", engine.number, engine.stamp)

    def _push(self, time: float, kind: str, who: int = 0, stamp: int = 0) -> None:
        self.tickets += 1
        heappush(self.events, (time, self.tickets, kind, who, stamp))

    # the trainer

    def _learn(self) -> None:
        """Begin an update if the trainer is free and enough groups are complete."""
        if self.learning or self.now < self.trainer_free_at:
            return
        old = [group for group in self.complete if self.version - group.version > self.p.staleness]
        if old:
            self.out.fates |= {group.number: "dropped" for group in old}
            self.dropped += len(old)
            self.complete = deque(group for group in self.complete if group.number not in self.out.fates)
            self._fill()  # others may begin in their place
        if len(self.complete) < self.p.groups:
            return
        self.learning = [self.complete.popleft() for _ in range(self.p.groups)]
        self.out.idle += self.now - self.trainer_free_at
        self._until_learned(self.now)

    def _until_learned(self, begins: float) -> None:
        self.trainer_free_at = begins + self.p.update(sum(group.tokens for group in self.learning))
        self.trainer_stamp += 1
        self._push(self.trainer_free_at, "learned", 0, self.trainer_stamp)

    def _learned(self) -> None:
        """New weights: they are sent, and the engines go on under them."""
        for group in self.learning:
            self.out.fates[group.number] = "trained"
            self.out.staleness[self.version - group.version] += 1
            self.out.trained += group.tokens
            self.out.lengths_trained[0] += group.tokens
            self.out.lengths_trained[1] += self.p.samples
        self.learning = []
        self.version += 1
        self.out.updates += 1
        self.trainer_free_at = self.now + self.p.transfer
        self.out.clock.append((self.trainer_free_at, self.out.trained))
        self.trainer_stamp += 1
        self._push(self.trainer_free_at, "sent", 0, self.trainer_stamp)
        for engine in self.engines:
            if engine.up:
                self._advance(engine)
                engine.at = self.trainer_free_at + self.p.reread * len(engine.answers)
                self.changed[engine.number] = None

    # what goes wrong

    def _draw_failure(self, kind: str, rate: float) -> None:
        if rate > 0:
            self._push(self.now + self.failure_rng.expovariate(rate), kind)

    def _lose_engine(self) -> None:
        engine = self.engines[self.failure_rng.randrange(self.p.engines)]
        if not engine.up:
            return
        self._advance(engine)
        before = len(engine.answers)
        for end, _, group, length in sorted(engine.answers):
            self.out.lost += length - (end - engine.done)
            self.out.resubmitted += 1
            self.waiting.append((group, length))
        self.out.written += sum(length - (end - engine.done) for end, _, _, length in engine.answers)
        del self.by_load[before][engine.number]
        self.live -= before
        engine.answers, engine.up = [], False
        engine.stamp += 1
        self._push(self.now + self.p.restart, "engine back", engine.number)

    def _return(self, engine: _Engine) -> None:
        engine.up, engine.at, engine.done = True, self.now, 0.0
        self.by_load[0][engine.number] = None
        self.least = 0

    def _lose_trainer(self) -> None:
        """It comes back with the last weights; the update that it was at begins again."""
        if self.learning:
            self._until_learned(self.now + self.p.restart)
        else:
            self.trainer_free_at = max(self.trainer_free_at, self.now + self.p.restart)
            self.trainer_stamp += 1
            self._push(self.trainer_free_at, "sent", 0, self.trainer_stamp)


# lengths


def constant(tokens: int) -> Lengths:
    return lambda rng: tokens


def log_normal(mean: float, spread: float, longest: int) -> Lengths:
    """Many short answers and a long tail; ``spread`` is the standard deviation of the logarithm, ``mean``
    that before answers are cut off at ``longest``."""
    centre = math.log(mean) - spread**2 / 2
    return lambda rng: max(1, min(longest, round(rng.lognormvariate(centre, spread))))


def empirical(path: Path) -> Lengths:
    """Lengths that a run has seen: the "tokens" of its samples.jsonl. Raises ``UserError`` when there are
    none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line).get("tokens") for line in lines]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot read answers from '{path}' ({error}); name a samples.jsonl of a run"
        ) from error
    seen = [n for n in found if isinstance(n, int) and n > 0]
    if not seen:
        raise UserError(f"'{path}' has no answer with its number of tokens; name a samples.jsonl of a run")
    return lambda rng: rng.choice(seen)
