"""A recipe to plan, and a large model that is there by its shape alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from liubai.plan.reading import Job, jobs
from liubai.recipe import load_recipe

#: Qwen2.5-7B's
SEVEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
RECIPE = """
name = "maths"
[stages.zero]
kind = "rl"
model = "{model}"
preset = "dapo"
steps = 300
groups = 512
samples = 16
max_tokens = 8192
checkpointing = true
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    (tmp_path / "seven").mkdir()
    (tmp_path / "seven" / "config.json").write_text(json.dumps(SEVEN), encoding="utf-8")
    return tmp_path / "seven"


def job_of(seven: Path, tmp_path: Path, tokens: float | None = None, *sets: str) -> Job:
    return jobs(load_recipe(write(tmp_path, RECIPE.format(model=seven)), sets), tokens=tokens)[0]
