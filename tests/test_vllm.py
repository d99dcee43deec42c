"""What Liubai saves opens in vLLM and says the same. Runs on a CPU: ``make test-vllm``."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from families import FAMILIES, THOUGHT, greedy, prompts, save_family
from test_model import fit

from liubai.model.checkpoint import save_checkpoint
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import TextTokenizer

# before vLLM is imported: one process, and no more memory than tiny models need
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")


def opened(folder: Path) -> Any:
    return vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, seed=0)


def continued(program: Any, prompts: list[Any]) -> list[list[int]]:
    greedily = vllm.SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    return [list(a.outputs[0].token_ids) for a in program.generate(prompts, greedily, use_tqdm=False)]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_text_are_those_of_vllm(name: str, tmp_path: Path) -> None:
    model, tokenizer = save_family(name, tmp_path / "c")
    program = opened(tmp_path / "c")
    asked = prompts(model)
    assert continued(program, [{"prompt_token_ids": ids} for ids in asked]) == greedy(model, asked)
    text = "I'll say WE'VE got 1234567, 等等 " + THOUGHT[0]
    assert program.get_tokenizer().encode(text, add_special_tokens=False) == tokenizer.encode(text)
    del program
    gc.collect()


def test_the_small_world_opens_in_vllm(world: TextTokenizer, tmp_path: Path) -> None:
    """From text on: its head size must be one that vLLM has."""
    model = tiny_model(1, fit(tiny_config(head_dim=32), world), scale=2.5)
    save_checkpoint(tmp_path / "c", model, world, BARE)
    template = Template(world, BARE)
    questions = ["3 4 5 ->35", "12 99 1 ->8"]
    said = continued(opened(tmp_path / "c"), [template.render(q) for q in questions])
    assert said == greedy(model, [template.prompt_ids(q) for q in questions])
