"""The attention atlas: weights against the model's own attention, scores by hand, planted heads, silence."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from conftest import tiny_config, tiny_model

from liubai.measure.attention import (
    Reading,
    Watching,
    ablation,
    chances,
    division_of_labour,
    head_scores,
    looks,
    overlap,
    patterns,
    subspaces,
)
from liubai.measure.ratio import ratio_and_error
from liubai.model.transformer import causal


def test_watching_computes_what_the_model_computes() -> None:
    model = tiny_model(3, tiny_config("Qwen3ForCausalLM"))
    ids = torch.tensor([[5, 9, 2, 31, 9, 9, 4]])
    at = torch.arange(7)[None]
    plain = model.hidden(ids, at, causal())
    watching = Watching()
    torch.testing.assert_close(model.hidden(ids, at, watching), plain, atol=1e-5, rtol=1e-4)
    found = torch.stack(watching.weights)
    assert found.shape == (2, 4, 7, 7)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 7))
    assert (found.triu(1) == 0).all()


def test_a_silent_head_says_nothing() -> None:
    model = tiny_model(1)
    ids, at = torch.tensor([[5, 9, 2]]), torch.arange(3)[None]
    silenced = model.hidden(ids, at, Watching(frozenset({(1, 2)})))
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.view(32, 4, 16)[:, 2] = 0
    torch.testing.assert_close(silenced, model.hidden(ids, at, causal()), atol=1e-5, rtol=1e-4)


def test_which_places_count() -> None:
    #        0  1  2  3  4  5  6  7
    ids = (10, 7, 8, 50, 7, 8, 7, 9)  # 50 is the target, 4 … the answer, 7 and 8 numbers
    found = looks(Reading(ids, prompt=4, target=3, numbers=frozenset({7, 8, 9})))

    def of(kind: str) -> set[tuple[int, int]]:
        return {(int(t), int(s)) for t, s in found[kind].nonzero()}

    assert of("previous") == {(t, t - 1) for t in range(1, 8)}
    assert of("first") == {(t, 0) for t in range(1, 8)}
    assert of("same") == {(4, 1), (5, 2), (6, 1), (6, 4)}
    assert of("induction") == {(4, 2), (5, 3), (6, 2), (6, 5)}
    assert of("target") == {(t, 3) for t in range(4, 8)}
    # next tokens of the answer that stand in the question: at 3 a 7, at 4 an 8, at 5 a 7; the 9 does not
    assert of("source") == {(3, 1), (4, 2), (5, 1)}


def test_scores_are_means_over_the_places_that_count() -> None:
    model = tiny_model(2)
    readings = [Reading((3, 4, 5, 4, 6), 3, 1, frozenset({4})), Reading((7, 8), 1)]
    scores = head_scores(model, readings)
    first, second = (patterns(model, r.ids) for r in readings)
    expected = (sum(first[:, :, t, t - 1] for t in range(1, 5)) + second[:, :, 1, 0]) / 5
    torch.testing.assert_close(scores["previous"].float(), expected)
    torch.testing.assert_close(scores["same"].float(), first[:, :, 3, 1])
    torch.testing.assert_close(scores["induction"].float(), first[:, :, 3, 2])
    torch.testing.assert_close(scores["target"].float(), (first[:, :, 2:, 1]).mean(-1))
    torch.testing.assert_close(scores["source"].float(), first[:, :, 2, 1])
    assert head_scores(model, readings[1:])["source"].isnan().all()


def test_chance_is_the_score_of_a_head_that_looks_everywhere_alike() -> None:
    model = tiny_model(2)
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.q_proj.weight.zero_()
    readings = [Reading((3, 4, 5, 4, 6, 4), 3, 1, frozenset({4})), Reading((7, 8), 1)]
    chance, scores = chances(readings), head_scores(model, readings)
    assert chance["same"] == pytest.approx((1 / 4 + 2 / 6) / 2)
    assert chance["previous"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 2) / 6)
    for kind, table in scores.items():
        torch.testing.assert_close(table, torch.full_like(table, chance[kind]), atol=1e-6, rtol=0)
    assert math.isnan(chances(readings[1:])["source"])


def test_a_planted_head_is_found() -> None:
    """Keys and queries that read the embedding alike: a head that looks for tokens like this one."""
    model = tiny_model(0, tiny_config(num_key_value_heads=4, rope_theta=1e9))
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.eye(60, 32) + torch.eye(60, 32).roll(31, 0))
        attention = model.layers[0].self_attn
        # turning pairs (i, i + 8) barely matters where RoPE is slow: the fastest pair is left out
        one = torch.zeros(16, 32)
        one[1:8, 1:8] = torch.eye(7)
        one[9:, 8:15] = torch.eye(7)
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).weight.view(4, 16, 32)[2] = 4 * one
    ids = (3, 9, 5, 12, 9, 7, 3, 11)
    best = division_of_labour(head_scores(model, [Reading(ids, 4)]))
    assert best["same"][:2] == (0, 2)
    assert "target" not in best


def test_overlap_of_spaces() -> None:
    a = torch.eye(8)[:3]
    assert overlap(a, a @ torch.eye(8) * 5) == pytest.approx(1)
    assert overlap(a, torch.eye(8)[3:6]) == pytest.approx(0)
    assert overlap(a, torch.eye(8)[[0, 1, 5]]) == pytest.approx(2 / 3)
    mixed = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0, 0], [1, 1, 3, 0, 0, 0, 0, 0]])
    assert overlap(a, mixed) == pytest.approx(1)


def test_subspaces_of_a_head_that_copies() -> None:
    model = tiny_model(4)
    with torch.no_grad():
        block = model.layers[1]
        block.input_layernorm.weight.fill_(1)
        v = block.self_attn.v_proj.weight.view(2, 16, 32)[1]
        q = block.self_attn.q_proj.weight.view(4, 16, 32)
        q[3] = block.self_attn.k_proj.weight.view(2, 16, 32)[1] * -2
        block.self_attn.o_proj.weight.view(32, 4, 16)[:, 2] = torch.linalg.pinv(v)
    found = subspaces(model)
    assert found["q·k"].shape == (2, 4)
    assert found["q·k"][1, 3] == pytest.approx(1)
    assert found["q·k"][0].mean() < 0.8  # E/D by chance: a half
    assert found["|q|"][1, 3] == pytest.approx(2 * float(found["|k|"][1, 3]), rel=1e-4)
    assert found["copy"][1, 2] > 0.6  # half of the space comes back as it was
    assert found["copy"].flatten()[:6].abs().max() < 0.6


def test_ablation_is_the_change_of_the_loss() -> None:
    model = tiny_model(6)
    readings = [Reading((3, 4, 5, 6, 7), 2), Reading((8, 9, 3), 1)]
    found, error = ablation(model, readings)

    def losses() -> torch.Tensor:
        total = []
        for r in readings:
            logprobs = model(torch.tensor([r.ids]))[0].log_softmax(-1)
            total.append(sum(-logprobs[t - 1, r.ids[t]] for t in range(r.prompt, len(r.ids))))
        return torch.stack(total)

    with torch.no_grad():
        before = losses()
        model.layers[0].self_attn.o_proj.weight.view(32, 4, 16)[:, 1] = 0
        more, sizes = losses() - before, torch.tensor([3.0, 2.0])
    assert found[0, 1] == pytest.approx(float(more.sum() / 5), abs=1e-5)
    off = more - more.sum() / 5 * sizes
    assert error[0, 1] == pytest.approx(float((2 * off.square().sum()).sqrt() / 5), abs=1e-5)
    assert found.shape == error.shape == (2, 4)
    assert found.abs().min() > 0
    assert ablation(model, readings[:1])[1].isnan().all()


def test_the_error_of_a_ratio_is_that_of_the_mean_where_all_are_of_one_size() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    ratio, error = ratio_and_error(values, [2.0] * 5)
    assert ratio == pytest.approx(1.4)
    assert error == pytest.approx(statistics.stdev(values) / 2 / math.sqrt(5))
    # what is in proportion to the size is no chance at all
    assert ratio_and_error([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == pytest.approx((2.0, 0.0))
    assert all(math.isnan(x) for x in ratio_and_error([], []))
    with pytest.raises(ValueError, match="2 totals of 1 texts"):
        ratio_and_error([1.0, 2.0], [1.0])
