"""Who writes the answers of a stage that learns from them, and how new weights get there.

*Embedded*: every rank writes its share, around weights that are whole on it; in one process the model itself.
*Elsewhere*: an engine with weights of its own, which the first rank sends them to and asks. No rank's device
needs room for a whole model then: the first of several has a copy in main memory, to send.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from liubai import ranks
from liubai.learn.sharded import refresh, settle
from liubai.model.lora import trained
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Answerer, Engine, Request
from liubai.rollout.engines import EngineConfig, canary_for, engine_for
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages.context import Context
from liubai.stages.rollouts import Rollouts
from liubai.stages.together import Shared, Told
from liubai.types import Sample

Value = TypeVar("Value")


class Sampler(ABC):
    """``engine`` writes rollouts; on a rank that only hears of them there is none."""

    engine: Engine | None
    #: seconds of the last transfer of weights, where there are some
    transfer: float | None = None
    #: mean |Δ log-probability| between engine and trainer at the last transfer, where a canary looks
    gap: float | None = None
    #: ranks that each write a share
    shares = 1
    #: whether answers are written during an update, too
    goes_on = False

    @abstractmethod
    def rollouts(self, *asked: Any, **how: Any) -> Rollouts:
        """See :class:`Rollouts`, whose arguments these are but for the engine."""

    @abstractmethod
    def bring(self, version: int) -> None:
        """Rollouts are written with the weights of now, which are ``version``, from here on."""

    @abstractmethod
    def look(
        self, version: int, rollouts: Rollouts, ask: Callable[[Answerer], Value], last: bool = False
    ) -> Value:
        """What ``ask`` finds out from answers under the weights of now, which are ``version``. After the
        ``last`` look nothing is written any more."""


class Embedded(Sampler):
    engine: TorchEngine

    def __init__(self, model: Transformer, whole: Transformer, **how: Any) -> None:
        """``whole`` is ``model`` or, where that is shared out, a copy that is not."""
        self.model, self.whole, self.shares = model, whole, ranks.world()
        self.engine = TorchEngine(whole, **how)
        # an engine of its own around the same weights: the rollouts in flight are not disturbed
        self._evaluator = TorchEngine(whole, **how)
        self._evaluator.load(whole.state_dict(), version=0)

    def rollouts(self, *asked: Any, **how: Any) -> Rollouts:
        kind = Rollouts if ranks.world() == 1 else Shared
        return kind(self.engine, *asked, **how)

    def bring(self, version: int) -> None:
        self._refresh()
        ranks.agreed(lambda: self.engine.load(self.whole.state_dict(), version))

    def look(
        self, version: int, rollouts: Rollouts, ask: Callable[[Answerer], Value], last: bool = False
    ) -> Value:
        self._refresh()
        return ask(self._evaluator)

    def _refresh(self) -> None:
        if self.whole is not self.model:
            refresh(self.whole, self.model)


class Elsewhere(Sampler):
    def __init__(
        self,
        model: Transformer,
        sent: Transformer | None,
        config: EngineConfig,
        *,
        prompts: Sequence[Sequence[int]],
        temperature: float,
        max_tokens: int,
        seed: int,
        stack: ExitStack,
        **how: Any,
    ) -> None:
        """``sent``: the model or, where that is shared out, the first rank's copy of it. The canary asks
        ``prompts``."""
        self.model, self.sent, self._version = model, sent, -1
        self._adapter = config.transport == "lora"
        # vLLM in this process stands still
        self.goes_on = config.kind != "vllm" or how["cluster"] is not None
        self.engine = None

        def opened() -> list[str]:
            assert sent is not None
            self.engine = engine_for(config, sent, stack=stack, **how)
            return [name for name in ("ask", "ask_each") if hasattr(self.engine, name)]

        ways = ranks.by_main(opened)
        self.canary = canary_for(
            config,
            _Everywhere(self.engine, ways),
            model,
            prompts,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
        )

    def rollouts(self, *asked: Any, **how: Any) -> Rollouts:
        kind: Any = Rollouts if ranks.world() == 1 else Told
        return kind(self.engine, *asked, **how)  # type: ignore[no-any-return]

    def bring(self, version: int) -> None:
        if version == self._version:  # for a look at it
            return
        began = time.perf_counter()
        if self.sent is not self.model:
            refresh(self.sent, self.model)
        ranks.by_main(lambda: self._send(version))
        self.transfer, self._version = time.perf_counter() - began, version
        if self.canary:
            self.canary.look(version)  # by all ranks: the trainer's opinion is that of all its parts
            self.gap = self.canary.gap
            settle(self.model)

    def _send(self, version: int) -> None:
        assert self.engine is not None
        assert self.sent is not None
        self.engine.load(trained(self.sent) if self._adapter else self.sent.state_dict(), version)

    def _call_off(self) -> None:
        """Nobody will learn from what is under way, and others would wait for it."""
        assert self.engine is not None
        self.engine.abort()

    def look(
        self, version: int, rollouts: Rollouts, ask: Callable[[Answerer], Value], last: bool = False
    ) -> Value:
        if last:
            ranks.by_main(self._call_off)
        self.bring(version)

        def alone() -> Value:
            with ranks.alone():
                return ask(Beside(rollouts))

        return ranks.by_main(alone)


class _Everywhere:
    """The first rank's engine, for all of them."""

    def __init__(self, engine: Engine | None, ways: Iterable[str]) -> None:
        for way in ways:
            setattr(
                self, way, lambda requests, way=way: ranks.by_main(lambda: getattr(engine, way)(requests))
            )


class Beside:
    """The engine of ``rollouts`` for other requests. What else ends meanwhile is theirs."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self.pending = 0

    def submit(self, requests: Iterable[Request]) -> None:
        asked = [replace(request, id=_turned(request.id)) for request in requests]
        self.pending += len(asked)
        self._rollouts.engine.submit(asked)

    def step(self) -> list[tuple[Request, Sample]]:
        others = self._rollouts.step()
        self.pending -= len(others)
        return [(replace(request, id=_turned(request.id)), sample) for request, sample in others]


def _turned(id: int) -> int:
    """Rollouts have the numbers from 0 up, others those below."""
    return -1 - id


def is_elsewhere(config: EngineConfig, context: Context) -> bool:
    """The first rank alone knows of the cluster."""
    return ranks.by_main(lambda: config.kind != "torch" or context.cluster is not None)
