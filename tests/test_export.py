"""``liubai export``: plain folders, merged adapters, and what can go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_model import fit, sharded
from typer.testing import CliRunner

from liubai.cli import app
from liubai.errors import UserError
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.export import export
from liubai.model.lora import LoraConfig, adapters, attach, merged, save_adapter
from liubai.model.transformer import Transformer
from liubai.text.template import BARE
from liubai.text.tokenizer import TextTokenizer


@pytest.fixture
def plain(world: TextTokenizer, tmp_path: Path) -> Path:
    """A small world's checkpoint."""
    save_checkpoint(tmp_path / "c", tiny_model(0, fit(tiny_config(), world), scale=2.0), world, BARE)
    return tmp_path / "c"


# ---- Hugging Face folders ----


def test_hf_is_the_same_checkpoint(plain: Path, tmp_path: Path) -> None:
    sharded(plain)
    export(plain, "hf", tmp_path / "out")
    assert load(tmp_path / "out")[0].config == load(plain)[0].config
    for name, tensor in load(tmp_path / "out")[0].state_dict().items():
        assert torch.equal(tensor, load(plain)[0].state_dict()[name])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == BARE
    written = export(plain, "hf", tmp_path / "half", "bfloat16")
    assert written["bytes"] == sum(p.stat().st_size for p in (tmp_path / "half").iterdir())
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert load(tmp_path / "half")[0].config.dtype == "bfloat16"


def test_a_base_model_stays_without_a_template(plain: Path, tmp_path: Path) -> None:
    (plain / "chat_template.jinja").unlink()
    export(plain, "hf", tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> tuple[Path, Transformer]:
    model, _ = load(plain)
    attach(model, config := LoraConfig(rank=2, alpha=6.0), seed=0)
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_b, generator=torch.Generator().manual_seed(1))
    save_adapter(tmp_path / "adapter", model, config, str(plain))
    return tmp_path / "adapter", model


def test_an_adapter_is_merged(adapter: tuple[Path, Transformer], tmp_path: Path) -> None:
    folder, model = adapter
    export(folder, "hf", tmp_path / "out")
    plain, _ = load(tmp_path / "out")
    for name, tensor in merged(model).items():
        torch.testing.assert_close(plain.state_dict()[name], tensor)
    ids = torch.arange(30)[None]
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_an_adapter_without_its_model_is_named(adapter: tuple[Path, Transformer], tmp_path: Path) -> None:
    path = adapter[0] / "adapter_config.json"
    about = json.loads(path.read_text())
    for text, message in (
        (json.dumps(about | {"base_model_name_or_path": None}), "does not say which model"),
        (json.dumps(about | {"base_model_name_or_path": "gone/away/far"}), "no checkpoint folder"),
        ("{", "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            export(adapter[0], "hf", tmp_path / "out")


# ---- mistakes ----


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_what_float16_cannot_hold_is_named(to: Any, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(weights, plain / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight .* not finite in float16"):
        export(plain, to, tmp_path / "out", "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_what_is_there_is_left_alone(to: Any, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(plain, to, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    for parent in ("new", "out"):
        with pytest.raises(UserError, match=f"no folder .*{parent}' to write 'c' in"):
            export(plain, to, tmp_path / parent / "c")
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'liubai\[gguf\]'"):
        export(plain, "gguf", tmp_path / "c.gguf")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header fits, the weights do not."""
    pytest.importorskip("gguf")
    real = open

    def full(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return real("/dev/full" if mode == "ab" else path, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(UserError, match="no space left on"):
        export(plain, "gguf", tmp_path / "c.gguf")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_template_that_does_not_parse_is_not_passed_on(plain: Path, tmp_path: Path) -> None:
    (plain / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="chat template does not parse"):
        export(plain, "hf", tmp_path / "out")


def test_the_command(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    asked = ["export", str(plain), "--to", "gguf", "--out", str(tmp_path / "c.gguf"), "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert (said["to"], said["dtype"], said["architecture"]) == ("gguf", "float32", "LlamaForCausalLM")
    assert said["bytes"] == (tmp_path / "c.gguf").stat().st_size
    assert "note: llama.cpp has no word-level tokenizer" in result.stderr
    again = CliRunner().invoke(app, asked)
    assert isinstance(again.exception, UserError)
