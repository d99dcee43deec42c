"""What engines share that are not this process's own model: whose answer is how far, under which weights.

Such an engine writes somewhere else; here are the books. New weights arrive by a :class:`Transport`, and
unfinished answers go on as in the embedded engine: they are called back with what they said, and asked for
again with it as part of the prompt. So it is exact which weights wrote which token, and a killed run
resumes from token lists.

A request's ``seed`` is passed on, and the engine has random numbers of its own: an answer can be had again
from the same engine, but it is not the one that the embedded engine would give. What was called back goes
on with a seed of its own. Left out on purpose: ``top_p`` below 1, whose log-probabilities would be those of
another policy.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from liubai.errors import UserError
from liubai.rollout.engine import Fresh, Partial, Request, StaleWeights, generate
from liubai.rollout.transport import Receiver, Transport
from liubai.seeds import derive
from liubai.types import Sample, Span, Stop

#: The versions of vLLM that this was written for and tested with.
SUPPORTED = "0.32."


def require_supported(version: str, where: str) -> None:
    """vLLM's parts move between minor versions. Raises ``UserError`` for one that nobody has tried."""
    if not version.startswith(SUPPORTED):
        raise UserError(
            f"{where} is {version}; Liubai works with {SUPPORTED}x: pip install 'vllm=={SUPPORTED}*'"
        )


class Heard(NamedTuple):
    """What became known of an answer since it was last heard of. ``ended``: the engine writes no more of it;
    ``aborted``: because somebody else told it so. ``alternatives``: one entry a token, or none."""

    key: str
    ids: Sequence[int]
    logprobs: Sequence[float]
    ended: bool
    alternatives: Sequence[tuple[tuple[int, float], ...]] = ()
    aborted: bool = False


@dataclass(slots=True)
class Begun:
    """An answer under way."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def add(self, heard: Heard, version: int) -> None:
        self.ids += heard.ids
        self.logprobs += heard.logprobs
        if not heard.ids:
            return
        count = len(heard.ids)
        if self.spans and self.spans[-1].version == version:
            count += self.spans.pop().count
        self.spans.append(Span(version, count))

    def partial(self) -> Partial:
        return Partial(self.request, tuple(self.ids), tuple(self.logprobs), tuple(self.spans))

    def sample(self, stop: Stop) -> tuple[Request, Sample]:
        p = self.partial()
        return p.request, Sample(p.request.prompt_ids, p.completion_ids, p.logprobs, stop, p.versions)


class OutsideEngine(ABC):
    """See :class:`liubai.rollout.engine.Engine`. ``max_length`` bounds prompt + completion."""

    def __init__(self, transport: Transport, *, eos_ids: Sequence[int], max_length: int) -> None:
        self.transport, self.max_length = transport, max_length
        self._eos = frozenset(eos_ids)
        self._version = -1
        self._numbers = itertools.count()
        self._out: dict[str, Begun] = {}  # being written there, by a name of this asking
        self._queue: deque[Begun] = deque()
        self._fresh: list[Fresh] = []

    # ---- what an engine of its kind says ----

    @property
    @abstractmethod
    def receiver(self) -> Receiver:
        """The side that weights are sent to."""

    @abstractmethod
    def _begin(self, asked: Mapping[str, Begun]) -> None:
        """Let these be written."""

    @abstractmethod
    def _hear(self) -> list[Heard]:
        """What there is to hear, after waiting a little for it."""

    @abstractmethod
    def _stop(self, keys: Sequence[str]) -> list[Heard]:
        """Leave these unwritten; what of them was written and not heard of yet. Those that are called back
        when they had just ended may be among them."""

    @abstractmethod
    def _pause(self) -> None:
        """Write nothing from here on, until :meth:`_go_on`."""

    @abstractmethod
    def _go_on(self, version: int) -> None:
        """New weights are there: forget what was computed with the old ones, and write again."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""

    #: whether what was written is heard of only when the answer ends, or is called back
    late = False

    # ---- the protocol ----

    @property
    def version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return len(self._out) + len(self._queue)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        if version <= self._version:
            raise StaleWeights(f"weights of version {version} are not newer than {self._version}")
        self._pause()
        self._call_back()
        self.transport.send(weights, version, self.receiver)
        self._go_on(version)
        self._version = version

    def submit(self, requests: Iterable[Request]) -> None:
        self.resume([Partial(request) for request in requests])

    def resume(self, partials: Sequence[Partial]) -> None:
        for request in (partial.request for partial in partials):
            need = len(request.prompt_ids) + request.max_tokens
            if need > self.max_length:
                raise ValueError(
                    f"a request needs {need} tokens (prompt + max_tokens), the engine holds "
                    f"{self.max_length}; lower max_tokens or raise max_length"
                )
            if request.top_p < 1:
                raise ValueError(
                    f"top_p {request.top_p}: this engine writes for training, at the full distribution; "
                    "the embedded engine has top_p"
                )
        self._queue.extend(
            Begun(p.request, list(p.completion_ids), list(p.logprobs), list(p.versions)) for p in partials
        )

    def step(self) -> list[tuple[Request, Sample]]:
        if self._version < 0:
            raise StaleWeights("the engine has no weights yet: call load first")
        self._fresh = []
        ended = []
        asked: dict[str, Begun] = {}
        while self._queue:
            begun = self._queue.popleft()
            stop = self._over(begun)  # it was called back when it had just ended
            if stop:
                ended.append(begun.sample(stop))
            else:
                asked[f"{begun.request.id}.{next(self._numbers)}"] = begun
        if asked:
            self._out |= asked
            self._begin(asked)
        if ended or not self._out:
            return ended
        return self._take(self._hear())

    def abort(self) -> list[tuple[Request, Sample]]:
        self._call_back()
        begun, self._queue = self._queue, deque()
        return [b.sample(Stop.ABORT) for b in begun if b.ids]

    def cancel(self, ids: Iterable[int]) -> list[tuple[Request, Sample]]:
        unwanted = set(ids)
        self._call_back([key for key, begun in self._out.items() if begun.request.id in unwanted])
        gone = [b for b in self._queue if b.request.id in unwanted]
        self._queue = deque(b for b in self._queue if b.request.id not in unwanted)
        return [b.sample(Stop.ABORT) for b in gone if b.ids]

    def fresh(self) -> list[Fresh]:
        """All tokens that the last step heard of. An engine that is ``late`` hears of a whole answer at
        once."""
        return self._fresh

    def partials(self) -> list[Partial]:
        if self.late:
            self._call_back()
        partials = [b.partial() for b in (*self._out.values(), *self._queue)]
        return sorted(partials, key=lambda p: not p.completion_ids)

    # ---- beside it ----

    def ask(self, requests: Sequence[Request]) -> list[Sample]:
        """Answers before all that is pending, and alone: who stands beside whom in a batch may decide the
        last bit of a log-probability."""
        self._call_back()
        waiting, self._queue = self._queue, deque()
        try:
            return generate(self, requests)
        finally:
            self._queue.extend(waiting)

    def sampling(self, begun: Begun) -> dict[str, Any]:
        """vLLM's parameters for the rest of an answer. All that a model's generation_config.json might set
        otherwise is spelt out."""
        r, n = begun.request, len(begun.ids)
        return {
            "temperature": r.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": r.max_tokens - n,
            "seed": derive(r.seed, "goes on", n) if n else r.seed,
            "stop_token_ids": sorted(self._ends(r)),
            "ignore_eos": True,  # those of the request and the model are above
            "logprobs": r.alternatives,  # of the token itself, always
            "detokenize": False,
        }

    # ---- the books ----

    def _ends(self, request: Request) -> frozenset[int]:
        return self._eos.union(request.stop_ids)

    def _over(self, begun: Begun) -> Stop | None:
        if begun.ids and begun.ids[-1] in self._ends(begun.request):
            return Stop.EOS
        return Stop.LENGTH if len(begun.ids) >= begun.request.max_tokens else None

    def _call_back(self, keys: Sequence[str] | None = None) -> None:
        """Answers that are being written, or those of ``keys``, are the first in the queue again."""
        keys = list(self._out) if keys is None else keys
        if not keys:
            return
        for heard in self._stop(keys):
            self._out[heard.key].add(heard, self._version)
        self._queue.extendleft(self._out.pop(key) for key in reversed(keys))

    def _take(self, news: Iterable[Heard]) -> list[tuple[Request, Sample]]:
        ended = []
        for heard in news:
            begun = self._out[heard.key]
            begun.add(heard, self._version)
            self._fresh += _tokens(begun.request.id, heard)
            if not heard.ended:
                continue
            del self._out[heard.key]
            stop = self._over(begun)
            if stop:
                ended.append(begun.sample(stop))
            elif heard.aborted:
                self._queue.append(begun)  # the rest is asked for again
            else:
                raise UserError(
                    f"the engine ended an answer after {len(begun.ids)} of {begun.request.max_tokens} tokens "
                    "and without an end token; does it hold fewer tokens than the "
                    f"{self.max_length} of prompt and answer?"
                )
        return ended


def _tokens(id: int, heard: Heard) -> Iterator[Fresh]:
    others = heard.alternatives or [()] * len(heard.ids)
    for token, logprob, alternatives in zip(heard.ids, heard.logprobs, others, strict=True):
        yield Fresh(id, token, logprob, alternatives)
