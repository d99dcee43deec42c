"""Beam search against all sequences there are, and against a loop that reads every beginning anew."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from conftest import naive_logprobs, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import Diverged
from liubai.model.transformer import Transformer
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Sample, Stop

EOS = 1
MODEL = tiny_model(3)
SMALL = tiny_model(5, tiny_config(vocab_size=5))
Whole = tuple[tuple[int, ...], float, bool]  #: ids, log-probability, ended


def request(prompt: Sequence[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> Request:
    return Request(id=0, prompt_ids=tuple(prompt), max_tokens=max_tokens, seed=0, stop_ids=stop_ids)


def searched(
    model: Transformer, asked: Request, width: int, *, eos: Sequence[int] = (EOS,), alpha: float = 0.0
) -> list[Sample]:
    search = BeamSearch(model, asked, width, eos_ids=eos, alpha=alpha)
    while search.step():
        pass
    return search.best()


@torch.no_grad()
def next_logprobs(model: Transformer, ids: Sequence[int]) -> list[float]:
    return torch.log_softmax(model(torch.tensor([list(ids)]))[0, -1].double(), -1).tolist()


def ranked(found: Sequence[Whole], alpha: float) -> list[Whole]:
    return sorted(found, key=lambda w: (not w[2], -w[1] / len(w[0]) ** alpha))


def everything(model: Transformer, prompt: Sequence[int], max_tokens: int, ends: set[int]) -> list[Whole]:
    """Every sequence: those that end, and those of ``max_tokens`` that do not."""
    found: list[Whole] = []
    beginnings: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(max_tokens):
        longer = []
        for ids, score in beginnings:
            for token, logprob in enumerate(next_logprobs(model, [*prompt, *ids])):
                grown = ((*ids, token), score + logprob)
                (found.append((*grown, True)) if token in ends else longer.append(grown))
        beginnings = longer
    return found + [(ids, score, False) for ids, score in beginnings]


def by_the_book(
    model: Transformer, prompt: Sequence[int], max_tokens: int, width: int, ends: set[int], alpha: float
) -> list[Whole]:
    """Beam search without a cache, without stopping early, one beginning at a time."""
    ended: list[Whole] = []
    beam: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(max_tokens):
        grown = [
            ((*ids, token), score + logprob)
            for ids, score in beam
            for token, logprob in enumerate(next_logprobs(model, [*prompt, *ids]))
        ]
        ended += [(ids, score, True) for ids, score in grown if ids[-1] in ends]
        beam = sorted((g for g in grown if g[0][-1] not in ends), key=lambda g: -g[1])[:width]
    return ranked(ended + [(ids, score, False) for ids, score in beam], alpha)[:width]


def assert_are(samples: Sequence[Sample], wanted: Sequence[Whole]) -> None:
    assert [s.completion_ids for s in samples] == [w[0] for w in wanted]
    assert [s.stop is Stop.EOS for s in samples] == [w[2] for w in wanted]
    for sample, (_, score, _) in zip(samples, wanted, strict=True):
        assert sum(sample.logprobs) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("ends", [{1}, {0, 3}])
def test_a_beam_as_wide_as_everything_finds_the_best_of_everything(alpha: float, ends: set[int]) -> None:
    prompt, longest = (2, 4, 0), 4
    wanted = ranked(everything(SMALL, prompt, longest, ends), alpha)
    assert len(wanted) > 80
    found = searched(SMALL, request(prompt, longest), 700, eos=sorted(ends), alpha=alpha)
    # as sets by score: sequences that differ by rounding may change places
    assert {s.completion_ids for s in found} == {w[0] for w in wanted}
    assert_are(found[:12], wanted[:12])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize(("width", "alpha"), [(1, 0.0), (3, 0.0), (4, 1.0)])
def test_the_cache_follows_its_rows(architecture: str, width: int, alpha: float) -> None:
    model = tiny_model(8, tiny_config(architecture, vocab_size=40))
    prompt, longest = (5, 9, 2, 33), 14
    wanted = by_the_book(model, prompt, longest, width, {EOS}, alpha)
    found = searched(model, request(prompt, longest), width, alpha=alpha)
    assert_are(found, wanted)
    for sample in found:
        assert sample.logprobs == pytest.approx(naive_logprobs(model, sample).tolist(), abs=1e-4)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 59), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 9))
def test_to_stop_early_loses_nothing(prompt: list[int], width: int, longest: int) -> None:
    assert_are(
        searched(MODEL, request(prompt, longest), width),
        by_the_book(MODEL, prompt, longest, width, {EOS}, 0.0),
    )


def test_it_stops_when_nothing_better_can_come() -> None:
    """A model that likes to end is not followed to the last token."""
    model = tiny_model(4)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.embed_tokens.weight[EOS] *= 3
    search = BeamSearch(model, request((7, 8, 20), 400), 2, eos_ids=(EOS,))
    steps = 1
    while search.step():
        steps += 1
    assert steps < 200
    assert [s.stop for s in search.best()] == [Stop.EOS, Stop.EOS]
    assert not search.step()


def test_one_beam_that_never_ends_is_greedy() -> None:
    """Over more tokens than there is room for at first, from a prompt of one token and of many."""
    never = 59  # an end that is never likely
    model = tiny_model(6)
    with torch.no_grad():
        model.embed_tokens.weight[never] = 0
    engine = TorchEngine(model, eos_ids=(never,), max_length=300)
    engine.load(model.state_dict(), 0)
    for prompt in ((3,), tuple(range(2, 50)) * 2):
        asked = Request(id=0, prompt_ids=prompt, max_tokens=100, seed=0, temperature=0.0)
        [greedy] = generate(engine, [asked])
        found = BeamSearch(model, asked, 1, eos_ids=())
        while found.step():
            pass
        [sample] = found.best()
        assert sample.completion_ids == greedy.completion_ids
        assert sample.logprobs == pytest.approx(greedy.logprobs, abs=1e-4)
        assert sample.stop is Stop.LENGTH


def test_stop_ids_end_an_answer() -> None:
    asked = request((2, 3), 6, stop_ids=(10, 20))
    wanted = by_the_book(MODEL, (2, 3), 6, 5, {EOS, 10, 20}, 0.0)
    found = searched(MODEL, asked, 5)
    assert_are(found, wanted)
    assert {s.completion_ids[-1] for s in found} <= {EOS, 10, 20}


def test_the_normalisation_lengthens() -> None:
    lengths = [
        [len(s.completion_ids) for s in searched(MODEL, request((4, 17, 30), 10), 6, alpha=alpha)]
        for alpha in (0.0, 1.0)
    ]
    assert sum(lengths[0]) < sum(lengths[1])


def test_what_cannot_be_searched() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BeamSearch(MODEL, request((2,), 3), 0, eos_ids=(EOS,))
    broken = tiny_model(7)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    search = BeamSearch(broken, request((2,), 3), 2, eos_ids=(EOS,))
    with pytest.raises(Diverged, match="not numbers"):
        search.step()


def test_it_is_deterministic() -> None:
    asked = request((11, 12, 13), 20)
    first, second = (searched(MODEL, asked, 4) for _ in range(2))
    assert first == second
    assert all(a != b for a, b in itertools.combinations([s.completion_ids for s in first], 2))
