"""One thread, and models so small that every test can afford a fresh one.

Their weights are drawn at random *everywhere*: a fresh model of ours begins with silent residual
outputs, unit norms and zero biases, and would hide a mistake in any of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from liubai.model.config import ModelConfig
from liubai.model.transformer import Transformer
from liubai.problems import world_vocabulary
from liubai.stages import pretrain
from liubai.stages.context import Context
from liubai.text.tokenizer import TextTokenizer, word_level
from liubai.types import Sample, Span, Stop

torch.set_num_threads(1)
# no test depends on a clock: a busy machine is no mistake
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: object) -> ModelConfig:
    shape: dict[str, object] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "eos_token_id": 1,
    }
    return ModelConfig(architecture=architecture, **{**shape, **changes})  # type: ignore[arg-type]


def scramble(model: torch.nn.Module, seed: int, scale: float = 1.5) -> None:
    """Every parameter at random: norms around 1, biases too, logits that spread by about ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "norm" in name:
                p.normal_(1.0, 0.2, generator=generator)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.3, generator=generator)
            else:
                p.normal_(0.0, scale * p.shape[1] ** -0.5, generator=generator)


def tiny_model(seed: int = 0, config: ModelConfig | None = None, scale: float = 1.5) -> Transformer:
    model = Transformer(config or tiny_config())
    scramble(model, seed, scale)
    return model.eval()


@torch.no_grad()
def naive_logprobs(model: Transformer, sample: Sample, temperature: float = 1.0) -> Tensor:
    """What the trainer's model gives to the completion of ``sample``: one row, no packing, no chunks."""
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    logprobs = torch.log_softmax(model(ids)[0].double() / temperature, dim=-1)
    start = len(sample.prompt_ids)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


def random_sample(
    generator: torch.Generator, *, prompt: int, completion: int, vocab: int = 60, version: int = 0
) -> Sample:
    """Tokens that nobody sampled, with log-probabilities that nobody gave them."""
    ids = torch.randint(2, vocab, (prompt + completion,), generator=generator).tolist()
    logprobs = (-4.0 + torch.randn(completion, generator=generator)).tolist()
    spans = (Span(version, completion),) if completion else ()
    return Sample(tuple(ids[:prompt]), tuple(ids[prompt:]), tuple(logprobs), Stop.LENGTH, spans)


@pytest.fixture(scope="session")
def world() -> TextTokenizer:
    """The small world's tokenizer."""
    return word_level(world_vocabulary())


class Killed(Exception):
    """What stands for the end of the process."""


class Silent:
    """A view that kills its stage when step ``kill_at`` is logged."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at, self.warnings = kill_at, list[str]()

    def start(self, stage: str, kind: str, total: int) -> None: ...

    def finish(self, stage: str, reused: bool) -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        if step == self.kill_at:
            raise Killed


#: of a base that is pre-trained in seconds
TINY_SHAPE = pretrain.ModelShape(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-training stage: seconds of it, enough to have answers of all lengths."""
    folder = tmp_path_factory.mktemp("base") / "1-base"
    config = pretrain.Config(steps=30, tokens_per_step=1024, model=TINY_SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        pretrain.run(config, Context(folder, 0, {}, Silent()))
    return folder


@pytest.fixture
def liubai_(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Run a command line in this process: its exit code, ``out`` and ``err``."""
    from liubai import cli

    def call(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["liubai", *arguments])
        try:
            code = cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call
