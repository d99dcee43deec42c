"""Who may be where: placement groups, one a kind of process, and how many of each a cluster has room for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal

from liubai.errors import UserError

#: Bytes that a grader asks for. It sleeps most of the time: no core is reserved for it.
GRADER_MEMORY = 256 << 20
#: Seconds that the first placement may take, and after which a line says what is waited for.
PLACED, LATE = 60.0, 5.0
#: Seconds that what an ended run had may take to be free again, that a run's end may take to be known, and
#: between two looks.
LEAVING, ENDING, LOOK = 10.0, 3.0, 0.1
#: Tells a rank what room there is: see :func:`told`.
ROOM = "LIUBAI_CLUSTER_ROOM"


@dataclass(frozen=True, slots=True)
class Share:
    """What one process asks for."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory: float = 0.0

    def bundle(self) -> dict[str, float]:
        parts = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: n for name, n in parts.items() if n}


@dataclass(frozen=True, slots=True)
class Room:
    """What each node has left; ``fixed`` where the cluster is this machine, and will never have more."""

    nodes: tuple[Share, ...]
    fixed: bool = False


class Places:
    """``size`` processes with a ``share`` each, spread over the nodes or packed onto few. When a node is
    lost, Ray finds another place for its share, as soon as there is one.

    Raises ``UserError`` where there is no room for them within a minute; ``warn`` is told before.
    """

    def __init__(
        self,
        size: int,
        share: Share,
        strategy: Literal["SPREAD", "PACK"],
        what: str,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        import ray
        from ray.exceptions import GetTimeoutError
        from ray.util import placement_group

        self.size, self.share = size, share
        asked = f"{size} {what} of {_said(share)} each"
        self._group: Any = placement_group([share.bundle()] * size, strategy=strategy)
        ready, began = self._group.ready(), time.monotonic()
        for seconds in (LATE, PLACED):
            try:
                ray.get(ready, timeout=max(0.0, began + min(seconds, PLACED) - time.monotonic()))
                return
            except GetTimeoutError:
                if seconds < PLACED and warn:
                    has = f"it has {_said(total())} (free: {_said(free())})"
                    warn(f"the cluster is waited for to have room for {asked}, {PLACED:.0f} s at most; {has}")
        self.give_back()
        raise UserError(
            f"the cluster has no room for {asked} within {PLACED:.0f} s; "
            f"it has {_said(total())} in all (free: {_said(free())}). Ask for fewer, or start more nodes"
        )

    def options(self, place: int) -> dict[str, Any]:
        """For ``.options`` of a Ray actor."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.share.cpus,
            "num_gpus": self.share.gpus,
            "memory": self.share.memory or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=place
            ),
        }

    def give_back(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self._group)


def nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def total() -> Share:
    import ray

    return _share(ray.cluster_resources())  # type: ignore[no-untyped-call]


def free() -> Share:
    import ray

    return _share(ray.available_resources())  # type: ignore[no-untyped-call]


def free_again(warn: Callable[[str], None]) -> None:
    """Returns when what ended runs had is free. That is a moment after their end: whoever counts the room
    meanwhile has fewer actors than it could have, to the end, and other last bits. Where others live on the
    cluster nobody knows what is theirs, and it is not waited for. ``warn`` is told when it was in vain."""
    began = time.monotonic()
    while ROOM not in os.environ and free() != total():
        alone, waited = _alone(), time.monotonic() - began
        if waited > (LEAVING if alone else ENDING):
            if alone:
                warn(
                    f"the cluster has {_said(total())} (free: {_said(free())}), and no other run is on it; "
                    "`ray status` says who has the rest"
                )
            break
        time.sleep(LOOK)


def _alone() -> bool:
    """Has every other driver on the cluster ended?"""
    import ray
    from ray._private.state import jobs

    own = ray.get_runtime_context().get_job_id()
    return all(job["IsDead"] or job["JobID"] == own for job in jobs())  # type: ignore[no-untyped-call]


def room(fixed: bool) -> Room:
    """As it is or, to a rank, as it was when the ranks were first in their places."""
    if ROOM in os.environ:
        nodes, fixed = json.loads(os.environ[ROOM])
        return Room(tuple(Share(*node) for node in nodes), fixed)
    return room_now(fixed)


def room_now(fixed: bool = False) -> Room:
    from ray._private.state import available_resources_per_node

    found = available_resources_per_node()  # type: ignore[no-untyped-call]
    return Room(tuple(_share(node) for node in found.values()), fixed)


def told(room: Room) -> dict[str, str]:
    """The variable from which :func:`room` reads it. A rank that is started again must not ask the cluster:
    what its forerunner's actors had may not be free yet, and the number of actors decides bits."""
    return {ROOM: json.dumps(astuple(room))}


def _share(found: Mapping[str, float]) -> Share:
    return Share(found.get("CPU", 0.0), found.get("GPU", 0.0), found.get("memory", 0.0))


def _said(share: Share) -> str:
    parts = {"CPU": share.cpus, "GPU": share.gpus, "GB of memory": share.memory / 1e9}
    return ", ".join(f"{n:.3g} {name}" for name, n in parts.items() if n) or "nothing"


def how_many(wanted: int | None, share: Share, what: str, room: Room) -> int:
    """As many as there is ``room`` for, each on one of the nodes, unless told otherwise; one at least.

    Raises ``UserError`` when there will never be room for them."""
    most = sum(_fit(share, node) for node in room.nodes)
    count = wanted or max(1, most)
    if room.fixed and count > most:
        (machine,) = room.nodes
        raise UserError(
            f"this machine has no room for {count} {what} of {_said(share)} each: for them it has "
            f"{_said(machine)}, which is enough for {most}; ask for fewer"
            + (", or for fewer threads" if share.cpus > 1 else "")
        )
    return count


def _fit(share: Share, node: Share) -> int:
    pairs = (node.cpus, share.cpus), (node.gpus, share.gpus), (node.memory, share.memory)
    return min(int(have // need) for have, need in pairs if need)
