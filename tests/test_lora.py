"""LoRA: what it computes, what it leaves alone, and PEFT's files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_update import EOS, settings_of, some_groups
from torch import Tensor

from liubai.errors import UserError
from liubai.learn.optim import Optimizer
from liubai.learn.replicas import Replicas
from liubai.learn.update import update
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.lora import (
    CONFIG,
    WEIGHTS,
    LoraConfig,
    adapters,
    attach,
    load_adapter,
    merged,
    save_adapter,
    trained,
)
from liubai.model.transformer import Transformer
from liubai.text.template import BARE
from liubai.text.tokenizer import TextTokenizer

IDS = torch.arange(2, 42).view(2, 20)
CONFIGS = {
    "all": LoraConfig(rank=4, alpha=8.0),
    "attention": LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj")),
    "down": LoraConfig(rank=1, alpha=1.0, targets=("down_proj",)),
}


def with_adapter(config: LoraConfig, architecture: str = "Qwen2ForCausalLM") -> Transformer:
    """A model whose adapters say something."""
    model = tiny_model(1, tiny_config(architecture))
    attach(model, config, seed=7)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_b.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    base, model = tiny_model(1), tiny_model(1)
    attach(model, CONFIGS[name], seed=0)
    assert torch.equal(model(IDS), base(IDS))
    state = merged(model)
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in state.items())
    assert len(list(adapters(model))) == 2 * len(CONFIGS[name].targets)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_merged_computes_the_same(name: str, architecture: str) -> None:
    model = with_adapter(CONFIGS[name], architecture)
    plain = tiny_model(1, model.config)
    assert not torch.allclose(model(IDS), plain(IDS), atol=1e-2)
    plain.load_state_dict(merged(model))
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-4, atol=1e-4)


def test_only_the_adapter_is_trained_and_replicas_share_it() -> None:
    model = with_adapter(CONFIGS["attention"])
    before = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model, lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert len(Replicas(model).models) == 3
        metrics = update(
            model, optimizer, some_groups(), settings_of(tokens_per_microbatch=60), version=9, pad_id=EOS
        )
    finally:
        torch.set_num_threads(threads)
    assert metrics["grad_norm"] > 0
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == set(trained(model)) == {n for n in before if ".lora_" in n}
    assert set(optimizer.state) == {f"{n}/{m}" for n in changed for m in ("first", "second")}


def test_its_gradient_is_that_of_the_merged_weight() -> None:
    model = with_adapter(CONFIGS["all"])
    plain = tiny_model(1, model.config)
    plain.load_state_dict(merged(model))
    model(IDS).square().mean().backward()
    plain(IDS).square().mean().backward()
    whole = {n: p.grad for n, p in plain.named_parameters()}
    for name, layer in adapters(model):
        of = whole[f"{name}.weight"]
        assert of is not None
        torch.testing.assert_close(layer.lora_b.grad, layer.scale * of @ layer.lora_a.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.lora_a.grad, layer.scale * layer.lora_b.T @ of, rtol=1e-3, atol=1e-5)
        assert layer.weight.grad is None


def test_two_adapters_are_refused() -> None:
    model = with_adapter(CONFIGS["all"])
    with pytest.raises(UserError, match="has an adapter already"):
        attach(model, CONFIGS["all"], seed=0)


# ---- files ----


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_comes_back_from_its_files(name: str, tmp_path: Path) -> None:
    model = with_adapter(CONFIGS[name])
    save_adapter(tmp_path / "a", model, CONFIGS[name], "some/base")
    again = tiny_model(1, model.config)
    assert load_adapter(tmp_path / "a", again) == CONFIGS[name]
    assert torch.equal(again(IDS), model(IDS))


def test_adapter_opens_in_peft_and_the_reverse(world: TextTokenizer, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers")
    config = tiny_config("Qwen2ForCausalLM", vocab_size=world.vocab_size, eos_token_id=world.eos_id)
    save_checkpoint(tmp_path / "base", tiny_model(1, config), world, BARE)
    model = load(tmp_path / "base")[0]
    attach(model, CONFIGS["all"], seed=3)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_b.normal_(0, 0.3)
    save_adapter(tmp_path / "ours", model, CONFIGS["all"], str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    for rslora in (False, True):
        wrapped = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=rslora,
                            init_lora_weights=False, task_type="CAUSAL_LM"),
        )  # fmt: skip
        wrapped.save_pretrained(tmp_path / "theirs")
        here = load(tmp_path / "base")[0]
        load_adapter(tmp_path / "theirs", here)
        with torch.no_grad():
            torch.testing.assert_close(here(IDS), wrapped(IDS).logits, rtol=1e-4, atol=1e-4)


def change(**fields: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps(raw))

    return spoil


def change_weights(of: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    return lambda f: save_file(of({n: t.clone() for n, t in load_file(f / WEIGHTS).items()}), f / WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "is not an adapter: it has no adapter_config"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is not an adapter: it has no adapter_model"),
    "not JSON": (lambda f: (f / CONFIG).write_text("{"), "is not valid JSON"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "corrupt or trunc"),
    "another type": (change(peft_type="IA3"), "adapters of type IA3"),
    "dora": (change(use_dora=True), "sets use_dora"),
    "trained bias": (change(bias="all"), "sets bias"),
    "own ranks": (change(rank_pattern={"q_proj": 9}), "sets rank_pattern"),
    "unknown target": (change(target_modules=["q_proj", "lm_head"]), "target_modules must be of"),
    "targets as a pattern": (change(target_modules=".*"), "target_modules must be of"),
    "no rank": (change(r=None), "needs r and lora_alpha"),
    "fewer targets": (change(target_modules=["q_proj"]), "has an unknown tensor"),
    "missing": (change_weights(lambda w: {n: t for n, t in w.items() if n != FIRST}), f"lacks {FIRST}"),
    "another size": (change_weights(lambda w: w | {FIRST: torch.ones(4, 9)}), r"is \[4, 9\].*\[4, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_adapter_is_named(case: str, tmp_path: Path) -> None:
    spoil, message = WRONG[case]
    save_adapter(tmp_path / "a", with_adapter(CONFIGS["all"]), CONFIGS["all"], "")
    spoil(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "a", tiny_model(1, tiny_config("Qwen2ForCausalLM")))
