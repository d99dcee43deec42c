"""The canary: has the engine the trainer's weights? Asked after every transfer.

The worst that can happen to a run says nothing: new weights that never reach the engine look like
staleness, and cost others two months (verl#7495), and an engine that computes something else looks like a
hard problem. So the engine answers the same few requests after every transfer, and the trainer says what it
thinks of the answers. The run stops when they differ by more than arithmetic explains, and when the engine
says what it said before although the trainer's own opinion of it has changed.

Before is not only last time: small steps that are lost add up. An engine on a GPU does not give the same
log-probabilities twice when other answers stand beside these, so what it says has to be near, not equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, islice, takewhile

import torch

from liubai.errors import Diverged
from liubai.model.transformer import Transformer, causal
from liubai.rollout.engine import Request
from liubai.seeds import derive
from liubai.types import Sample

#: Tokens of an answer. With four requests enough for a mean; a step has thousands.
TOKENS = 16
#: The share of the bound by which the trainer's own scores must move before the engine has to follow, and
#: the share of that which the engine's must have moved then. Two programs that round to 16 bits move about
#: as far as each other, also where a step changes less than rounding does.
MOVED, FOLLOWED = 0.02, 0.1
#: Tokens over which a mean says that an engine has not followed, where it does not repeat itself to the last
#: bit.
ENOUGH = 16


class NotArrived(Diverged):
    """The engine does not write what the trainer's weights would."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What the engine said at ``version``, and what the trainer thought of it. ``number``: from 1."""

    number: int
    version: int
    ids: list[tuple[int, ...]]
    said: list[tuple[float, ...]]
    scores: list[list[float]]

    def since(self, then: _Look) -> tuple[float, float]:
        """mean |Δ log-probability| of the engine and of the trainer, over the tokens that stand in the same
        place after the same tokens. Zeros where these are too few."""
        same = [
            sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(now, before, strict=False)))
            for now, before in zip(self.ids, then.ids, strict=True)
        ]
        if sum(same) < ENOUGH and (self.ids, self.said) != (then.ids, then.said):
            return 0.0, 0.0
        theirs, ours = (
            _distance(_first(same, now), _first(same, before))
            for now, before in ((self.said, then.said), (self.scores, then.scores))
        )
        return theirs, ours


class Canary:
    """``write`` lets the engine answer, ``score`` gives the trainer's log-probabilities of the answers'
    tokens. ``bound``: the mean |Δ log-probability| that arithmetic explains. ``first``: what is said of a
    disagreement at the first look, beside what may always be the reason."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        write: Callable[[Sequence[Request]], list[Sample]],
        score: Callable[[Sequence[Sample]], list[list[float]]],
        *,
        bound: float,
        temperature: float,
        seed: int,
        max_tokens: int = TOKENS,
        first: str = "",
    ) -> None:
        self.write, self.score, self.bound = write, score, bound
        self.first = first
        # the same seeds every time: an engine with the same weights says the same
        self.requests = [
            Request(
                id=-1 - i,
                prompt_ids=tuple(ids),
                max_tokens=min(TOKENS, max_tokens),
                seed=derive(seed, "canary", i),
                temperature=temperature,
            )
            for i, ids in enumerate(prompts)
        ]
        #: mean |Δ log-probability| of the last look
        self.gap = 0.0
        self._looks: list[_Look] = []
        self._number = 0

    def look(self, version: int) -> None:
        """To be called when weights of ``version`` have been loaded. Raises :class:`NotArrived`."""
        samples = self.write(self.requests)
        self.judge(samples, self.score(samples), version)

    def judge(self, samples: Sequence[Sample], scores: list[list[float]], version: int) -> None:
        """What the engine answers under ``version``, and the trainer's log-probabilities of it. Raises
        :class:`NotArrived`."""
        if len(samples) != len(self.requests) or not all(s.completion_ids for s in samples):
            raise NotArrived(
                f"the engine has not answered each request after the transfer of version {version}"
            )
        self._number += 1
        look = _Look(
            self._number,
            version,
            [s.completion_ids for s in samples],
            [s.logprobs for s in samples],
            scores,
        )
        theirs, ours = list(chain(*look.said)), list(chain(*look.scores))
        self.gap = _distance(theirs, ours)
        for then in self._looks:
            followed, moved = look.since(then)
            if moved > MOVED * self.bound and followed < FOLLOWED * moved:
                raise NotArrived(
                    f"the engine still answers as with version {then.version} (mean |Δ log-prob| "
                    f"{followed:.2g}), and the trainer, at version {version}, scores these answers otherwise "
                    f"by now ({moved:.2g}): the new weights did not reach the engine"
                )
        # one is kept until it is twice as old as the largest power of 2 in its number: a few of all ages
        kept = (k for k in self._looks if self._number - k.number < 2 * (k.number & -k.number))
        self._looks = [*kept, look]
        if not self.gap <= self.bound:  # NaN, too
            either = f"{self.first}. Else either" if self.first and self._number == 1 else "Either"
            raise NotArrived(
                f"engine and trainer disagree after the transfer of version {version}: mean |Δ log-prob| of "
                f"{len(ours)} tokens is {self.gap:.3g}, the bound {self.bound:g}. {either} the new weights "
                "did not reach the engine, or it computes something else: another precision or model, or "
                "log-probabilities that are not at the sampling temperature (a server needs --logprobs-mode "
                "processed_logprobs). If 16 bits alone can explain it, raise engine.bound"
            )


class Canaries:
    """For an engine of many actors, each with weights of its own that may not have arrived: one ``canary``,
    as it was made, with a memory for each place. ``ask`` lets those actors answer that are there, by place.
    """

    def __init__(
        self, canary: Canary, ask: Callable[[Sequence[Request]], Mapping[int, Sequence[Sample]]]
    ) -> None:
        self.canary, self.ask = canary, ask
        self.gap = 0.0  #: mean |Δ log-probability| of the last look, where it was largest
        self._of = defaultdict[int, Canary](lambda: copy(canary))

    def look(self, version: int) -> None:
        """See :meth:`Canary.look`."""
        gaps = []
        said = self.ask(self.canary.requests)
        # all at once: of a large trainer one reading takes as long as many
        found = iter(self.canary.score([s for samples in said.values() for s in samples]))
        for place, samples in said.items():
            try:
                self._of[place].judge(samples, list(islice(found, len(samples))), version)
            except NotArrived as error:
                raise NotArrived(f"rollout actor {place}: {error}") from error
            gaps.append(self._of[place].gap)
        self.gap = max(gaps)


@torch.no_grad()
def scores(model: Transformer, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
    """What ``model`` gives to the tokens of some answers at ``temperature``. One reading of all: a model that
    is shared out comes together for each."""
    if not samples:
        return []
    device = model.head_weight.device
    rows = [torch.tensor(s.prompt_ids + s.completion_ids, device=device) for s in samples]
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # nothing looks at what is on its right
    positions_BT = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
    hidden_BTD = model.hidden(ids_BT, positions_BT, causal())
    found = []
    for s, ids_T, hidden_TD in zip(samples, rows, hidden_BTD, strict=True):
        start = len(s.prompt_ids)
        logits_TV = model.head(hidden_TD[start - 1 : len(ids_T) - 1]).float()
        logprobs_TV = (logits_TV / (temperature or 1.0)).log_softmax(-1)
        found.append(logprobs_TV.gather(1, ids_T[start:, None])[:, 0].tolist())
    return found


def _first(counts: Sequence[int], rows: Sequence[Sequence[float]]) -> list[float]:
    return [number for count, row in zip(counts, rows, strict=True) for number in row[:count]]


def _distance(some: Sequence[float], others: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(some, others, strict=True)) / max(1, len(some))
