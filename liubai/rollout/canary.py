"""The canary: has the engine the trainer's weights? Asked after every transfer.

The worst that can happen to a run says nothing: new weights that never reach the engine look like
staleness, and cost others two months (verl#7495), and an engine that computes something else looks like a
hard problem. So the engine answers the same few requests after every transfer, and the trainer says what it
thinks of the answers. The run stops when they differ by more than arithmetic explains, and when the engine
says what it said before, to the last bit, although the trainer's own opinion of it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch

from liubai.errors import Diverged
from liubai.model.transformer import Transformer, causal
from liubai.rollout.engine import Request
from liubai.seeds import derive
from liubai.types import Sample

#: Tokens of an answer. With four requests enough for a mean; a step has thousands.
TOKENS = 16
#: The share of the bound by which the trainer's own scores must move before the engine has to say something
#: else.
MOVED = 0.02


class NotArrived(Diverged):
    """The engine does not write what the trainer's weights would."""


class Canary:
    """``write`` lets the engine answer, ``score`` gives the trainer's log-probabilities of the answers'
    tokens. ``bound``: the mean |Δ log-probability| that arithmetic explains."""

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
    ) -> None:
        self.write, self.score, self.bound = write, score, bound
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
        self._said: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
        self._scores: list[float] = []
        self._since = -1

    def look(self, version: int) -> None:
        """To be called when weights of ``version`` have been loaded. Raises :class:`NotArrived`."""
        samples = self.write(self.requests)
        said = [(s.completion_ids, s.logprobs) for s in samples]
        theirs = list(chain.from_iterable(s.logprobs for s in samples))
        scores = list(chain.from_iterable(self.score(samples)))
        self.gap = _distance(theirs, scores)
        if said == self._said:
            moved = _distance(scores, self._scores)
            if moved > MOVED * self.bound:
                raise NotArrived(
                    f"the engine still answers as with version {self._since}, to the last bit, and the "
                    f"trainer, at version {version}, scores these answers otherwise by now "
                    f"(mean |Δ log-prob| {moved:.2g}): the new weights did not reach the engine"
                )
        else:  # kept while the engine repeats itself: small steps add up
            self._said, self._scores, self._since = said, scores, version
        if not self.gap <= self.bound:  # NaN, too
            raise NotArrived(
                f"engine and trainer disagree after the transfer of version {version}: mean |Δ log-prob| of "
                f"{len(scores)} tokens is {self.gap:.3g}, the bound {self.bound:g}. Either the new weights "
                "did not reach the engine, or it computes something else: another precision or model, or "
                "log-probabilities that are not at the sampling temperature (a server needs --logprobs-mode "
                "processed_logprobs). If 16 bits alone can explain it, raise engine.bound"
            )


@torch.no_grad()
def scores(model: Transformer, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
    """What ``model`` gives to the tokens of some answers at ``temperature``; each is read by itself."""
    found = []
    for s in samples:
        start = len(s.prompt_ids)
        ids_1T = torch.tensor([s.prompt_ids + s.completion_ids], device=model.head_weight.device)
        positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
        hidden_TD = model.hidden(ids_1T, positions_1T, causal())[0, start - 1 : -1]
        logprobs_TV = (model.head(hidden_TD).float() / (temperature or 1.0)).log_softmax(-1)
        found.append(logprobs_TV.gather(1, ids_1T[0, start:, None])[:, 0].tolist())
    return found


def _distance(some: Sequence[float], others: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(some, others, strict=True)) / max(1, len(some))
