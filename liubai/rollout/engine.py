"""Who writes the answers: the ``Engine`` protocol. Knows nothing of rewards or losses.

The loop in which an engine belongs::

    engine.load(model.state_dict(), version=step)
    engine.submit(requests)
    while engine.pending:
        for request, sample in engine.step():
            ...                                # grade it at once; slots refill by themselves

In-flight mode is the same loop with ``load`` called while requests are pending: they go on under
the new weights, and each token keeps the log-probability and the version it was sampled under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from liubai.types import Sample, Span


class StaleWeights(Exception):
    """``load`` was given weights that are not newer than those in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to write. ``seed`` alone decides its random numbers, wherever and with whomever it
    is batched. ``temperature`` 0 is greedy. For evaluation and serving only: ``top_p`` < 1; ``stop_ids``,
    which end this answer as the model's own end tokens do; ``alternatives``, the likeliest so many tokens at
    each place, which :meth:`Engine.fresh` gives."""

    id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    alternatives: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a request needs at least one prompt token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be ≥ 0 and top_p in (0, 1]")
        if self.alternatives < 0:
            raise ValueError(f"alternatives must be at least 0, not {self.alternatives}")


@dataclass(frozen=True, slots=True)
class Partial:
    """An unfinished answer, exactly as far as it got: what a checkpoint of an engine consists of."""

    request: Request
    completion_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[Span, ...] = ()


class Fresh(NamedTuple):
    """A token that the last step wrote for request ``id``. ``alternatives`` are the likeliest (token,
    log-probability) of the full distribution at the sampling temperature, best first."""

    id: int
    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Answerer(Protocol):
    """What answers requests."""

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests. Raises ``ValueError`` for one that can never fit."""

    def step(self) -> list[tuple[Request, Sample]]:
        """Advance every active answer by one token; returns those that ended."""


class Engine(Answerer, Protocol):
    """Continuous batching behind a few calls."""

    @property
    def version(self) -> int:
        """The version of the weights in use; −1 before the first ``load``."""

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Use new weights from the next token on. Raises :class:`StaleWeights` unless newer."""

    def abort(self) -> list[tuple[Request, Sample]]:
        """Withdraw everything pending; what was begun comes back with ``Stop.ABORT``."""

    def cancel(self, ids: Iterable[int]) -> list[tuple[Request, Sample]]:
        """Withdraw the pending requests of these ids, waiting or begun, and let go of their slots; what was
        begun comes back with ``Stop.ABORT``. Ids that are not pending are passed over."""

    def fresh(self) -> list[Fresh]:
        """What the last step wrote, a token for every answer that it advanced or ended."""

    def partials(self) -> list[Partial]:
        """The pending requests in order, begun ones first."""

    def resume(self, partials: Sequence[Partial]) -> None:
        """Take up pending requests where ``partials`` left them."""


def generate(engine: Answerer, requests: Sequence[Request]) -> list[Sample]:
    """All answers, in the order of ``requests`` (whose ids must differ)."""
    done: dict[int, Sample] = {}
    engine.submit(requests)
    while engine.pending:
        done.update((request.id, sample) for request, sample in engine.step())
    return [done[request.id] for request in requests]
