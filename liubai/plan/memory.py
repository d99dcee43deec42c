"""What fits: the memory of training and of writing answers, in bytes for each GPU.

Parameters are counted on the model itself, built without storage; gradients, masters and moments are those of
:mod:`liubai.learn.optim`; activations are counted tensor by tensor as the layers of :mod:`liubai.model` keep
them. What is left out: the libraries' own workspaces.

Letters: D hidden, H query heads, K key/value heads, E head size, M intermediate, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from liubai.learn import sharded
from liubai.learn.logprobs import CHUNK_LOGITS
from liubai.learn.optim import is_hidden_matrix
from liubai.learn.replicas import LARGEST
from liubai.learn.update import UpdateConfig
from liubai.model.config import ModelConfig
from liubai.model.lora import LoraConfig
from liubai.model.scorer import Scorer
from liubai.model.transformer import Transformer
from liubai.plan.hardware import SIZES, Device
from liubai.rollout.cache import NARROWEST
from liubai.rollout.torch_engine import PREFILL_TOKENS

FLOAT32 = SIZES["float32"]
#: parts of a trainer's memory that are there between two updates, too
KEPT = ("weights", "masters", "moments", "reference", "whole models")
#: tokens from which on a prompt is read once for all its answers
SHARED = cast(int, UpdateConfig.__dataclass_fields__["share_from"].default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of parameters. ``trained`` are all, or those of adapters, which stand beside; ``by_muon`` of
    them have one moment; ``layer`` is a layer's, ``ends`` what stands before and after the layers,
    ``largest`` a single tensor's. ``inner`` multiply every token that is read; ``head``, every token whose
    next one is asked for."""

    parameters: int
    trained: int
    by_muon: int
    layer: int
    ends: int
    largest: int
    inner: int
    head: int

    @property
    def adapters(self) -> int:
        return self.trained if self.trained != self.parameters else 0


def sizes(
    config: ModelConfig, *, lora: LoraConfig | None = None, muon: bool = False, scorer: bool = False
) -> Sizes:
    """Of a language model, or of a ``scorer`` with its trunk, whose head is one row."""
    with torch.device("meta"):
        model = Scorer(config) if scorer else Transformer(config)
    shapes = dict(model.named_parameters())
    total = sum(p.numel() for p in shapes.values())
    in_layers = sum(p.numel() for p in model.layers.parameters())
    by_muon = sum(p.numel() for name, p in shapes.items() if muon and is_hidden_matrix(name, p))
    trained, largest = total, max(p.numel() for p in shapes.values())
    if lora:
        thin = [lora.rank * (m.in_features + m.out_features) for m in _targets(model, lora)]
        trained, largest = sum(thin), max(thin, default=0)
    return Sizes(
        parameters=total,
        trained=trained,
        by_muon=by_muon,
        layer=in_layers // config.num_hidden_layers,
        ends=total - in_layers,
        largest=largest,
        inner=sum(
            p.numel() * _uses(config, name) for name, p in model.layers.named_parameters() if p.ndim == 2
        ),
        head=(1 if scorer else config.vocab_size) * config.hidden_size,
    )


def _targets(model: Transformer, lora: LoraConfig) -> list[nn.Linear]:
    named = model.layers.named_modules()
    return [m for name, m in named if isinstance(m, nn.Linear) and name.rpartition(".")[2] in lora.targets]


def _uses(config: ModelConfig, name: str) -> int:
    """How often a token meets a matrix of a layer: once, but CRATE's dictionary goes there and back."""
    if not name.endswith("dictionary.weight"):
        return 1
    return 3 if config.architecture == "CrateAlphaForCausalLM" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The settings that a stage's memory depends on. ``tokens`` are those of a micro-batch, ``prompt`` those
    that its rows of ``answer`` tokens continue; ``replicas`` work at once (:mod:`liubai.learn.replicas`)."""

    dtype: str
    moments: str = "float32"
    checkpointing: bool = False
    tokens: int
    prompt: int = 0
    answer: int = 1
    ranks: int = 1
    layered: bool = False  #: do ranks have the weights layer by layer, or all at once?
    reference: float = 0.0  #: bytes of a model that is only read, and shared out
    whole: float = 0.0  #: bytes of models that are whole on every rank: a copy that writes, others that read
    replicas: int = 1
    holes: float = 0.0  #: what the allocator keeps beside, a share of what comes and goes


def layered(size: Sizes, dtype: str, device: Device) -> bool:
    """Is a model too large to come together on every rank for an update? As
    :func:`liubai.learn.sharded.share_out`."""
    return size.parameters * (SIZES[dtype] + FLOAT32) > (
        device.memory * sharded.SHARE if device.gpu else sharded.ROOM
    )


def microbatch(tokens: int, samples: int, answer: int, prompt: int, shared: bool = True) -> int:
    """Tokens of the largest micro-batch of an update: answers that share a prompt are read with it, and no
    others; each alone is read whole, however long."""
    shared = shared and prompt >= SHARED
    most = min(tokens, samples * answer) if shared else tokens
    return max(most, answer if shared else prompt + answer)


def states(size: Sizes, how: Training) -> dict[str, float]:
    """Weights, gradients, masters and moments, of which every rank holds its share; other models are whole on
    each. Alone, weights of 16 bits stand beside the masters of those that are trained; shared out, all of
    them are in 32 bits, and come together in 16 (:mod:`liubai.learn.sharded`)."""
    b, wide = SIZES[how.dtype], max(FLOAT32, SIZES[how.dtype])
    moments = (2 * size.trained - size.by_muon) * SIZES[how.moments]
    held = size.parameters + size.adapters
    if how.ranks == 1:
        weights, masters = b * held, (wide * size.trained if b < wide else 0)
    else:
        weights, masters = wide * held, 0
    shares = {
        "weights": weights,
        "gradients": wide * size.trained,
        "masters": masters,
        "moments": moments,
        "reference": how.reference,
    }
    return {
        **{name: value / how.ranks for name, value in shares.items()},
        "whole models": how.whole,
    }


def activations(config: ModelConfig, dtype: str, lead: float = 0.0) -> tuple[float, float]:
    """Bytes that a layer keeps of a token for its backward pass, and of what comes into it alone. ``lead``
    are the tokens of a prompt whose keys and values are laid before each token's own row, for one of the
    row."""
    D, M = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    if config.crate:
        # x and norm(x) twice, D a₁; the turned and the plain projection, what attention returns; both codes
        kept = 5 * D + 2 * heads * (1 + lead) + heads + 2 * M
    else:
        before_norm = (heads + keys) if config.qk_norm else 0
        kept = 4 * D + before_norm + 2 * heads + 2 * keys * (1 + lead) + 3 * M
    # attention keeps a sum for each head, a norm its scale, in float32
    alone = FLOAT32 * (config.num_attention_heads + 2)
    return SIZES[dtype] * kept + alone, float(SIZES[dtype] * D)


def training(config: ModelConfig, size: Sizes, how: Training) -> dict[str, float]:
    """The parts of the peak of an update. They add up."""
    b, layers = SIZES[how.dtype], config.num_hidden_layers
    tokens = how.tokens
    whole, entering = activations(config, how.dtype, min(3.0, how.prompt / how.answer))
    kept = layers * entering + whole if how.checkpointing else layers * whole
    # the backward pass writes a layer's gradients while its activations are still there
    alive = tokens * (kept + whole + 3 * b * config.hidden_size)
    rows = size.head // config.hidden_size
    logits = min(tokens * rows, max(CHUNK_LOGITS, rows))
    # logits, probabilities and their gradient; the head's own gradient is a sum before it is added
    chunk = 3 * FLOAT32 * logits + FLOAT32 * (0 if size.adapters else size.head)
    gathered = 0.0
    if how.ranks > 1:  # of the whole model, or of two layers on their way and the ends
        at_once = 2 * size.layer + size.ends if how.layered else size.parameters
        gathered = float((at_once + size.adapters) * b + min(at_once, size.trained) * FLOAT32)
    parts = {
        **states(size, how),
        "gathered": gathered,
        "activations": how.replicas * alive,
        "logits": how.replicas * chunk,
        "replicas": float((how.replicas - 1) * FLOAT32 * size.trained),
    }
    moving = parts["activations"] + parts["logits"] + parts["gradients"] + parts["replicas"]
    return {**parts, "holes": how.holes * moving}


def one_after_the_other(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The parts of the peak where several models learn, a policy and its critic: the largest of their
    updates, beside what all of them keep."""
    peak = max(updates, key=lambda parts: sum(size for name, size in parts.items() if name not in KEPT))
    return peak | {name: sum(parts[name] for parts in updates) for name in KEPT}


def replicas(size: Sizes, threads: int) -> int:
    """Copies of a small model on a CPU that work at once; each has gradients of its own."""
    return max(1, min(threads, LARGEST // max(1, size.parameters)))


def kv_bytes(config: ModelConfig, dtype: str) -> int:
    """Of one token in the cache: a key and a value in every layer."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * SIZES[dtype]


def cache_tokens(length: int, engine: str) -> int:
    """Tokens of the cache that an answer takes at its end: vLLM's pages have 16, the bands of the embedded
    engine are powers of two, and half as many rows again are asked for ahead."""
    if engine != "torch":
        return math.ceil(length / 16) * 16
    return 3 * max(NARROWEST, 1 << (length - 1).bit_length()) // 2


def writing(config: ModelConfig, size: Sizes, dtype: str, slots: int, parts: int = 1) -> dict[str, float]:
    """Weights and workspace of an engine on ``parts`` GPUs together, on each of them; the cache has the
    rest."""
    b = SIZES[dtype]
    widest = max(
        config.hidden_size + 2 * config.intermediate_size, 2 * config.num_attention_heads * config.head_dim
    )
    reading = PREFILL_TOKENS * (2 * config.hidden_size + widest) * b
    # logits, probabilities in float32 and their sums in float64
    sampling = slots * config.vocab_size * (b + FLOAT32 + 8)
    return {"weights": b * size.parameters / parts, "workspace": max(reading, sampling) / parts}


def answers_that_fit(room: float, config: ModelConfig, dtype: str, length: int, engine: str) -> int:
    """How many answers of ``length`` tokens, prompt included, the cache holds in ``room`` bytes."""
    return max(0, int(room // (kv_bytes(config, dtype) * cache_tokens(length, engine))))
