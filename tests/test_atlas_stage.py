"""The stages that look inside a checkpoint, through a recipe to the report; snapshots of pre-training."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from html_page import Page
from typer.testing import CliRunner

from liubai import recipe
from liubai.cli import app
from liubai.errors import UserError
from liubai.measure.attention import patterns
from liubai.measure.whitebox import white_box
from liubai.model.checkpoint import load
from liubai.report import write_report
from liubai.report.attention import _pictures, picture
from liubai.stages import attention, pretrain, whitebox
from liubai.stages.attention import target_of
from liubai.stages.evaluate import held_out_of
from liubai.stages.view import make_view
from liubai.text.template import template_for

RECIPE = """
name = "look"
threads = 1
[stages.base]
kind = "pretrain"
steps = 6
tokens_per_step = 256
snapshots = [2, 4, 6]
[stages.base.model]
architecture = "{architecture}"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 16
[stages.heads]
kind = "attention"
from = "base"
limit = 3
max_tokens = 40
label = "<Base>"
[stages.layers]
kind = "whitebox"
from = "base"
limit = 4
"""


def ran(folder: Path, architecture: str) -> Path:
    (folder / "look.toml").write_text(RECIPE.format(architecture=architecture))
    run = folder / "run"
    with make_view(False) as view:
        recipe.run(recipe.load_recipe(folder / "look.toml", []), run, view, [])
    return run


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "CrateAlphaForCausalLM"])
def test_looking_inside_by_recipe(architecture: str, tmp_path: Path) -> None:
    run = ran(tmp_path, architecture)
    kept = sorted(p.name for p in (run / "1-base/snapshots").iterdir())
    assert kept == ["000002", "000004", "000006"]
    last, _ = load(run / "1-base/snapshots/000006")
    end, _ = load(run / "1-base/checkpoint")
    assert all(torch.equal(t, end.state_dict()[n]) for n, t in last.state_dict().items())
    first, _ = load(run / "1-base/snapshots/000002")
    assert not torch.equal(first.embed_tokens.weight, end.embed_tokens.weight)

    told = json.loads((run / "2-heads/attention.json").read_text())
    assert [h["step"] for h in told["history"]] == [2, 4, 6]
    # the same weights, the same texts: the last snapshot is the checkpoint
    assert told["history"][2]["scores"] == told["scores"]
    assert told["history"][0]["scores"] != told["scores"]
    assert len(told["ablation"]) == len(told["ablation_error"]) == 2
    assert 0 < told["chance"]["previous"] < 0.5
    text = told["texts"][0]
    layers, heads, T, _ = text["shape"]
    packed = zlib.decompress(base64.b64decode(text["patterns"]))
    assert len(packed) == layers * heads * T * T == 4 * len(text["tokens"]) ** 2
    assert packed[0] == 255  # the first token has nothing else to look at

    layer = json.loads((run / "3-layers/whitebox.json").read_text())["layers"][0]
    assert (layer["compressed"] is not None) == (architecture != "LlamaForCausalLM")
    assert ("atoms" in layer) == (architecture != "LlamaForCausalLM")

    html = write_report(run).read_text(encoding="utf-8")
    Page(html)  # balanced
    assert "&lt;Base&gt;" in html
    assert "<Base>" not in html
    assert html.count("attention of layer") == 2 * 4 * len(told["texts"])
    assert "img-src data:" in html
    assert 'id="white-box"' in html


def test_the_patterns_are_those_of_the_text(tmp_path: Path) -> None:
    run = ran(tmp_path, "LlamaForCausalLM")
    model, tokenizer = load(run / "1-base/checkpoint")
    text = json.loads((run / "2-heads/attention.json").read_text())["texts"][0]
    ids = [tokenizer.id_of(token) for token in text["tokens"]]
    wanted = (patterns(model, ids) * 255).round().to(torch.uint8)
    assert zlib.decompress(base64.b64decode(text["patterns"])) == wanted.numpy().tobytes()
    told = CliRunner().invoke(app, ["attention", str(run / "1-base/checkpoint"), "--limit", "3"])
    assert told.exit_code == 0, told.output
    assert "2.2" in told.output
    told = CliRunner().invoke(app, ["whitebox", str(run / "1-base/checkpoint"), "--json"])
    assert len(json.loads(told.output)["layers"]) == 2


def test_a_text_that_is_too_long_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes nothing short has its patterns shown, too."""
    run = ran(tmp_path, "LlamaForCausalLM")
    path, problems = run / "1-base/checkpoint", held_out_of("countdown", 3, 0)
    model, tokenizer = load(path)
    readings = attention.written(model, tokenizer, path, problems, 40)
    shortest = min(readings, key=lambda r: len(r.ids))
    monkeypatch.setattr(attention, "LONGEST", len(shortest.ids) - 4)
    (text,) = attention.atlas(path, problems, max_tokens=40)["texts"]
    assert len(text["tokens"]) == text["length"] - 4 == len(shortest.ids) - 4
    # no token looks ahead: the rows are those of the whole text
    size = text["shape"][2]
    wanted = (patterns(model, shortest.ids)[:, :, :size, :size] * 255).round().to(torch.uint8)
    found = torch.frombuffer(
        bytearray(zlib.decompress(base64.b64decode(text["patterns"]))), dtype=torch.uint8
    )
    assert (found.int() - wanted.flatten().int()).abs().max() <= 1
    assert f"its first {size} tokens of {size + 4}" in _pictures(text)


def test_layers_are_looked_at_while_it_thinks(tmp_path: Path) -> None:
    """Its own answers are read, not the questions alone."""
    run = ran(tmp_path, "CrateAlphaForCausalLM")
    path, problems = run / "1-base/checkpoint", held_out_of("countdown", 4, 0)
    model, tokenizer = load(path)
    few, many = (whitebox.looked_at(path, problems, most) for most in (1, 30))
    prompts = sum(len(template_for(tokenizer, path).prompt_ids(p.prompt)) for p in problems)
    assert few["tokens"] == prompts + len(problems)
    assert many["tokens"] > few["tokens"]
    texts = [r.ids for r in attention.written(model, tokenizer, path, problems, 30)]
    assert many["layers"][1]["rate"] == pytest.approx(white_box(model, texts)[1].rate)


def test_how_the_labour_came_to_be_divided_is_a_recipe() -> None:
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    stages = {p.name: p for p in recipe.load_recipe(recipes / "experiments/arise.toml").stages}
    base = stages["base"].config
    assert isinstance(base, pretrain.Config)
    assert len(base.snapshots) >= 5
    assert base.snapshots[-1] == base.steps
    zero = recipe.load_recipe(recipes / "zero.toml").stages[0].config
    assert base.model_copy(update={"snapshots": ()}) == zero
    assert (stages["heads"].kind, list(stages["heads"].parents)) == ("attention", ["base"])


def test_a_snapshot_that_no_step_makes_is_refused(tmp_path: Path) -> None:
    text = RECIPE.format(architecture="LlamaForCausalLM").replace("[2, 4, 6]", "[2, 7]")
    (tmp_path / "look.toml").write_text(text)
    with pytest.raises(UserError, match=r"snapshots.* 7 .*6 steps"):
        recipe.load_recipe(tmp_path / "look.toml", [])


@pytest.mark.parametrize(
    ("tokens", "place"),
    [
        (["<s>", "3", "4", "->12", "<think>"], 3),
        (["solve", "3", "*", "x", "=", "12"], 5),
        (["6", "or", "7"], None),
    ],
)
def test_what_a_question_aims_at(tokens: list[str], place: int | None) -> None:
    assert target_of(tokens) == place


def test_a_picture_is_a_png_of_its_weights() -> None:
    png = base64.b64decode(picture(bytes([0, 255, 64, 0]), 2).partition(",")[2])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        size = struct.unpack(">I", png[at : at + 4])[0]
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + data)
        chunks[name] = data
        at += 12 + size
    assert zlib.decompress(chunks[b"IDAT"]) == b"\x00\x00\xff\x00\x40\x00"
    palette = chunks[b"PLTE"]
    assert palette[:3] == b"\xff\xff\xff"
    assert sum(palette[-3:]) < sum(palette[3 * 64 : 3 * 65]) < 3 * 255
