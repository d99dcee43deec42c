"""The canary: does it sing when all is well, and stop when weights do not arrive or
something else is computed?

The engine under it is the embedded one around a copy of the weights, which a test lets go wrong.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import naive_logprobs, random_sample, scramble, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liubai.errors import Diverged
from liubai.model.transformer import Transformer
from liubai.rollout.canary import MOVED, TOKENS, Canary, NotArrived, scores
from liubai.rollout.engine import Request, generate
from liubai.rollout.engines import BOUND, OUTSIDE, EngineConfig, canary_for
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Sample

PROMPTS = ((5, 6, 7), (9,), (30, 31, 32, 33, 34, 35), (12, 13))
TEMPERATURE = 0.7


class Apart:
    """An engine with its own copy of the weights."""

    def __init__(self, trainer: Transformer, dtype: torch.dtype | None = None) -> None:
        self.trainer = trainer
        self.engine = TorchEngine(copy.deepcopy(trainer).to(dtype), eos_ids=[1], slots=8, max_length=64)
        self.heat = 1.0  #: what its log-probabilities are at, in the place of the sampling temperature
        self.canary = Canary(
            PROMPTS,
            self.write,
            lambda samples: scores(trainer, samples, TEMPERATURE),
            bound=BOUND[dtype or torch.float32],
            temperature=TEMPERATURE,
            seed=3,
        )

    def write(self, requests: Sequence[Request]) -> list[Sample]:
        found = generate(self.engine, requests)
        if self.heat == 1.0:
            return found
        meant = scores(self.engine.model, found, TEMPERATURE * self.heat)
        return [replace(s, logprobs=tuple(m)) for s, m in zip(found, meant, strict=True)]

    def transfer(self, version: int, way: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        self.engine.load(way(self.trainer.state_dict()), version)
        self.canary.look(version)

    def arrive(self, version: int) -> None:
        self.transfer(version, dict)

    def get_lost(self, version: int) -> None:
        """Everything looks as if they had arrived."""
        old = {name: t.clone() for name, t in self.engine.model.state_dict().items()}
        self.transfer(version, lambda _: old)


class Noisy(Apart):
    """An engine that computes a little otherwise each time."""

    def __init__(self, trainer: Transformer) -> None:
        super().__init__(trainer)
        self.canary.bound = OUTSIDE[torch.bfloat16]
        self.times = 0

    def write(self, requests: Sequence[Request]) -> list[Sample]:
        model = copy.deepcopy(self.engine.model)
        self.times += 1
        stepped(model, NOISE, seed=1000 + self.times)
        return generate_with(model, self)


#: of weights, which makes 1e-3 of log-probabilities
NOISE = 2e-5


def stepped(model: Transformer, by: float, seed: int = 0) -> None:
    """What an update of this size does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))


def test_scores_are_the_trainers_logprobs() -> None:
    model = tiny_model(1)
    apart = Apart(model)
    apart.engine.load(model.state_dict(), 0)
    found = apart.write(apart.canary.requests)
    for sample, row in zip(found, scores(model, found, TEMPERATURE), strict=True):
        assert row == pytest.approx(naive_logprobs(model, sample, TEMPERATURE).tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_arrive_are_let_pass(dtype: torch.dtype) -> None:
    """Large steps and small ones, and steps that change nothing."""
    model = tiny_model(1).to(dtype)
    apart = Apart(model, dtype)
    for version in range(12):
        apart.arrive(version)
        assert apart.canary.gap < BOUND[dtype] / 3
        if version % 3 == 0:
            stepped(model, 10.0 ** -(version % 5), seed=version)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_canary_catches_stale_weights(dtype: torch.dtype) -> None:
    model = tiny_model(1).to(dtype)
    apart = Apart(model, dtype)
    for version in (4, 5):
        apart.arrive(version)
        scramble(model, version)
    apart.arrive(6)
    scramble(model, 9)
    with pytest.raises(NotArrived, match=r"still answers as with version 6.*at version 7.*did not reach"):
        apart.get_lost(7)


def test_a_lost_step_is_caught_though_it_is_smaller_than_the_bound() -> None:
    """bfloat16's bound of 0.05 is wider than what a step at a usual learning rate changes (verl#7495)."""
    model = tiny_model(1)
    apart = Apart(model)
    apart.canary.bound = 0.05
    apart.arrive(0)
    stepped(model, 3e-4)
    with pytest.raises(NotArrived, match="still answers as with version 0"):
        apart.get_lost(1)
    assert 0.001 < apart.canary.gap < 0.05


def test_tiny_lost_steps_add_up() -> None:
    model = tiny_model(1)
    apart = Apart(model)
    apart.canary.bound = 0.05
    apart.arrive(0)
    passed = 0
    with pytest.raises(NotArrived, match="still answers as with version"):  # noqa: PT012
        while passed < 200:
            stepped(model, 4e-6)
            apart.get_lost(passed + 1)
            passed += 1
    assert passed > 3  # a single one is within what is let pass


@pytest.mark.parametrize("arrived", [0, 5, 50])
def test_tiny_lost_steps_add_up_though_the_engine_never_says_the_same_twice(arrived: int) -> None:
    """On a GPU, who stands beside whom in a batch decides the last digits, and now and then a token."""
    model = tiny_model(1)
    apart = Noisy(model)
    for version in range(arrived + 1):
        stepped(model, 4e-5, seed=version)
        apart.arrive(version)
    some, others = (apart.write(apart.canary.requests) for _ in range(2))
    same = [(a, b) for a, b in zip(some, others, strict=True) if a.completion_ids == b.completion_ids]
    noise = mean_gap([list(a.logprobs) for a, _ in same], [list(b.logprobs) for _, b in same])
    assert 5e-4 < noise < 2e-3
    passed = 0
    with pytest.raises(NotArrived, match="still answers as with version"):  # noqa: PT012
        while passed < 400:
            stepped(model, 1e-5)
            apart.get_lost(arrived + passed + 1)
            passed += 1
    assert passed > 3
    assert apart.canary.gap < apart.canary.bound / 3


def test_steps_that_are_smaller_than_the_noise_may_arrive() -> None:
    """Both sides round, each in its own way, and a step changes less than that."""
    model = tiny_model(1)
    apart = Noisy(model)
    rounding = random.Random(0)
    apart.canary.score = lambda samples: [
        [p + rounding.gauss(0, 4e-3) for p in row] for row in scores(model, samples, TEMPERATURE)
    ]
    for version in range(300):
        stepped(model, 1e-6, seed=version)
        apart.arrive(version)


def test_what_is_remembered_stays_little() -> None:
    apart = Apart(tiny_model(1))
    for version in range(70):
        apart.arrive(version)
        ages = [apart.canary._number - look.number for look in apart.canary._looks]
        assert len(ages) < 16
        for power in (2**j for j in range(6) if 2 ** (j + 1) <= version):
            assert any(power <= age <= 2 * power for age in ages)


@pytest.mark.parametrize("empty", [range(4), range(1, 2)])
def test_an_engine_that_answers_nothing_has_not_agreed(empty: range) -> None:
    apart = Apart(tiny_model(1))
    write = apart.write
    apart.canary.write = lambda requests: [
        Sample(s.prompt_ids, (), (), s.stop, ()) if i in empty else s for i, s in enumerate(write(requests))
    ]
    with pytest.raises(NotArrived, match="has not answered each request after the transfer of version 0"):
        apart.arrive(0)
    apart.canary.write = lambda requests: []
    with pytest.raises(NotArrived, match="has not answered each request"):
        apart.arrive(1)


def test_an_engine_that_has_nothing_new_to_say_may_repeat_itself() -> None:
    """Steps without a gradient, and steps too small to matter."""
    model = tiny_model(1)
    apart = Apart(model)
    for version in range(10):
        apart.arrive(version)


def test_half_of_the_weights_is_not_enough() -> None:
    model = tiny_model(1)
    apart = Apart(model)
    apart.arrive(0)
    scramble(model, 2)
    old = {name: t.clone() for name, t in apart.engine.model.state_dict().items()}
    with pytest.raises(NotArrived, match="disagree after the transfer of version 1: mean"):
        apart.transfer(1, lambda new: {n: old[n] if "layers.1" in n else t for n, t in new.items()})


def test_logprobs_at_another_temperature_are_no_such_thing() -> None:
    """trl#4159, vllm#42259."""
    apart = Apart(tiny_model(1))
    apart.heat = 1 / TEMPERATURE
    with pytest.raises(NotArrived, match="not at the sampling temperature"):
        apart.arrive(0)


def test_what_is_not_a_number_is_no_agreement() -> None:
    apart = Apart(tiny_model(1))
    write = apart.write
    apart.canary.write = lambda requests: [
        replace(s, logprobs=(math.nan, *s.logprobs[1:])) for s in write(requests)
    ]
    with pytest.raises(NotArrived, match="nan"):
        apart.arrive(0)


@settings(max_examples=25)
@given(
    moves=st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 1e-6, 1e-3, 0.3])), min_size=1, max_size=8)
)
def test_it_stops_when_something_was_lost_and_only_then(moves: list[tuple[bool, float]]) -> None:
    model = tiny_model(1)
    apart = Apart(model)
    apart.arrive(0)
    for version, (arrives, by) in enumerate(moves, 1):
        before = copy.deepcopy(apart.engine.model)
        stepped(model, by, seed=version)
        samples = generate_with(before, apart)
        off = mean_gap(scores(model, samples, TEMPERATURE), scores(before, samples, TEMPERATURE))
        try:
            apart.arrive(version) if arrives else apart.get_lost(version)
        except NotArrived:
            assert not arrives
            assert off > MOVED * apart.canary.bound / 2
            return
        assert arrives or off < apart.canary.bound


def generate_with(model: Transformer, apart: Apart) -> list[Sample]:
    engine = TorchEngine(model, eos_ids=[1], slots=8, max_length=64)
    engine.load(model.state_dict(), 0)
    return generate(engine, apart.canary.requests)


def mean_gap(some: list[list[float]], others: list[list[float]]) -> float:
    pairs = [(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_it_asks_the_same_every_time_and_no_more_than_it_must() -> None:
    canary = Apart(tiny_model(1)).canary
    assert [r.max_tokens for r in canary.requests] == [TOKENS] * 4
    assert len({r.seed for r in canary.requests}) == 4
    assert all(r.id < 0 and r.temperature == TEMPERATURE for r in canary.requests)  # a stage's ids begin at 0
    assert issubclass(NotArrived, Diverged)


def test_an_engine_around_the_trainers_own_weights_needs_none() -> None:
    model = tiny_model(1)
    engine = TorchEngine(model, eos_ids=[1], slots=8, max_length=64)
    assert canary_for(EngineConfig(), engine, model, PROMPTS, temperature=1.0, max_tokens=9, seed=0) is None


def test_answers_are_read_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their lengths: a trainer that is shared out comes together for each reading."""
    model, generator = tiny_model(2), torch.Generator().manual_seed(0)
    samples = [random_sample(generator, prompt=p, completion=n) for p, n in ((3, 7), (9, 1), (1, 12))]
    readings, hidden = [0], Transformer.hidden

    def counted(self: Transformer, *args: Any) -> Tensor:
        readings[0] += 1
        return hidden(self, *args)

    monkeypatch.setattr(Transformer, "hidden", counted)
    together = scores(model, samples, TEMPERATURE)
    assert readings == [1]
    for sample, row in zip(samples, together, strict=True):
        assert row == pytest.approx(scores(model, [sample], TEMPERATURE)[0], abs=1e-5)
    assert scores(model, [], TEMPERATURE) == []


def test_another_program_is_given_more_room_than_the_same_code() -> None:
    server = EngineConfig(kind="server", url="http://h:1")
    for dtype, room in OUTSIDE.items():
        assert EngineConfig().tolerance(dtype) == BOUND[dtype]
        assert server.tolerance(dtype) == room >= BOUND[dtype]
        assert server.model_copy(update={"bound": 0.3}).tolerance(dtype) == 0.3
