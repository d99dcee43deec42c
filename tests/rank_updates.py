"""Jobs that update a model: what is computed on one process and on several, to be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import random_sample, tiny_config, tiny_model
from rank_processes import job
from torch import Tensor

from liubai import ranks
from liubai.learn import sharded
from liubai.learn.losses import LossConfig
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.replicas import Replicas
from liubai.learn.update import UpdateConfig, update
from liubai.model.lora import LoraConfig, attach
from liubai.model.scorer import scorer_from
from liubai.model.transformer import Transformer
from liubai.types import Group, Problem, Reward


def groups(count: int = 4) -> list[Group]:
    """Groups of four answers of 1 to 90 tokens, of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for g in range(count):
        lengths = torch.randint(1, 40, (4,), generator=generator).tolist()
        lengths[g % 4] = 60 + 10 * g
        samples = [random_sample(generator, prompt=3 + 5 * g, completion=n, version=7) for n in lengths]
        samples = [replace(s, prompt_ids=samples[0].prompt_ids) for s in samples]
        totals = torch.randn(4, generator=generator).tolist()
        rewards = tuple(Reward({}, total) for total in totals)
        found.append(Group(Problem("", "", "exact"), tuple(samples), rewards))
    return found


def learned(
    model: Transformer,
    *,
    layered: bool,
    muon_lr: float | None = None,
    steps: int = 2,
    minibatches: int = 2,
    share_from: int = 1,
    **loss: Any,
) -> dict[str, Tensor]:
    """Some updates; what is left of the model, and what there was to log."""
    reference = tiny_model(5, model.config)
    sharded.share_out(model, layered)
    sharded.share_out(reference, layered, learns=False)
    # with this eps a step is nearly proportional to the gradient: rounding stays rounding
    optimizer = Optimizer(model, lr=1e-2, muon_lr=muon_lr, weight_decay=0.1, eps=1.0)
    config = UpdateConfig(
        loss=LossConfig(aggregation="token-mean", **loss),
        advantage="grpo",
        minibatches=minibatches,
        max_tokens=100,
        temperature=0.9,
        tokens_per_microbatch=128,
        share_from=share_from,
    )
    found: dict[str, Tensor] = {}
    for step in range(steps):
        seen = update(model, optimizer, groups(), config, version=step, pad_id=0, reference=reference)
        smaller = config.tokens_per_microbatch >> int(seen.get("halvings", 0))
        config = replace(config, tokens_per_microbatch=smaller)
        found |= {f"log/{step}/{n}": torch.tensor(v, dtype=torch.float64) for n, v in seen.items()}
    return found | of(model, optimizer)


def of(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """All of both, on every rank."""
    sharded.settle(model)
    weights = {f"model/{n}": ranks.whole(p.detach()).clone() for n, p in model.named_parameters()}
    return weights | {f"optimizer/{n}": ranks.whole(t).clone() for n, t in optimizer.state_dict().items()}


@job
def gradient(folder: Path) -> dict[str, Tensor]:
    """One step: the first moments are a tenth of the gradient."""
    return learned(tiny_model(0), layered=False, steps=1, minibatches=1)


@job
def gradient_in_layers(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=True, steps=1, minibatches=1)


@job
def reference(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=False, kl=0.1)


@job
def reference_in_layers(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=True, kl=0.1)


@job
def reference_in_the_reward(folder: Path) -> dict[str, Tensor]:
    """Prompts that would be shared: each rank would make as many passes as it has answers to one."""
    return learned(tiny_model(0), layered=True, kl=0.1, kl_in="reward")


@job
def reference_runs_dry(folder: Path) -> dict[str, Tensor]:
    """Rank 1 alone, and in one process the only one, runs out of memory while the reference reads."""
    with dry(lambda: not torch.is_grad_enabled()):
        return learned(tiny_model(0), layered=False, steps=1, kl=0.1)


@job
def muon(folder: Path) -> dict[str, Tensor]:
    return learned(tiny_model(0), layered=False, muon_lr=1e-2)


@job
def ratios(folder: Path) -> dict[str, Tensor]:
    """Old log-probabilities are read before the first step."""
    model = tiny_model(1, tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True))
    return learned(model, layered=True, importance="truncate", entropy_bonus=0.01)


@job
def lora(folder: Path) -> dict[str, Tensor]:
    model = tiny_model(2)
    attach(model, LoraConfig(rank=3), seed=0)
    model.checkpointing = True
    return learned(model, layered=False)


@job
def crate(folder: Path) -> dict[str, Tensor]:
    config = tiny_config("CrateAlphaForCausalLM", num_key_value_heads=4)
    return learned(tiny_model(3, config), layered=True)


@job
def halves(folder: Path) -> dict[str, Tensor]:
    """Rank 1 alone, and in one process the only one, runs out of memory in the middle of a backward pass."""
    with dry(torch.is_grad_enabled):
        return learned(tiny_model(0), layered=False, steps=1)


@contextmanager
def dry(when: Callable[[], bool]) -> Iterator[None]:
    """Memory runs out once on the last rank, the third time that a model reads ``when`` that is so: in the
    backward pass if there is one."""
    hidden, left = Transformer.hidden, [3]

    def bounded(self: Transformer, ids: Tensor, *args: Any) -> Tensor:
        out = hidden(self, ids, *args)
        if when() and ranks.rank() == ranks.world() - 1 and ids.numel() > 1:
            left[0] -= 1
            if left[0] == 0:
                out.register_hook(_dry) if out.requires_grad else _dry(out)
        return out

    Transformer.hidden = bounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Transformer.hidden = hidden  # type: ignore[method-assign]


def _dry(grad: Tensor) -> Tensor:
    raise RuntimeError("out of memory")


@job
def not_finite(folder: Path) -> dict[str, Tensor]:
    """A gradient that one rank alone sees as not finite changes nothing on any."""
    model = sharded.share_out(tiny_model(0), layered=False)
    optimizer = Optimizer(model, lr=1e-2)

    def work(model: Transformer, items: Sequence[float]) -> list[float]:
        for item in items:
            (model.head_weight.sum() * item).backward()
        return list(items)

    said = Replicas(model).map(work, [1.0, math.nan, 2.0])
    norm = optimizer.step()
    again = Replicas(model).map(work, [1.0, 2.0, 3.0])
    return {
        "norm": torch.tensor([norm, optimizer.step()]),
        "said": torch.tensor(said + again),
        **of(model, optimizer),
    }


@job
def scores(folder: Path) -> dict[str, Tensor]:
    """Three micro-batches of a model that is called as a whole: one rank has more of them."""
    scorer = sharded.share_out(scorer_from(tiny_model(0), seed=1), layered=False)
    optimizer = Optimizer(scorer, lr=1e-2, eps=1.0)
    sequences = [Sequence1(range(2, 2 + n), [True] * n) for n in (9, 7, 5)]

    def work(model: Transformer, items: Sequence[Batch]) -> list[float]:
        found = []
        for batch in items:
            loss = model(batch.ids_BT, batch.positions_BT).square().sum()
            loss.backward()
            found.append(float(loss.detach()))
        return found

    said = []
    for _ in range(2):
        with torch.no_grad():  # all ranks look at all of it, between two updates
            said += [float(scorer(b.ids_BT).sum()) for b in micro_batches(sequences, 0, 1)]
        said += Replicas(scorer).map(work, micro_batches(sequences, 0, 1))
        optimizer.step()
    return {"said": torch.tensor(said), **of(scorer, optimizer)}


@job
def parts(folder: Path) -> dict[str, Tensor]:
    """How many numbers of weights, gradients and moments stay on a rank."""
    model = sharded.share_out(tiny_model(0), layered=True)
    optimizer = Optimizer(model, lr=1e-2)

    def work(model: Transformer, items: Sequence[Batch]) -> list[None]:
        for batch in items:
            model(batch.ids_BT).square().sum().backward()
        return [None] * len(items)

    Replicas(model).map(work, micro_batches([Sequence1(range(2, 9), [True] * 7)], 0, 1))
    parameters = list(model.parameters())
    held = {
        "weights": [ranks.local(p) for p in parameters],
        "gradients": [ranks.local(p.grad) for p in parameters if p.grad is not None],
        "moments": list(optimizer.state.values()),
    }
    return {name: torch.tensor(sum(t.numel() for t in tensors)) for name, tensors in held.items()}


@job
def in_bfloat16(folder: Path) -> dict[str, Tensor]:
    """Sums are in float32 on ranks, too."""
    model = tiny_model(0).to(torch.bfloat16)
    found = learned(model, layered=True, steps=1, minibatches=1)
    return {n: t for n, t in found.items() if n.startswith("optimizer/") and n.endswith("/first")}


@job
def small_steps(folder: Path) -> dict[str, Tensor]:
    """How far ten steps of 1e-6 have moved weights that are computed with in bfloat16; and, on ranks, the
    types of parameters and gradients."""
    model = sharded.share_out(tiny_model(0).to(torch.bfloat16), layered=False)
    optimizer = Optimizer(model, lr=1e-6)
    before = {n: ranks.whole(t).clone() for n, t in optimizer.weights().items()}
    assert {t.dtype for t in before.values()} == {torch.float32}

    def work(model: Transformer, items: Sequence[Batch]) -> list[bool]:
        narrow = []
        for batch in items:
            logits = model(batch.ids_BT)
            narrow.append(logits.dtype == torch.bfloat16 and model.head_weight.dtype == torch.bfloat16)
            logits.float().square().sum().backward()
        return narrow

    sequences = [Sequence1(range(2, 2 + n), [True] * n) for n in (9, 7, 5)]
    for _ in range(10):
        assert all(Replicas(model).map(work, micro_batches(sequences, 0, 1)))
        if ranks.world() > 1:
            kept = [(ranks.local(p).dtype, ranks.local(p.grad).dtype) for p in model.parameters()]  # type: ignore[arg-type]
            assert set(kept) == {(torch.float32, torch.float32)}
        optimizer.step()
    return {n: ranks.whole(t) - before[n] for n, t in optimizer.weights().items()}


@job
def unlike(folder: Path) -> dict[str, Tensor]:
    """The model fits one rank's device alone: all take the way of the others."""
    room, sharded.ROOM = sharded.ROOM, 0 if ranks.rank() else sharded.ROOM
    try:
        return {"layered": torch.tensor(sharded.in_layers(sharded.share_out(tiny_model(0))))}
    finally:
        sharded.ROOM = room
