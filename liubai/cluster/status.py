"""What the actors of an engine do, in a line for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liubai.cluster.lots import Place

#: Speeds are over so many seconds.
WINDOW = 30.0
#: So many actors are spoken of one by one.
FEW = 6


def describe(
    places: Sequence[Place], *, waiting: int, lost: int, stale: int, slots: int, born: float, now: float
) -> str:
    """What each actor does, its queue (answers beyond its ``slots``) and its speed; of more than a few, how
    many do what. ``waiting`` counts answers that no actor has, ``lost`` actors, ``stale`` answers that were
    too old; ``born`` and ``now`` are seconds on the clock of ``lately``."""
    speeds = [_speed(actor, born, now) for actor in places]
    if len(places) <= FEW:
        parts = [
            f"actor {place} {_does(actor, slots, speed)}"
            for place, (actor, speed) in enumerate(zip(places, speeds, strict=True))
        ]
    else:
        count = dict.fromkeys(("writing", "idle", "starting", "down"), 0)
        for actor in places:
            count[_state(actor)] += 1
        count_of = {state: f"{n} {state}" for state, n in count.items() if n}
        if "writing" in count_of:
            queue = sum(_queue(actor, slots) for actor in places)
            count_of["writing"] += f" (queue {queue}, {sum(speeds):,.0f} tokens/s)"
        parts = [f"actors: {', '.join(count_of.values())}"]
    notes = {"answers waiting": waiting, "lost": lost, "stale": stale}
    return ", ".join(parts + [f"{n} {name}" for name, n in notes.items() if n])


def _does(actor: Place, slots: int, speed: float) -> str:
    if not (answers := _answers(actor)):
        return _state(actor)
    return f"writing {answers} (queue {_queue(actor, slots)}, {speed:,.0f} tokens/s)"


def _state(actor: Place) -> str:
    if actor.state == "there":
        return "writing" if actor.lots else "idle"
    return actor.state


def _answers(actor: Place) -> int:
    return sum(len(lot.left) for lot in actor.lots)


def _queue(actor: Place, slots: int) -> int:
    return max(0, _answers(actor) - slots)


def _speed(actor: Place, born: float, now: float) -> float:
    while actor.lately and actor.lately[0][0] < now - WINDOW:
        actor.lately.popleft()
    return sum(tokens for _, tokens in actor.lately) / max(1.0, min(WINDOW, now - born))
