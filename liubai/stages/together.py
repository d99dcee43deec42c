"""The rollouts of several ranks: all have the same graded groups in the end.

With an embedded engine every rank writes a share, the problems whose number has its own as the remainder,
with its copy of the weights. An answer depends on its problem's number and the weights alone, so a step's
groups are those of one process, in the same order. (In flight, *which* groups end first is each rank's own
affair.) An engine elsewhere is asked by the first rank, which tells the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liubai import ranks
from liubai.stages.rollouts import GradedGroup, Rollouts


class Shared(Rollouts):
    """Each rank writes its share."""

    _taken = 0  # groups that all ranks have given so far

    def collect(self, groups: int) -> list[GradedGroup]:
        numbers = range(self._taken, self._taken + groups)
        own = super().collect(sum(map(self._is_mine, numbers)))
        self._taken += groups
        return sorted((g for part in ranks.gather(own) for g in part), key=lambda g: g.index)

    @property
    def stale(self) -> int:
        """Of all ranks; all ask."""
        return sum(ranks.gather(self._stale_here()))

    def _is_mine(self, index: int) -> bool:
        return index % ranks.world() == ranks.rank()

    def _next(self) -> int:
        index = super()._next()
        while not self._is_mine(index):
            index = super()._next()
        return index

    def state(self) -> dict[str, Any]:
        """That of one process: any number of ranks can go on from it."""
        parts = ranks.gather(super().state())
        begun = [part["next_index"] for part in parts]
        # what some ranks have begun beyond others, in flight
        ahead = [i for i in range(min(begun), max(begun)) if i >= begun[i % len(begun)]]
        missing = sorted(ahead + [i for part in parts for i in part.get("missing", ())])
        return {
            "next_index": max(begun),
            "ended": [index for part in parts for index in part["ended"]],
            "open": {index: done for part in parts for index, done in part["open"].items()},
            "partials": [partial for part in parts for partial in part["partials"]],
            "stale": sum(part["stale"] for part in parts),
            **({"missing": missing} if missing else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        missing = state.get("missing", [])
        self._taken = state["next_index"] - len(missing) - len(state["open"])
        super().restore(
            {
                "next_index": state["next_index"],
                "ended": [index for index in state["ended"] if self._is_mine(index)],
                "open": {i: done for i, done in state["open"].items() if self._is_mine(int(i))},
                "partials": [p for p in state["partials"] if self._is_mine(p[0] // self.samples)],
                "stale": state.get("stale", 0) if ranks.is_main() else 0,
                "missing": [index for index in missing if self._is_mine(index)],
            }
        )


class Told(Rollouts):
    """The first rank has the engine."""

    def collect(self, groups: int) -> list[GradedGroup]:
        return ranks.by_main(lambda: super(Told, self).collect(groups))

    def state(self) -> dict[str, Any]:
        return ranks.by_main(super().state)

    def restore(self, state: Mapping[str, Any]) -> None:
        if ranks.is_main():
            super().restore(state)
