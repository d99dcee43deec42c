"""An engine that says what it is told, for tests of what becomes of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from liubai.rollout.engine import Partial, Request
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Sample, Span, Stop


class ScriptedEngine:
    """Answers the last request first, ``at_once`` a step: ``say(request)`` is its text and why it ends."""

    version = 0

    def __init__(
        self, tokenizer: TextTokenizer, say: Callable[[Request], tuple[str, Stop]], at_once: int = 3
    ) -> None:
        self.tokenizer, self.say, self.at_once = tokenizer, say, at_once
        self.waiting = list[Request]()

    @property
    def pending(self) -> int:
        return len(self.waiting)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    def submit(self, requests: Iterable[Request]) -> None:
        self.waiting += requests

    def step(self) -> list[tuple[Request, Sample]]:
        return [
            (r, self.answer(r)) for r in [self.waiting.pop() for _ in range(self.at_once) if self.waiting]
        ]

    def answer(self, request: Request) -> Sample:
        text, stop = self.say(request)
        ids = tuple(self.tokenizer.encode(text + (self.tokenizer.eos if stop is Stop.EOS else "")))
        return Sample(request.prompt_ids, ids, (-1.0,) * len(ids), stop, (Span(0, len(ids)),))

    def abort(self) -> list[tuple[Request, Sample]]:
        return []

    def partials(self) -> list[Partial]:
        return [Partial(r) for r in self.waiting]

    def resume(self, partials: Sequence[Partial]) -> None:
        self.waiting += [p.request for p in partials]
