"""Models that a page carries: a browser for them, their folders, what the engine says with their weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from playwright.sync_api import Browser, sync_playwright

from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.config import Llama3Rope
from liubai.model.quantise import dequantised
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages import thinker
from liubai.text.template import BARE, template_for
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Problem, Sample

CHROMIUM = shutil.which("chromium")
#: Of Llama, too, what Llama 3.1 does to long contexts: places beyond the eighth turn more slowly.
STRETCHED = Llama3Rope(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8
)
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rope_scaling": STRETCHED, "tie_word_embeddings": False},
    "Qwen2ForCausalLM": {"num_key_value_heads": 1, "hidden_size": 24, "rms_norm_eps": 0.05},
    "Qwen3ForCausalLM": {"num_hidden_layers": 3, "rope_theta": 500.0},
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("the model in the page is tested in chromium, which is not installed here")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def carried(path: Path, problems: Sequence[Problem], max_tokens: int = 40) -> dict[str, Any]:
    told: dict[str, Any] = {"readers": [], "models": [], "tensors": {}}
    thinker.thinker(path, "it", problems, max_tokens, 10**6, told)
    return told


def in_eight_bits(path: Path) -> tuple[Transformer, TextTokenizer]:
    model, tokenizer = load(path)
    model.load_state_dict(dequantised(model.state_dict()))
    return model, tokenizer


def by_engine(
    path: Path, problems: Sequence[Problem], max_tokens: int, temperature: float, seed: int
) -> list[Sample]:
    """What the engine answers with the weights that the page has."""
    model, tokenizer = in_eight_bits(path)
    template = template_for(tokenizer, path)
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, max_length=128 + max_tokens)
    engine.load(model.state_dict(), version=0)
    requests = [
        Request(
            id=i,
            prompt_ids=tuple(template.prompt_ids(p.prompt)),
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature,
        )
        for i, p in enumerate(problems)
    ]
    return generate(engine, requests)


def model_folder(which: str, base: Path, world: TextTokenizer, folder: Path) -> Path:
    if which == "trained":
        return base / "checkpoint"
    ids = {"vocab_size": world.vocab_size, "eos_token_id": world.eos_id, "bos_token_id": world.bos_id}
    model = tiny_model(3, tiny_config(which, **{**ids, **SHAPES[which]}))
    save_checkpoint(folder, model, world, BARE)
    return folder
