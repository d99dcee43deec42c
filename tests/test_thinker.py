"""The models that a report carries: 8 bits, what is written of them, and what a page cannot carry."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent, tiny_config, tiny_model
from html_page import Page

from liubai import recipe
from liubai.errors import UserError
from liubai.model import quantise
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.quantise import dequantised, packed, quantised
from liubai.report import write_report
from liubai.stages import thinker
from liubai.stages.context import Context
from liubai.stages.evaluate import held_out_of
from liubai.stages.view import make_view
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import TextTokenizer, byte_level

EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>"


def checkpoint(folder: Path, world: TextTokenizer, template: str = BARE, seed: int = 0, **shape: Any) -> Path:
    """The ``checkpoint`` of a stage ``folder``, with random weights and the small world's tokenizer."""
    ids = {"vocab_size": world.vocab_size, "eos_token_id": world.eos_id, "bos_token_id": world.bos_id}
    model = tiny_model(seed, tiny_config(**{**ids, **shape}))
    save_checkpoint(folder / "checkpoint", model, world, template)
    return folder / "checkpoint"


def unpacked(value: dict[str, Any]) -> torch.Tensor:
    """A packed tensor by the book: s_r · q_rc, one number at a time."""
    raw = base64.b64decode(value["data"])
    if "scale" not in value:
        return torch.frombuffer(bytearray(raw), dtype=torch.float32)
    rows, columns = value["shape"]
    scales = torch.frombuffer(bytearray(base64.b64decode(value["scale"])), dtype=torch.float32)
    whole = [
        [raw[r * columns + c] - 256 * (raw[r * columns + c] > 127) for c in range(columns)]
        for r in range(rows)
    ]
    return torch.stack(
        [torch.tensor([float(q) for q in row]) * s for row, s in zip(whole, scales, strict=True)]
    )


def carried(path: Path, problems: int = 4, at_most: int = 10**6, max_tokens: int = 24) -> dict[str, Any]:
    told: dict[str, Any] = {"readers": [], "models": [], "tensors": {}}
    thinker.thinker(path, "it", held_out_of("countdown", problems, 0), max_tokens, at_most, told)
    return told


def test_eight_bits_are_half_a_scale_away() -> None:
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1], [9], [0.1], [3], [0]]
    )
    q, scale = quantised(weight)
    assert q.dtype == torch.int8
    assert q.abs().amax(1).tolist() == [127, 127, 127, 127, 0]  # the whole range of every row, zeros apart
    assert torch.allclose(scale, weight.abs().amax(1) / 127)
    after = dequantised({"w": weight, "norm": weight[0]})
    assert ((after["w"] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert torch.equal(after["norm"], weight[0])
    assert torch.equal(unpacked(packed(weight)), after["w"])  # to the last bit
    assert torch.equal(unpacked(packed(weight[0])), weight[0])


def test_a_checkpoint_as_json(world: TextTokenizer, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "1-a", world, architecture="Qwen2ForCausalLM", tie_word_embeddings=False)
    told = carried(path)
    model, tokenizer = load(path)
    wanted = dequantised(model.state_dict())
    (it,) = told["models"]
    assert it["weights"].keys() == wanted.keys()
    assert all(
        torch.equal(unpacked(told["tensors"][key]), wanted[name]) for name, key in it["weights"].items()
    )
    assert it["parameters"] == model.count_parameters()
    assert it["bytes"] < 1.45 * it["parameters"] + 8 * 1024  # four thirds of a byte, and scales of short rows
    (reader,) = told["readers"]
    assert [reader["words"][i] for i in (reader["unknown"], *reader["ends"])] == ["<|unknown|>", "<|end|>"]
    question = held_out_of("countdown", 1, 0)[0].prompt
    prompt = Template(tokenizer, BARE).render(question)
    assert reader["before"] + question + reader["after"] == prompt
    turns = it["config"]["turns"]
    assert turns == pytest.approx([10000 ** -(2 * i / 16) for i in range(8)], rel=1e-12)


def test_what_is_the_same_is_written_once(world: TextTokenizer, tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "1-a", world), checkpoint(tmp_path / "2-b", world, seed=1)
    told = carried(one)
    once, problems = len(told["tensors"]), held_out_of("countdown", 4, 0)
    thinker.thinker(one, "again", problems, 24, 10**6, told)
    assert len(told["tensors"]) == once
    thinker.thinker(other, "other", problems, 24, 10**6, told)
    assert len(told["tensors"]) == 2 * once
    assert [model["reader"] for model in told["models"]] == [0, 0, 0]


def test_the_agreement_is_measured(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = carried(base / "checkpoint", problems=24)["models"][0]["same"]
    assert before["problems"] == 24
    assert before["tokens"] >= 16
    monkeypatch.setattr(quantise, "LARGEST", 1)  # −s, 0 and s: hardly a model any more
    after = carried(base / "checkpoint", problems=24)["models"][0]["same"]
    assert after["tokens"] < before["tokens"]
    assert after["right"][0] == before["right"][0]  # the full model is the full model

    monkeypatch.setattr(thinker, "dequantised", dict)  # nothing is lost
    assert carried(base / "checkpoint", problems=24)["models"][0]["same"]["tokens"] == 24


@pytest.mark.parametrize(
    ("shape", "template", "said"),
    [
        ({"architecture": "CrateForCausalLM", "num_key_value_heads": 4}, BARE, "CrateForCausalLM"),
        ({"hidden_size": 256, "intermediate_size": 4096}, BARE, r"parameters.*at most 1,000,000.*at_most"),
        ({}, BARE.replace("content", "content | replace('->', '-> ')"), "chat template"),
        ({"max_position_embeddings": 28}, BARE, "max_tokens 24.*28"),
    ],
)
def test_what_a_page_cannot_carry(
    shape: dict[str, Any], template: str, said: str, world: TextTokenizer, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "1-a", world, template, **shape)
    with pytest.raises(UserError, match=said):
        carried(path)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(["3 4 5 ->35 <think> </think>"] * 4, 300)
    shape = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    save_checkpoint(tmp_path / "c", tiny_model(0, shape), tokenizer, BARE)
    with pytest.raises(UserError, match="one token a word"):
        carried(tmp_path / "c")


def test_examples_come_from_every_language() -> None:
    found = thinker.examples("make", 4, 0)
    assert [p.language for p in found] == ["en", "zh", "en", "zh"]
    assert found[0].prompt.startswith("make ")
    assert len({p.prompt for p in found}) == 4
    assert len(thinker.examples("countdown", 3, 0)) == 3


SHAPE = (
    "model = { hidden_size = 32, intermediate_size = 48, num_hidden_layers = 1, num_attention_heads = 2, "
    "num_key_value_heads = 2, head_dim = 16 }"
)
RECIPE = """
name = "think"
threads = 1
[stages.base]
kind = "pretrain"
steps = 2
tokens_per_step = 256
SHAPE
[stages.more]
kind = "pretrain"
steps = 3
tokens_per_step = 256
SHAPE
[stages.thinks]
kind = "thinker"
from = ["more", "base"]
limit = 3
max_tokens = 30
labels = { base = LABEL }
"""


def test_by_recipe_into_the_report(tmp_path: Path) -> None:
    (tmp_path / "think.toml").write_text(RECIPE.replace("SHAPE", SHAPE).replace("LABEL", json.dumps(EVIL)))
    run = tmp_path / "run"
    with make_view(False) as view:
        recipe.run(recipe.load_recipe(tmp_path / "think.toml", []), run, view, [])
    told = json.loads((run / "3-thinks/thinker.json").read_text())
    assert [model["label"] for model in told["models"]] == ["more", EVIL]  # in the order of from
    html = write_report(run).read_text(encoding="utf-8")
    shown = Page(html)
    kinds = [attrs.get("type") for tag, attrs in shown.tags if tag == "script"]
    assert sorted(kinds, key=str) == [None, None, "application/json"]
    assert not [tag for tag, attrs in shown.tags if tag == "img" and attrs.get("src") == "x"]
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    read = json.loads(data)
    assert [model["label"] for model in read["models"]] == ["more", EVIL]
    assert read["tensors"] == told["tensors"]
    assert "Nothing is loaded and nothing is sent" in shown.text["thinker-0"]

    policy = next(a["content"] for t, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = [
        "'sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() + "'" for s in scripts
    ]
    assert policy.partition("script-src ")[2].split() == hashes  # these two, and no other
    assert len(hashes) == 2


def test_a_stage_that_cannot_begin(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "1-eval"
    empty.mkdir()
    with pytest.raises(UserError, match="at least one earlier stage"):
        thinker.run(thinker.Config(), Context(tmp_path / "2-t", 0, {"eval": empty}, Silent()))
    with pytest.raises(UserError, match=r"labels names 'zero'.*base"):
        thinker.run(
            thinker.Config(labels={"zero": "Z"}), Context(tmp_path / "3-t", 0, {"base": base}, Silent())
        )


def test_a_report_without_it_has_one_script(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[stages.t]\nkind = "thinker"\nfrom = "base"\n')
    (tmp_path / "1-t").mkdir()
    (tmp_path / "1-t/thinker.json").write_text('{"models": 3}')  # cut short, or of somebody else
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("<script") == 1
    assert html.count("'sha256-") == 1
