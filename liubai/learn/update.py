"""One policy update from groups of graded samples: what the loss formulas become in practice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from liubai.errors import Diverged
from liubai.learn.advantages import group_advantages, has_variance
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.losses import LossConfig, LossInputs, grpo_loss, token_weights
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.prompts import SharedPrompts
from liubai.learn.replicas import Replicas
from liubai.model.transformer import Transformer
from liubai.types import Group, Sample

T = TypeVar("T")


class WeightsDisagree(Diverged):
    """Sampler and trainer give the same tokens different log-probabilities: the new weights did not
    reach the engine, or it computes something else. Training on would be a slow collapse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """``minibatches`` optimizer steps over the groups, in order; 1 is strictly on-policy."""

    loss: LossConfig
    normalize_std: bool
    minibatches: int
    max_tokens: int
    temperature: float
    tokens_per_microbatch: int
    #: shorter prompts are read again with every answer: sharing them would cost more than it saves
    share_from: int = 32
    #: mean |Δ log-probability| above which engine and trainer are said to disagree. In float32 they
    #: differ by 1e-6; weights that are one small update old differ by about 1e-2
    tolerance: float = 1e-3


def update(
    model: Transformer,
    optimizer: Optimizer,
    groups: Sequence[Group],
    config: UpdateConfig,
    *,
    version: int,
    pad_id: int,
    lr_scale: float = 1.0,
    reference: Transformer | None = None,
) -> dict[str, float]:
    """Improve ``model`` on ``groups``; returns what to log.

    ``version`` is that of the trainer's weights: samples that it wrote must have the trainer's own
    log-probabilities (raises :class:`WeightsDisagree`). Groups whose rewards are all equal are left
    out before any denominator is computed. A non-finite step changes nothing and is counted.
    """
    rewards_PG = torch.tensor([_totals(g) for g in groups], dtype=torch.float64)
    kept_P = has_variance(rewards_PG)
    metrics = {"zero_variance": 1 - float(kept_P.double().mean())}
    kept = [g for g, keep in zip(groups, kept_P.tolist(), strict=True) if keep]
    if not kept:
        return metrics
    advantages_PG = group_advantages(rewards_PG[kept_P], normalize_std=config.normalize_std)
    pairs_PG = [
        list(zip(group.samples, advantages.tolist(), strict=True))
        for group, advantages in zip(kept, advantages_PG, strict=True)
    ]
    minibatches = [
        lots(sequences([pair for group in part for pair in group], config, version), config, pad_id)
        for part in _split(pairs_PG, config.minibatches)
    ]
    replicas = Replicas(model)
    # the policy that ratios are taken against is the one before the *first* optimizer step
    old = [_all_logprobs(replicas, m, config) for m in minibatches] if config.loss.importance_cap else None
    sums: dict[str, float] = defaultdict(float)
    norms: list[float] = []
    for m, parts in enumerate(minibatches):
        loss = 0.0
        referred = None if reference is None else _all_logprobs(Replicas(reference), parts, config)
        for number, lot in enumerate(parts):
            tasks = [
                _Task(batch, old[m][number][b] if old else None, referred[number][b] if referred else None)
                for b, batch in enumerate(lot.batches)
            ]

            def learn(model: Transformer, tasks: Sequence[_Task], lot: Lot = lot) -> list[dict[str, float]]:
                prompts = SharedPrompts(model, lot.prompts)
                seen = [_backward(model, prompts, task, config) for task in tasks]
                prompts.backward()
                return seen

            for seen in replicas.map(learn, tasks):
                if m == 0:
                    _check_agreement(seen, config.tolerance)
                else:  # the trainer has moved on: its weights no longer wrote anything
                    seen["fresh"] = seen["fresh_gap"] = 0.0
                for name, value in seen.items():
                    sums[name] += value
                loss += seen["loss"]
        if math.isfinite(loss):
            norms.append(optimizer.step(lr_scale))
        else:  # the gradients may look finite all the same: a clamp passes nothing on
            optimizer.zero_grad()
            norms.append(math.nan)
    tokens = max(1.0, sums.pop("tokens"))
    fresh, fresh_gap = sums.pop("fresh"), sums.pop("fresh_gap")
    weight, squared = sums.pop("importance"), sums.pop("importance_squared")
    metrics |= {name: value / tokens for name, value in sums.items() if name != "loss"}
    metrics |= {
        "loss": sums["loss"],
        "logprob_gap/fresh": fresh_gap / max(1.0, fresh),
        "ess": weight**2 / (tokens * squared) if squared else 0.0,
        "grad_norm": sum(norms) / len(norms),
        "updates": len(norms),
        "skipped": sum(norm != norm or norm == float("inf") for norm in norms),
        "update_tokens": tokens,
    }
    return metrics


def _totals(group: Group) -> list[float]:
    """Total rewards; an answer that could not be graded gets its group's mean, so advantage 0.

    Its own total of 0 would beat a wrong answer's −1: the model would learn to break the grader.
    """
    graded = [r.total for r in group.rewards if "error" not in r.parts]
    mean = sum(graded) / len(graded) if graded else 0.0
    return [mean if "error" in r.parts else r.total for r in group.rewards]


def _split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """``parts`` runs of nearly equal size, in order; fewer when there are fewer items."""
    parts = min(parts, len(items))
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def sequences(pairs: Sequence[tuple[Sample, float]], config: UpdateConfig, version: int) -> list[Sequence1]:
    """Samples with their advantages as packable sequences; only completion tokens are learned."""
    lengths = [len(s.completion_ids) for s, _ in pairs]
    weights = token_weights(lengths, config.loss.aggregation, config.max_tokens)
    packed = []
    for (s, advantage), weight, n in zip(pairs, weights, lengths, strict=True):
        blank = [0.0] * len(s.prompt_ids)
        fresh = [float(span.version == version) for span in s.versions for _ in range(span.count)]
        packed.append(
            Sequence1(
                ids=s.prompt_ids + s.completion_ids,
                learn=[False] * len(s.prompt_ids) + [True] * n,
                values={
                    "logprobs": blank + list(s.logprobs),
                    "advantages": blank + [advantage] * n,
                    "weights": blank + [weight] * n,
                    "fresh": blank + fresh,
                },
            )
        )
    return packed


@dataclass(frozen=True, slots=True)
class Lot:
    """Some prompts, and all answers to them in micro-batches that continue these prompts."""

    prompts: list[tuple[int, ...]]
    batches: list[Batch]


def lots(listed: Sequence[Sequence1], config: UpdateConfig, pad_id: int) -> list[Lot]:
    """Cut long prompts off: all but the last token, which predicts the first token of an answer.
    Sequences with nothing to learn are left out."""
    found: list[Lot] = []
    numbers: dict[tuple[int, ...], int] = {}
    answers: list[Sequence1] = []
    room = config.tokens_per_microbatch

    def close() -> None:
        if answers:
            found.append(Lot(list(numbers), micro_batches(answers, pad_id, config.tokens_per_microbatch)))

    for s in listed:
        if True not in s.learn:
            continue
        prompt = tuple(s.ids[: max(0, s.learn.index(True) - 1)])
        if len(prompt) < config.share_from:
            prompt = ()
        if prompt not in numbers and room < len(prompt) and numbers:
            close()
            numbers, answers, room = {}, [], config.tokens_per_microbatch
        if prompt not in numbers:
            numbers[prompt] = len(numbers)
            room -= len(prompt)
        answers.append(s.after(len(prompt), numbers[prompt]))
    close()
    return found


@dataclass(frozen=True, slots=True)
class _Task:
    """A micro-batch, and what other policies say about it where the loss asks."""

    batch: Batch
    old_BT: Tensor | None
    reference_BT: Tensor | None


def _backward(
    model: Transformer, prompts: SharedPrompts, task: _Task, config: UpdateConfig
) -> dict[str, float]:
    batch = task.batch
    logprobs_BT, entropy_BT = batch_logprobs(model, batch, config.temperature, prompts)
    sampler_BT = batch.values["logprobs"]
    loss, sums = grpo_loss(
        LossInputs(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=sampler_BT if task.old_BT is None else task.old_BT,
            sampler_logprobs_BT=sampler_BT,
            advantages_BT=batch.values["advantages"],
            weights_BT=batch.values["weights"],
            mask_BT=batch.mask_BT,
            reference_logprobs_BT=task.reference_BT,
        ),
        config.loss,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    fresh_BT = batch.mask_BT & (batch.values["fresh"] > 0)
    gap_BT = (logprobs_BT.detach() - sampler_BT).abs()
    sums |= {
        "loss": loss.detach(),
        "entropy": entropy_BT.sum(),
        "fresh": fresh_BT.sum(),
        "fresh_gap": gap_BT[fresh_BT].sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def _all_logprobs(replicas: Replicas, parts: Sequence[Lot], config: UpdateConfig) -> list[list[Tensor]]:
    """By lot and micro-batch."""

    def read(model: Transformer, batches: Sequence[Batch], lot: Lot) -> list[Tensor]:
        with torch.no_grad():
            prompts = SharedPrompts(model, lot.prompts)
            return [batch_logprobs(model, batch, config.temperature, prompts)[0] for batch in batches]

    return [replicas.map(partial(read, lot=lot), lot.batches) for lot in parts]


def _check_agreement(seen: dict[str, float], tolerance: float) -> None:
    gap = seen["fresh_gap"] / max(1.0, seen["fresh"])
    if gap > tolerance:
        raise WeightsDisagree(
            f"engine and trainer disagree on tokens that the current weights wrote: mean |Δ log-prob| "
            f"is {gap:.3f} (tolerance {tolerance}); the weights did not reach the engine"
        )
