"""The white-box layer against its equations, in the engine, on the disk; and the rates that it is read by."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import naive_logprobs, scramble, tiny_config, tiny_model
from transformers import AutoConfig

from liubai.errors import UserError
from liubai.measure.whitebox import EPSILON_SQUARED, atoms, coding_rate, subspace_rate, white_box
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.config import ModelConfig
from liubai.model.crate import STEP, THRESHOLD, SparseCode
from liubai.model.export import export
from liubai.model.lora import LoraConfig, attach
from liubai.model.scorer import scorer_from
from liubai.model.transformer import Transformer, build, rope_table
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages.pretrain import ModelShape
from liubai.text.template import BARE
from liubai.text.tokenizer import TextTokenizer

BOTH = ["CrateForCausalLM", "CrateAlphaForCausalLM"]


def crate(architecture: str, **changes: object) -> ModelConfig:
    return tiny_config(architecture, **{"num_key_value_heads": 4, **changes})


def by_the_book(model: Transformer, ids: list[int]) -> torch.Tensor:
    """The equations, a token and a head at a time, in float64."""
    c, state = model.config, {n: t.double() for n, t in model.state_dict().items()}

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + c.rms_norm_eps).sqrt() * weight

    cos, sin = (t.double() for t in rope_table(len(ids), c.head_dim, c.rope_theta))
    Z = [state["embed_tokens.weight"][i] for i in ids]
    for layer in range(c.num_hidden_layers):
        of = {n.removeprefix(f"layers.{layer}."): t for n, t in state.items() if f"layers.{layer}." in n}
        normed = [norm(z, of["input_layernorm.weight"]) for z in Z]
        heads = []
        for head in range(c.num_attention_heads):
            U = of["self_attn.u_proj.weight"][head * c.head_dim : (head + 1) * c.head_dim].T  # [D, E]
            v = [z @ U for z in normed]
            turned = [x * cos[t, 0] + x.roll(c.head_dim // 2) * sin[t, 0] for t, x in enumerate(v)]
            heads.append(
                [
                    sum(
                        w * v[s]
                        for s, w in enumerate(
                            torch.stack([turned[t] @ turned[s] for s in range(t + 1)])
                            .div(math.sqrt(c.head_dim))
                            .softmax(0)
                        )
                    )
                    for t in range(len(ids))
                ]
            )
        for t in range(len(ids)):
            joined = torch.cat([heads[h][t] for h in range(c.num_attention_heads)])
            z = Z[t] + of["self_attn.o_proj.weight"] @ joined
            y, Dt = norm(z, of["post_attention_layernorm.weight"]), of["code.dictionary.weight"]
            a1 = (STEP * (Dt @ y) - STEP * THRESHOLD).clamp(min=0)
            a2 = (a1 + STEP * (Dt @ y - Dt @ (Dt.T @ a1)) - STEP * THRESHOLD).clamp(min=0)
            Z[t] = z + of["down_proj.weight"] @ a2 if "down_proj.weight" in of else Dt.T @ a2
    return torch.stack([state["embed_tokens.weight"] @ norm(z, state["norm.weight"]) for z in Z])


@pytest.mark.parametrize("architecture", BOTH)
def test_the_layer_is_its_equations(architecture: str) -> None:
    model = tiny_model(3, crate(architecture))
    ids = [5, 9, 9, 31, 2, 44]
    ours = model(torch.tensor([ids]))[0].double()
    torch.testing.assert_close(ours, by_the_book(model, ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("architecture", BOTH)
def test_it_decodes_as_it_trains(architecture: str) -> None:
    model = tiny_model(4, crate(architecture))
    engine = TorchEngine(model, eos_ids=[1], slots=3, max_length=40)
    engine.load(model.state_dict(), version=0)
    requests = [Request(id=i, prompt_ids=(7, 8, 2 + i), max_tokens=24, seed=i) for i in range(5)]
    for sample in generate(engine, requests):
        expected = naive_logprobs(model, sample)
        torch.testing.assert_close(torch.tensor(sample.logprobs).double(), expected, atol=2e-5, rtol=1e-4)


def test_a_step_of_ista_lowers_what_it_minimises() -> None:
    config = crate(BOTH[0])
    part = SparseCode(config)
    torch.manual_seed(0)
    with torch.no_grad():  # a dictionary on which steps of this size may not overshoot: |D|² ≤ 1/η
        weight = torch.randn_like(part.dictionary.weight)
        part.dictionary.weight.copy_(weight / torch.linalg.matrix_norm(weight, 2) * STEP**-0.5)
    y = torch.randn(200, config.hidden_size)

    def objective(a: torch.Tensor) -> torch.Tensor:
        return (y - part.back(a)).square().sum(-1) / 2 + THRESHOLD * a.sum(-1)

    code = part(y)
    first = (STEP * (part.dictionary(y) - THRESHOLD)).relu()
    assert (code >= 0).all()
    assert (code == 0).float().mean() > 0.2
    assert (objective(first) < objective(torch.zeros_like(code))).all()
    assert (objective(code) < objective(first)).all()


@pytest.mark.parametrize("architecture", BOTH)
def test_it_learns(architecture: str) -> None:
    model = build(crate(architecture), 0)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("architecture", BOTH)
def test_its_checkpoint_says_whose_it_is(architecture: str, tmp_path: Path, world: TextTokenizer) -> None:
    config = crate(
        architecture, vocab_size=world.vocab_size, eos_token_id=world.eos_id, bos_token_id=world.bos_id
    )
    model = tiny_model(5, config)
    save_checkpoint(tmp_path / "c", model, world, BARE)
    again, _ = load(tmp_path / "c")
    ids = torch.tensor([[3, 5, 7]])
    assert torch.equal(again(ids), model(ids))
    raw = json.loads((tmp_path / "c/config.json").read_text())
    assert (raw["architectures"], raw["model_type"]) == ([architecture], "liubai_crate")
    with pytest.raises(ValueError, match="liubai_crate"):
        AutoConfig.from_pretrained(tmp_path / "c")
    with pytest.raises(UserError, match=r"llama\.cpp does not know Crate"):
        export(tmp_path / "c", "gguf", tmp_path / "c.gguf")
    assert not (tmp_path / "c.gguf").exists()
    told = export(tmp_path / "c", "hf", tmp_path / "again")
    assert "a format of Liubai's own" in told["caveats"][0]


def test_what_it_cannot_is_refused() -> None:
    with pytest.raises(UserError, match=r"num_key_value_heads \(2\) must be num_attention_heads"):
        tiny_config(BOTH[0], num_key_value_heads=2)
    with pytest.raises(UserError, match="there are no adapters for CrateForCausalLM"):
        attach(tiny_model(0, crate(BOTH[0])), LoraConfig(rank=2), 0)


def test_a_shape_says_so_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="CrateForCausalLM needs num_key_value_heads = num_attention_heads"):
        ModelShape(architecture="CrateForCausalLM", num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"architecture 'Crate' .*CrateAlphaForCausalLM"):
        ModelShape(architecture="Crate")
    assert ModelShape(architecture="CrateForCausalLM", num_key_value_heads=4).num_attention_heads == 4


def test_a_scorer_stands_on_it() -> None:
    scorer = scorer_from(tiny_model(1, crate(BOTH[1])), seed=0)
    assert scorer(torch.tensor([[3, 4, 5]])).shape == (1, 3)


def test_coding_rates_by_hand() -> None:
    one = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    # one direction of two: ½ log(1 + D/ε²) over all tokens
    assert coding_rate(one * 5) == pytest.approx(0.5 * math.log(1 + 2 / EPSILON_SQUARED))
    two = torch.eye(2).repeat(3, 1)
    assert coding_rate(two) == pytest.approx(math.log(1 + 2 / 2 / EPSILON_SQUARED))
    assert coding_rate(two) > coding_rate(one)
    # in the first axis alone: half of the tokens have length 1, the others 0
    axis = torch.tensor([[[3.0], [0.0]]])
    assert subspace_rate(two, axis) == pytest.approx(0.5 * math.log(1 + 1 / 2 / EPSILON_SQUARED))
    assert subspace_rate(two, axis) == pytest.approx(subspace_rate(two * 7, axis / 9))


def test_rates_are_a_token_s_however_many_tokens_there_are() -> None:
    torch.manual_seed(0)
    z, bases = torch.randn(9, 6), torch.randn(2, 6, 3)
    assert coding_rate(z.repeat(5, 1)) == pytest.approx(coding_rate(z))
    assert subspace_rate(z.repeat(5, 1), bases) == pytest.approx(subspace_rate(z, bases))


@pytest.mark.parametrize("architecture", BOTH)
def test_attention_that_adds_nothing_compresses_nothing(architecture: str) -> None:
    """Both sides of it are looked at in the same coordinates, whatever the two norms have learned."""
    model = tiny_model(6, crate(architecture))
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.o_proj.weight.zero_()
    for figures in white_box(model, [[3, 4, 5, 6], [7, 8, 9]]):
        assert figures.before == pytest.approx(figures.compressed)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.normal_()
    moved = white_box(model, [[3, 4, 5, 6], [7, 8, 9]])[0]
    assert moved.before != pytest.approx(moved.compressed)


def test_figures_of_every_layer() -> None:
    model = tiny_model(2, crate(BOTH[1]))
    figures = white_box(model, [[3, 4, 5, 6], [7, 8]])
    assert len(figures) == 2
    hidden = model.layers[0].input_layernorm(model.embed_tokens.weight[[3, 4, 5, 6, 7, 8]])
    assert figures[0].rate == pytest.approx(coding_rate(hidden.detach()))
    assert all(0 < f.sparsity < 1 and f.before and f.compressed for f in figures)
    assert not any(block._forward_hooks for block in model.modules())
    with torch.no_grad():
        model.layers[1].code.dictionary.weight.zero_()
    assert white_box(model, [[3, 4]])[1].sparsity == 1.0
    plain = white_box(tiny_model(2), [[3, 4, 5]])
    assert plain[0].compressed is None
    assert plain[0].rate > 0


def test_an_atom_is_about_the_words_beside_it() -> None:
    model = Transformer(crate(BOTH[0]))
    scramble(model, 0)
    with torch.no_grad():
        model.layers[1].code.dictionary.weight[7] = model.embed_tokens.weight[23] * 3
    assert atoms(model, 1, 2)[7][0] == 23
