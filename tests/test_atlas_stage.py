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
from liubai.model.checkpoint import load
from liubai.report import write_report
from liubai.report.attention import picture
from liubai.stages.attention import target_of
from liubai.stages.view import make_view

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
    assert len(told["ablation"]) == 2
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
