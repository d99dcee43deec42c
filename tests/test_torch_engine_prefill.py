"""How much a step of the engine reads, and how much room its cache keeps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import Tensor

from liubai.rollout.cache import BandedCache
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Sample

CONFIG = tiny_config(max_position_embeddings=2048)
MODEL = tiny_model(1, CONFIG)


class Watched(TorchEngine):
    """Notes the lengths of the texts of each reading, with the number of the step."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.steps, self.read = 0, list[tuple[int, list[int]]]()

    def step(self) -> list[tuple[Request, Sample]]:
        self.steps += 1
        return super().step()

    def _prefill(self, texts: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
        self.read.append((self.steps, [len(text) for text in texts]))
        return super()._prefill(texts)


def engine_of(prefill: int | None, slots: int = 32) -> Watched:
    engine = Watched(
        copy.deepcopy(MODEL),
        eos_ids=[CONFIG.vocab_size - 1],
        slots=slots,
        max_length=1200,
        lot=1,
        prefill=prefill,
    )
    engine.load(MODEL.state_dict(), 0)
    return engine


def ask(id: int, length: int, max_tokens: int = 20, same: bool = False) -> Request:
    prompt = tuple((7 * i + (0 if same else id)) % 50 for i in range(length))
    return Request(id=id, prompt_ids=prompt, max_tokens=max_tokens, seed=id)


def test_who_is_being_written_waits_for_one_reading_only() -> None:
    engine = engine_of(2048)
    engine.submit([ask(i, 4, 100) for i in range(3)])
    engine.step()
    del engine.read[:]
    engine.submit([ask(10 + i, 1000) for i in range(10)])
    while len(engine.read) < 5:
        engine.step()
        assert {0, 1, 2} <= {fresh.id for fresh in engine.fresh()}
    assert [step for step, _ in engine.read] == [2, 3, 4, 5, 6]
    assert all(lengths == [999, 999] for _, lengths in engine.read)
    assert engine.pending == engine.in_use == 13


def test_one_text_is_read_however_long_and_a_shared_one_once() -> None:
    engine = engine_of(100)
    engine.submit([ask(0, 1000), *(ask(i, 1000, same=True) for i in range(1, 9)), ask(9, 30), ask(10, 30)])
    for _ in range(2):
        engine.step()
    assert engine.read == [(1, [999]), (2, [29, 29])]
    assert engine.in_use == 11


@pytest.mark.parametrize("prefill", [1, 64, 700, 10_000])
def test_the_answers_do_not_depend_on_how_much_is_read_at_once(prefill: int) -> None:
    requests = [ask(i, length, 12) for i, length in enumerate([1, 300, 2, 64, 65, 900, 5, 5, 128, 40])]
    for got, wanted in zip(
        generate(engine_of(prefill, 7), requests), generate(engine_of(None), requests), strict=True
    ):
        assert (got.completion_ids, got.stop) == (wanted.completion_ids, wanted.stop)
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


def test_without_a_bound_all_are_read_at_once() -> None:
    engine = engine_of(None)
    engine.submit([ask(i, 1000) for i in range(10)])
    engine.step()
    assert engine.in_use == 10
    assert engine.read == [(1, [999] * 10)]


def test_a_band_has_room_for_no_more_rows_than_there_are_slots() -> None:
    cache = BandedCache(CONFIG, 300, torch.float32, torch.device("cpu"), 10)
    for band in cache.bands:
        for rows in (1, 4, 2, 3):
            band.append(torch.arange(rows))
        assert band.capacity == len(band) == 10
    held = sum(band.k.nbytes + band.v.nbytes for band in cache.bands)
    token = 2 * 4 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim
    assert held < 10 * 2 * 512 * token
