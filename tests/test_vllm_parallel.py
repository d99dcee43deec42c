"""A model that vLLM shares out over two processes, on a CPU. ``make test-vllm``."""

from __future__ import annotations

import multiprocessing
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import save_family

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from test_vllm_engine import CLOSE, LORA, asked, changed, gap, opened, watched
from test_vllm_engine import stack as stack  # a fixture

from liubai.errors import UserError
from liubai.model.lora import LoraConfig, attach
from liubai.rollout.engine import generate
from liubai.rollout.engines import EngineConfig


@pytest.mark.parametrize(
    ("family", "transport", "lora"),
    [
        ("Qwen3-8B", "folder", None),
        ("Qwen3-0.6B", "folder", None),  # its head is the embedding
        ("Qwen3-8B", "lora", LORA),
    ],
)
def test_two_workers_write_as_one(
    family: str, transport: Any, lora: LoraConfig | None, tmp_path: Path, stack: ExitStack
) -> None:
    model, _ = save_family(family, tmp_path / "c")
    if lora:
        attach(model, lora, seed=0)
        changed(model, 3)
    one, two = (
        opened(tmp_path / "c", model, stack, lora, transport=transport, tensor_parallel=workers)
        for workers in (1, 2)
    )
    workers = [p for p in multiprocessing.active_children() if p.name.startswith("VllmWorker")]
    assert len(workers) == 2
    canary = watched(two, model, EngineConfig(kind="vllm"))
    before: list[tuple[int, ...]] = []
    for version in range(3):
        if version:
            changed(model, 10 + version)
        for engine in (one, two):
            engine.load(model.state_dict(), version)
        canary.look(version)
        assert canary.gap < CLOSE
        samples = generate(two, asked(model))
        assert max(gap(model, s) for s in samples) < CLOSE
        greedy = [replace(r, temperature=0.0) for r in asked(model)]
        said, other = ([s.completion_ids for s in generate(e, greedy)] for e in (two, one))
        assert said == other != before
        before = said


def test_a_worker_that_dies_ends_the_run_with_a_sentence(tmp_path: Path, stack: ExitStack) -> None:
    model, _ = save_family("Qwen3-8B", tmp_path / "c")
    engine = opened(tmp_path / "c", model, stack, tensor_parallel=2)
    engine.load(model.state_dict(), 0)
    engine.submit(asked(model, tokens=80))
    engine.step()
    for worker in multiprocessing.active_children():
        if worker.name == "VllmWorker-1":
            worker.kill()
    with pytest.raises(UserError, match=r"a worker of vLLM has died.* resume point"):
        generate(engine, [])  # which writes what is pending
    with pytest.raises(UserError, match="a worker of vLLM has died"):
        engine.load(model.state_dict(), 1)
