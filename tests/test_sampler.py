"""Who writes a stage's answers, and what is sent there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_model
from torch import Tensor

from liubai.model.lora import LoraConfig, attach
from liubai.model.transformer import Transformer
from liubai.rollout.engines import EngineConfig
from liubai.stages import sampler
from liubai.stages.sampler import Elsewhere


class Engine:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.told.append(("load", (set(weights), version)))

    def abort(self) -> list[Any]:
        self.told.append(("abort", None))
        return []


def opened(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, model: Transformer, cluster: object = None
) -> tuple[Elsewhere, list[tuple[str, Any]]]:
    engine = Engine()
    monkeypatch.setattr(sampler, "engine_for", lambda *_, **__: engine)
    found = Elsewhere(
        model,
        model,
        config,
        prompts=[],
        temperature=1.0,
        max_tokens=4,
        seed=0,
        stack=ExitStack(),
        cluster=cluster,
    )
    return found, engine.told


SERVER = {"kind": "server", "url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("config", "cluster", "goes_on"),
    [({"kind": "vllm"}, None, False), (SERVER, None, True), ({"kind": "vllm"}, object(), True)],
)
def test_vllm_in_this_process_stands_still_during_an_update(
    config: dict[str, Any], cluster: object, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is given to write ahead is bounded by its slots."""
    found, _ = opened(monkeypatch, EngineConfig(**config), tiny_model(0), cluster)
    assert found.goes_on is goes_on


@pytest.mark.parametrize("transport", ["folder", "lora"])
def test_by_lora_the_adapter_alone_is_sent(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a cluster the whole model would go through Ray's object store, for nothing."""
    attach(model := tiny_model(0), LoraConfig(rank=2), seed=0)
    found, told = opened(monkeypatch, EngineConfig(**SERVER, transport=transport), model)
    found.bring(0)
    names = set(model.state_dict())
    adapter = {name for name in names if name.endswith((".lora_a", ".lora_b"))}
    assert told == [("load", (adapter if transport == "lora" else names, 0))]
    assert 0 < len(adapter) < len(names)


def test_before_the_last_look_what_is_under_way_is_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody will learn from it, and the look would wait behind it."""
    found, told = opened(monkeypatch, EngineConfig(**SERVER), tiny_model(0))
    rollouts: Any = SimpleNamespace(engine=found.engine)
    found.look(1, rollouts, lambda engine: None)
    assert [what for what, _ in told] == ["load"]
    found.look(2, rollouts, lambda engine: told.append(("ask", None)), last=True)
    assert [what for what, _ in told] == ["load", "abort", "load", "ask"]
