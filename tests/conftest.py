"""One thread, and models so small that every test can afford a fresh one.

Their weights are drawn at random *everywhere*: a fresh model of ours begins with silent residual
outputs, unit norms and zero biases, and would hide a mistake in any of them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor

from liubai.model.config import ModelConfig
from liubai.model.transformer import Transformer
from liubai.problems import world_vocabulary
from liubai.text.tokenizer import TextTokenizer, word_level
from liubai.types import Sample, Span, Stop

torch.set_num_threads(1)


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
