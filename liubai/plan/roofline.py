"""How fast it may be: each part of the work takes as long as its arithmetic or its memory traffic, whichever
is longer (the roofline model, Williams et al. 2009), and the parts add up.

Training and the reading of prompts are arithmetic. A decoding step reads all weights once, for however many
answers, and the keys and values of each: it is memory traffic until the batch is large. What is left out:
grading, and the time that a network needs beside its bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from liubai.model.config import ModelConfig
from liubai.plan.hardware import SIZES, Device
from liubai.plan.memory import Sizes, activations, kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step of a stage that learns from its own answers. ``tokens`` is an answer's mean length. ``forwards``
    are more readings of every token beside learning, for old log-probabilities; models that are ``frozen``
    read each once."""

    groups: int
    samples: int
    prompt: int
    tokens: float
    longest: int
    forwards: float = 0.0
    frozen: tuple[Model, ...] = ()
    epochs: int = 1  #: times that is learned from each token
    alone: bool = False  #: does every answer bring its own prompt, or all of a group one?
    checkpointing: bool = False
    moments: str = "float32"
    microbatch: int = 65536
    layered: bool = False  #: of several ranks: see :mod:`liubai.learn.sharded`

    @property
    def answers(self) -> int:
        return self.groups * self.samples

    @property
    def written(self) -> float:
        """Tokens of all answers."""
        return self.answers * self.tokens

    @property
    def context(self) -> float:
        """Tokens that a new one looks back at, on the mean over an answer's life."""
        return self.prompt + self.tokens / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a roofline asks of a model: its shape, counts, and the type that it is computed in."""

    config: ModelConfig
    size: Sizes
    dtype: str

    @property
    def bytes(self) -> float:
        return float(SIZES[self.dtype] * self.size.parameters)

    @property
    def read_bytes(self) -> float:
        """Of the weights that a decoding step meets; of an embedding that is not the head, only a few
        rows."""
        return float(SIZES[self.dtype] * (self.size.inner + self.size.head))

    def attention(self, context: float) -> float:
        """Operations of one token that looks back at ``context`` others, in all layers."""
        c = self.config
        return 4.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context


#: the parts of a decoding step
PARTS = ("weights", "arithmetic", "keys and values", "sampling", "fixed cost")


def decoding(model: Model, device: Device, batch: float, context: float, parts: int = 1) -> dict[str, float]:
    """Seconds of one step of an engine on ``parts`` devices, by what they go to: every answer of ``batch``
    gets a token. Where a device reads weights while it multiplies, the longer of both is counted."""
    speed = device.speed(model.dtype) * device.reading * parts
    stream = device.bandwidth * device.streaming * parts
    reads = model.read_bytes / stream
    products = 2 * (model.size.inner + model.size.head) * batch / speed
    looks = batch * context * kv_bytes(model.config, model.dtype) / stream
    compares = batch * model.attention(context) / speed
    layers = model.config.num_hidden_layers
    fixed = device.step_seconds + layers * device.layer_seconds
    if parts > 1:  # two sums over the devices in each layer
        fixed += (
            2
            * layers
            * (device.hop_seconds + batch * model.config.hidden_size * SIZES[model.dtype] / device.link)
        )
    return {
        "weights": reads if reads >= products or not device.overlaps else 0.0,
        "arithmetic": products if products > reads or not device.overlaps else 0.0,
        "keys and values": max(looks, compares),
        # logits are written, and read for the softmax, its sum and the choice
        "sampling": 4 * 4 * batch * model.config.vocab_size / (device.bandwidth * device.streaming),
        "fixed cost": fixed,
    }


def prefill(model: Model, device: Device, tokens: float, parts: int = 1) -> float:
    """Seconds to read a prompt of so many tokens."""
    operations = tokens * (2 * model.size.inner + model.attention(tokens / 2))
    return operations / (device.speed(model.dtype) * device.reading * parts)


def step_seconds(model: Model, device: Device, work: Work, batch: float, parts: int = 1) -> float:
    """Of a decoding step, and of reading the prompts of those that begin in the place of those that end."""
    begins = batch / work.tokens / work.samples  # a group's prompt is read once
    return sum(decoding(model, device, batch, work.context, parts).values()) + begins * prefill(
        model, device, work.prompt, parts
    )


class Rhythm(NamedTuple):
    """Answers at once in each engine, on the mean and at ``most``; ``steps`` of decoding, of which ``full``
    would do if no engine ever waited for the longest answer."""

    batch: float
    most: float
    steps: float
    full: float


@dataclass(frozen=True, slots=True)
class Writing:
    """``seconds`` of a step's answers, or of as many where they are written without end; where they go to, by
    ``shares``."""

    rhythm: Rhythm
    seconds: float
    shares: dict[str, float]


def at_once(model: Model, device: Device, work: Work, engines: int, slots: int, parts: int = 1) -> Writing:
    """The answers of one step, and nothing else to write meanwhile: at the end the engines wait for the
    longest answer, with less and less in their batches."""
    each = math.ceil(work.answers / engines)
    slots = min(slots, each)
    # full batches until the last answers begin, and the longest of those to its end
    steps = work.tokens * (each / slots - 1) + max(work.longest, work.tokens)
    batch = each * work.tokens / steps
    return _writing(model, device, work, Rhythm(batch, slots, steps, each * work.tokens / slots), parts)


def without_end(
    model: Model,
    device: Device,
    work: Work,
    engines: int,
    slots: int,
    parts: int = 1,
    ahead: float = math.inf,
) -> Writing:
    """Who ends makes room for who begins. ``ahead``: how many answers may be under way in all engines."""
    batch = max(1.0, min(slots, ahead / engines))
    steps = work.written / engines / batch
    return _writing(model, device, work, Rhythm(batch, batch, steps, steps), parts)


def _writing(model: Model, device: Device, work: Work, rhythm: Rhythm, parts: int) -> Writing:
    batch, _, steps, _ = rhythm
    spent = decoding(model, device, batch, work.context, parts)
    whole = step_seconds(model, device, work, batch, parts)
    spent["prompts"] = whole - sum(spent.values())
    return Writing(rhythm, steps * whole, {name: part / whole for name, part in spent.items()})


def update(
    model: Model, device: Device, work: Work, ranks: int = 1, context: float | None = None
) -> dict[str, float]:
    """Seconds of learning from a step's answers on ``ranks`` devices: arithmetic, the
    exchange of parts, and the optimizer's walk over memory. ``context``: how far back a token looks."""
    size = model.size
    # layer by layer, a prompt is read with each of its answers
    prompts = work.answers if work.layered or work.alone else work.groups
    read = work.written + prompts * work.prompt
    back = work.context if context is None else context
    share, again = min(1.0, size.trained / size.parameters), 1 if work.checkpointing else 0
    # forward, backward into the activations, and into what is trained; checkpointing goes forward once more
    inner = 2 * size.inner * (work.epochs * (2 + share + again) + work.forwards) * read
    # the head's logits are computed again in the backward pass, chunk by chunk
    head = 2 * size.head * (work.epochs * (3 + share) + work.forwards) * work.written
    looks = model.attention(back) * (work.epochs * (3 + again) + work.forwards) * work.written
    seconds = (inner + head + looks) / device.speed(model.dtype)
    for other in work.frozen:
        once = 2 * other.size.inner * read + (2 * other.size.head + other.attention(back)) * work.written
        seconds += once / device.speed(other.dtype)
    arithmetic = seconds / device.training / ranks
    kept = activations(model.config, model.dtype)[0] * model.config.num_hidden_layers * read
    walks = device.walks * (4 / 3 if work.checkpointing else 1) * work.epochs
    stream = device.bandwidth * device.streaming
    exchange = 0.0
    if ranks > 1:
        # once an update; or layer by layer, weights twice a micro-batch, and gradients, in float32
        rounds = math.ceil(read / ranks / work.microbatch) if work.layered else 1
        weights = (2 if work.layered else 1) * SIZES[model.dtype] * size.parameters
        moved = rounds * (weights + 4 * size.trained) * (ranks - 1) / ranks
        exchange = work.epochs * moved / device.between(ranks)
    # what is computed is started by Python, which may be slower than the device; a pass forward is a third
    passes = work.epochs * (3 + again) + work.forwards
    rounds = math.ceil(read / ranks / work.microbatch)
    launches = rounds * passes / 3 * model.config.num_hidden_layers * device.launch_seconds
    moments = 2 * SIZES[work.moments]
    walked = work.epochs * 2 * size.trained * (2 * 4 + moments) / ranks
    return {
        "arithmetic": arithmetic,
        "launches": max(0.0, launches - arithmetic),
        "activations": walks * kept / stream / ranks,
        # layer by layer it goes on behind the arithmetic, as far as that reaches
        "exchange": max(0.0, exchange - arithmetic) if work.layered else exchange,
        "optimizer": walked / stream,
    }


def too_small(update: dict[str, float]) -> bool:
    """Is a device idle for most of an :func:`update`, until it is told what to do? How long that takes
    depends on what is not known here."""
    return update["launches"] > update["arithmetic"]


def transfer(model: Model, device: Device, devices: int) -> float:
    """Seconds until all engines have new weights: one sender, a chain or tree behind it that is kept full."""
    return model.bytes / device.between(devices)
