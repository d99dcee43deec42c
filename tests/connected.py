"""An engine that is connected to a scripted server, and what its answers are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import naive_logprobs, tiny_model
from scripted_vllm import Script, ScriptedVLLM, serving

from liubai.model.lora import LoraConfig, attach
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Engine, Request
from liubai.rollout.engines import EngineConfig, canary_for, engine_for
from liubai.rollout.outside import OutsideEngine
from liubai.rollout.transport import write_tensors
from liubai.seeds import derive
from liubai.types import Sample

EOS = 1
LORA = LoraConfig(rank=4, alpha=8.0)
PROMPTS = ((5, 6, 7), (9,), (30, 31, 32, 33, 34, 35))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def about(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "about")


def checkpoint(folder: Path) -> Path:
    """One, as far as it is looked at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "model.safetensors.index.json").write_text("{}")
    write_tensors(folder / "model.safetensors", tiny_model(1).state_dict())
    return folder


class Connected:
    """A scripted server, its own or ``server``, and an engine that speaks with it."""

    def __init__(self, stack: ExitStack, about: Path, model: Transformer, **keys: Any) -> None:
        self.model = model
        script_keys = {k: keys.pop(k) for k in list(keys) if k in Script.__dataclass_fields__}
        program, url = keys.pop("server", None) or stack.enter_context(serving(Script(model, **script_keys)))
        self.program: ScriptedVLLM = program
        self.url = url
        self.lora = keys.pop("lora", None)
        self.config = EngineConfig(kind="server", url=url, **{"timeout": 30, **keys})
        self.folder = about.parent / "weights"
        engine = engine_for(
            self.config,
            model,
            parent=about,
            eos_ids=(EOS,),
            slots=8,
            max_length=200,
            folder=self.folder,
            lora=self.lora,
            stack=stack,
        )
        assert isinstance(engine, OutsideEngine)
        self.engine = engine

    def canary(self, temperature: float = 1.0) -> Any:
        canary = canary_for(
            self.config, self.engine, self.model, PROMPTS, temperature=temperature, max_tokens=9, seed=0
        )
        assert canary is not None
        return canary


def ask(id: int, tokens: int = 10, **keys: Any) -> Request:
    prompt = keys.pop("prompt_ids", PROMPTS[id % 3])
    return Request(id=id, prompt_ids=prompt, max_tokens=tokens, seed=derive(0, id), **keys)


def run_out(engine: Engine) -> dict[int, Sample]:
    done: dict[int, Sample] = {}
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
    return done


def assert_written_by(policies: dict[int, Transformer], sample: Sample, temperature: float = 1.0) -> None:
    """Each token has the log-probability of the version that is said to have written it."""
    at = 0
    for span in sample.versions:
        wanted = naive_logprobs(policies[span.version], sample, temperature)[at : at + span.count].tolist()
        assert list(sample.logprobs[at : at + span.count]) == pytest.approx(wanted, abs=1e-5)
        at += span.count
    assert at == len(sample.completion_ids)


def adapted(seed: int) -> Transformer:
    model = tiny_model(1)
    attach(model, LORA, seed=0)
    retrain(model, seed)
    return model


def retrain(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith("lora_b"):
                p.normal_(0.0, 0.3, generator=generator)
