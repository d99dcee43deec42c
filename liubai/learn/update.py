"""One policy update from groups of graded samples: what the loss formulas become in practice."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from liubai import ranks
from liubai.errors import Diverged
from liubai.learn.advantages import Advantage, advantages, chosen, teaches
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.losses import KL, LossConfig, LossInputs, policy_loss, token_weights
from liubai.learn.memory import Lot, map_within_memory
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.prompts import SharedPrompt
from liubai.learn.replicas import Replicas
from liubai.learn.sharded import in_layers
from liubai.model.transformer import Transformer
from liubai.types import Group, Sample

T = TypeVar("T")
#: an answer and the advantage of each of its tokens
Judged = tuple[Sample, Sequence[float]]
CPU = torch.device("cpu")


class WeightsDisagree(Diverged):
    """Sampler and trainer give the same tokens different log-probabilities: the new weights did not
    reach the engine, or it computes something else. Training on would be a slow collapse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """``minibatches`` optimizer steps over the groups, in order; 1 is strictly on-policy."""

    loss: LossConfig
    advantage: Advantage
    minibatches: int
    max_tokens: int
    temperature: float
    tokens_per_microbatch: int
    #: shorter prompts are read again with every answer: sharing them would cost more than it saves
    share_from: int = 32
    #: mean |Δ log-probability| above which engine and trainer are said to disagree. In float32 they
    #: differ by 1e-6, in bfloat16 by about 1e-2; so do weights that are one small update old
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
    out before any denominator is computed. A non-finite step changes nothing and is counted. Where
    memory runs out, micro-batches are halved until they fit; ``halvings`` says how often
    ``tokens_per_microbatch`` has to be halved to be no more than what fitted.
    """
    config = _in_passes(config, model)
    readers = Replicas(reference) if reference is not None else None
    rewards_PG = torch.tensor([_totals(g) for g in groups], dtype=torch.float64)
    errors_PG = rewards_PG.isnan()
    # what the answers earned decides whether they teach: a KL differs always
    kept_P = teaches(_filled(rewards_PG), config.advantage)
    metrics: dict[str, float] = {}
    if readers and config.loss.kl_in == "reward":
        kl_PG, halvings = reference_kl(readers, groups, config, pad_id)
        rewards_PG -= config.loss.kl * kl_PG
        metrics["reward/kl"] = -config.loss.kl * float(kl_PG.mean())
        if halvings:
            metrics["halvings"] = halvings
    metrics["zero_variance"] = 1 - float(kept_P.double().mean())
    kept = [g for g, keep in zip(groups, kept_P.tolist(), strict=True) if keep]
    if not kept:
        return metrics
    lengths_PG = torch.tensor([[len(s.completion_ids) for s in g.samples] for g in kept])
    errors_PG = errors_PG[kept_P]
    advantages_PG = advantages(
        _filled(rewards_PG[kept_P]), config.advantage, lengths_PG.masked_fill(errors_PG, 0)
    ).masked_fill(errors_PG, 0)
    judged = [
        [
            (sample, [advantage] * len(sample.completion_ids))
            for sample, advantage in zip(g.samples, row, strict=True)
        ]
        for g, row in zip(kept, advantages_PG.tolist(), strict=True)
    ]
    learned = improve(
        model, optimizer, judged, config, version=version, pad_id=pad_id, lr_scale=lr_scale, readers=readers
    )
    if "halvings" in metrics:
        learned["halvings"] = max(metrics["halvings"], learned.get("halvings", 0))
    return metrics | learned


def improve(
    model: Transformer,
    optimizer: Optimizer,
    judged: Sequence[Sequence[Judged]],
    config: UpdateConfig,
    *,
    version: int,
    pad_id: int,
    lr_scale: float = 1.0,
    readers: Replicas | None = None,
) -> dict[str, float]:
    """The optimizer steps on groups of answers whose tokens have their advantages; returns what to log.
    ``readers`` are the KL's reference."""
    config = _in_passes(config, model)
    listed = [
        sequences([pair for group in part for pair in group], config, version)
        for part in _split(judged, config.minibatches)
    ]
    minibatches = [lots(part, config, pad_id) for part in listed]
    metrics: dict[str, float] = {}
    replicas = Replicas(model)
    halved = [0] * len(minibatches)  # for memory; what was halved once stays so

    def read(readers: Replicas, name: str) -> list[list[Lot]]:
        found = []
        for m, parts in enumerate(minibatches):
            known, more = map_within_memory(readers, partial(_add_logprobs, name, config), parts)
            found.append(known)
            halved[m] += more
        return found

    # the policy that ratios are taken against is the one before the *first* optimizer step
    if config.loss.importance != "none" or config.loss.top_entropy < 1:
        minibatches = read(replicas, "old")
    if config.loss.top_entropy < 1:
        minibatches = _choose(minibatches, config.loss.top_entropy)
    if readers and config.loss.kl_in == "loss":
        minibatches = read(readers, "reference")
    sums: dict[str, float] = defaultdict(float)
    norms: list[float] = []
    for m, parts in enumerate(minibatches):
        loss = 0.0
        found, more = map_within_memory(replicas, partial(_learn, config), parts, optimizer.zero_grad)
        halved[m] += more
        for seen in found:
            if m == 0:
                if seen["fresh_gap"] > config.tolerance * max(1.0, seen["fresh"]):
                    optimizer.zero_grad()
                    raise WeightsDisagree(_disagreement(seen, config))
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
    finite = [norm for norm in norms if math.isfinite(norm)]
    tokens = max(1.0, sums.pop("tokens", 0.0))
    fresh, fresh_gap = sums.pop("fresh", 0.0), sums.pop("fresh_gap", 0.0)
    weight, squared = sums.pop("importance", 0.0), sums.pop("importance_squared", 0.0)
    shares = [ranks.halvings(_tokens(part), config.tokens_per_microbatch) for part in listed]
    halvings = max((a + b for a, b in zip(shares, halved, strict=True) if b), default=0)
    metrics |= {name: value / tokens for name, value in sums.items() if name != "loss"}
    metrics |= {
        "loss": sums["loss"],
        "logprob_gap/fresh": fresh_gap / max(1.0, fresh),
        "ess": weight**2 / (tokens * squared) if squared else 0.0,
        "grad_norm": sum(finite) / len(finite) if finite else math.nan,
        "updates": len(norms),
        "skipped": len(norms) - len(finite),
        "update_tokens": tokens,
        **({"halvings": halvings} if halvings else {}),
    }
    return metrics


def _in_passes(config: UpdateConfig, model: Transformer) -> UpdateConfig:
    """Of a model in layers all ranks make the same passes, one for each micro-batch: no prompt is shared. Its
    reference is in layers, too."""
    return replace(config, share_from=sys.maxsize) if in_layers(model) else config


def _totals(group: Group) -> list[float]:
    """Total rewards; NaN for an answer that could not be graded. It teaches nothing: its own total of 0
    would beat a wrong answer's −1, and the model would learn to break the grader."""
    return [math.nan if "error" in r.parts else r.total for r in group.rewards]


def _filled(rewards_PG: Tensor) -> Tensor:
    """With the group's mean in the place of NaN, 0 where there is nothing else."""
    mean_P1 = rewards_PG.nanmean(dim=1, keepdim=True)
    return torch.where(rewards_PG.isnan(), mean_P1, rewards_PG).nan_to_num(0.0)


def _split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """``parts`` runs of nearly equal size, in order; fewer when there are fewer items."""
    parts = min(parts, len(items))
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def sequences(pairs: Sequence[Judged], config: UpdateConfig, version: int) -> list[Sequence1]:
    """Samples with their tokens' advantages as packable sequences; only completion tokens are learned."""
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
                    "advantages": blank + list(advantage),
                    "weights": blank + [weight] * n,
                    "fresh": blank + fresh,
                },
            )
        )
    return packed


def lots(listed: Sequence[Sequence1], config: UpdateConfig, pad_id: int) -> list[Lot]:
    """Cut long prompts off: all but the last token, which predicts the first token of an answer.
    Sequences with nothing to learn are left out."""
    tokens = ranks.portion(_tokens(listed), config.tokens_per_microbatch)
    answers: dict[tuple[int, ...], list[Sequence1]] = defaultdict(list)
    for s in listed:
        if True in s.learn:
            shared = max(0, s.learn.index(True) - 1)
            shared = shared if shared >= config.share_from else 0
            answers[tuple(s.ids[:shared])].append(s.after(shared))
    found = []
    for prompt, continued in answers.items():
        batches = micro_batches(continued, pad_id, tokens)
        found += [Lot(prompt, batches)] if prompt else [Lot((), [batch]) for batch in batches]
    return found


def _tokens(listed: Sequence[Sequence1]) -> int:
    return sum(len(s.ids) for s in listed)


def read_lot(model: Transformer, lot: Lot, config: UpdateConfig) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Each micro-batch, where the model is, with its log-probabilities and entropies; what has gone back from
    them by the end goes on into the prompt."""
    prompt = SharedPrompt(model, lot.prompt) if lot.prompt else None
    for waiting in lot.batches:
        batch = waiting.to(model.head_weight.device)
        attend = prompt.attend if prompt else None
        yield (
            batch,
            *batch_logprobs(
                model, batch, config.temperature, attend, entropy_learns=config.loss.entropy_bonus > 0
            ),
        )
    if prompt:
        prompt.backward()


def _learn(config: UpdateConfig, model: Transformer, parts: Sequence[Lot]) -> list[dict[str, float]]:
    """The gradient of some lots; what there is to log, summed over each."""
    found = []
    for lot in parts:
        lot_sums: dict[str, float] = defaultdict(float)
        for batch, logprobs_BT, entropy_BT in read_lot(model, lot, config):
            loss, sums = _loss(batch, logprobs_BT, entropy_BT, config)
            loss.backward()  # type: ignore[no-untyped-call]
            sums |= {"loss": loss.detach(), "entropy": entropy_BT.detach().sum()}
            for name, value in sums.items():
                lot_sums[name] += float(value)
        found.append(lot_sums)
    return found


def _loss(
    batch: Batch, logprobs_BT: Tensor, entropy_BT: Tensor, config: UpdateConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    sampler_BT = batch.values["logprobs"]
    loss, sums = policy_loss(
        LossInputs(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=batch.values.get("old", sampler_BT),
            sampler_logprobs_BT=sampler_BT,
            advantages_BT=batch.values["advantages"],
            weights_BT=batch.values["weights"],
            mask_BT=batch.mask_BT,
            reference_logprobs_BT=batch.values.get("reference"),
            entropy_BT=entropy_BT,
            chosen_BT=batch.values.get("chosen"),
            sequences_BT=batch.attention_documents,
        ),
        config.loss,
    )
    fresh_BT = batch.mask_BT & (batch.values["fresh"] > 0)
    gap_BT = (logprobs_BT.detach() - sampler_BT).abs()
    return loss, sums | {"fresh": fresh_BT.sum(), "fresh_gap": gap_BT[fresh_BT].sum()}


@torch.no_grad()
def _add_logprobs(name: str, config: UpdateConfig, model: Transformer, parts: Sequence[Lot]) -> list[Lot]:
    """The same lots, whose batches also know what ``model`` says: values ``name``, ``name/entropy``."""
    return [
        Lot(
            lot.prompt,
            [
                replace(b, values={**b.values, name: lp, f"{name}/entropy": entropy}).to(CPU)
                for b, lp, entropy in read_lot(model, lot, config)
            ],
        )
        for lot in parts
    ]


def _choose(minibatches: list[list[Lot]], share: float) -> list[list[Lot]]:
    """The same, whose batches mark the most uncertain ``share`` of the whole update's tokens."""
    every = [b for lots_ in minibatches for lot in lots_ for b in lot.batches]
    least = chosen(torch.cat([b.values["old/entropy"][b.mask_BT] for b in every]), share)

    def marked(b: Batch) -> Batch:
        return replace(b, values={**b.values, "chosen": (b.values["old/entropy"] >= least).float()})

    return [[Lot(lot.prompt, [marked(b) for b in lot.batches]) for lot in lots_] for lots_ in minibatches]


def reference_kl(
    readers: Replicas, groups: Sequence[Group], config: UpdateConfig, pad_id: int
) -> tuple[Tensor, int]:
    """Each answer's KL to the reference, ``[P, G]`` float64 in nats: the sum of the estimator over its
    tokens, from the log-probabilities at which it was sampled. For ``kl_in = "reward"``. And the halvings of
    micro-batches, as :func:`update` counts them."""
    samples = [s for g in groups for s in g.samples]
    listed = []
    for number, s in enumerate(samples):
        blank, n = [0.0] * len(s.prompt_ids), len(s.completion_ids)
        values: dict[str, Sequence[float]] = {
            "logprobs": blank + list(s.logprobs),
            "sample": blank + [float(number)] * n,
        }
        listed.append(Sequence1(s.prompt_ids + s.completion_ids, [False] * len(blank) + [True] * n, values))
    kl_N = torch.zeros(len(samples), dtype=torch.float64)
    listed_lots = lots(listed, config, pad_id)
    known, halved = map_within_memory(readers, partial(_add_logprobs, "reference", config), listed_lots)
    for lot in known:
        for b in lot.batches:
            kl_BT = KL[config.loss.kl_estimator](b.values["logprobs"], b.values["reference"])
            kl_N.index_add_(0, b.values["sample"][b.mask_BT].long(), kl_BT[b.mask_BT].double())
    share = ranks.halvings(_tokens(listed), config.tokens_per_microbatch)
    return kl_N.view(len(groups), -1), share + halved if halved else 0


def _disagreement(seen: dict[str, float], config: UpdateConfig) -> str:
    return (
        "engine and trainer disagree on tokens that the current weights wrote: mean |Δ log-prob| is "
        f"{seen['fresh_gap'] / seen['fresh']:.3f} (tolerance {config.tolerance}); the weights did not "
        "reach the engine"
    )
