"""What both sides share: the checkpoint, the prompts, the reward. Each side gets the same of each.

The model is untrained, so its answers are random words, and their lengths are ours to choose: one
coordinate of the hidden state is (nearly) the same everywhere, and the end token's embedding row
reads only that coordinate. The end token so has nearly the same probability at every position —
lengths are geometric, cut off at the cap — and neither side needs a logits processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from liubai.grade import GradeItem, RewardWeights, Verdict, grade, reward
from liubai.model.checkpoint import save_checkpoint
from liubai.model.config import ModelConfig
from liubai.model.transformer import Transformer, build, causal
from liubai.problems import family, problem_at, world_vocabulary
from liubai.seeds import derive
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import word_level
from liubai.types import Problem

SEED = 20250120
#: The coordinate of the residual stream that only the end token reads, and its value.
MARK, MARK_VALUE = 0, 0.05
NEVER = -30.0  #: an end-token logit so low that no answer ends by itself


def problem(index: int) -> Problem:
    return problem_at(family("countdown"), "train", SEED, index)


def make_checkpoint(folder: Path, mean: float | None, cap: int) -> float:
    """Write a model whose answers have ``mean`` tokens under ``cap`` (None: they never end).

    Returns the end token's probability per token.
    """
    tokenizer = word_level(world_vocabulary())
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model = build(config, derive(SEED, "init"))
    hazard = 0.0 if mean is None else hazard_for(mean, cap)
    with torch.no_grad():
        _open_residuals(model)
        rows = model.embed_tokens.weight
        rows[:, MARK] = MARK_VALUE
        rows[tokenizer.eos_id] = 0.0
        rows[tokenizer.eos_id, MARK] = _end_weight(model, tokenizer.eos_id, hazard) if hazard else NEVER
    save_checkpoint(folder, model, tokenizer, BARE)
    return hazard


def hazard_for(mean: float, cap: int) -> float:
    """p such that a geometric length cut off at ``cap`` has this mean: (1 − (1 − p)^cap) / p."""
    if not 1 < mean < cap:
        raise ValueError(f"a mean length of {mean} cannot be had under a cap of {cap}")
    return _bisect(lambda p: (1 - (1 - p) ** cap) / p, mean, 1e-9, 1.0)


def _open_residuals(model: Transformer) -> None:
    """A fresh model's blocks add nothing yet; a trained one's do, everywhere but to the mark."""
    generator = torch.Generator().manual_seed(derive(SEED, "residuals"))
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.normal_(0.0, 0.02 * p.shape[1] ** -0.5, generator=generator)
            p[MARK] = 0.0


def _end_weight(model: Transformer, eos: int, hazard: float) -> float:
    """The end row's weight on the mark that gives the mean probability ``hazard`` on random text."""
    generator = torch.Generator().manual_seed(derive(SEED, "calibrate"))
    ids_BT = torch.randint(eos + 1, model.config.vocab_size, (32, 64), generator=generator)
    positions_BT = torch.arange(64).expand_as(ids_BT)
    hidden_BTD = model.hidden(ids_BT, positions_BT, causal())
    logits = model.head(hidden_BTD)
    logits[..., eos] = -math.inf
    rest_BT: Tensor = logits.double().logsumexp(-1)
    mark_BT = hidden_BTD[..., MARK].double()
    return _bisect(
        lambda weight: float(torch.sigmoid(weight * mark_BT - rest_BT).mean()), hazard, -50.0, 50.0
    )


def _bisect(f: Callable[[float], float], target: float, low: float, high: float) -> float:
    """x in [low, high] with f(x) = target, for a monotonic f."""
    rising = f(high) > f(low)
    for _ in range(100):
        middle = (low + high) / 2
        if (f(middle) < target) == rising:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def total_reward(verdict: Verdict, ids: Sequence[int], *, eos: bool, cap: int) -> float:
    """The rule reward of ``liubai zero``, plus the share of even token ids.

    The second part gives (practically) every group variance, so that no side saves work by dropping
    groups in which all rewards are equal.
    """
    judged = reward(
        verdict,
        formatted=eos and verdict.parts["format"] > 0,
        tokens=len(ids),
        cap=cap,
        truncated=not eos,
        weights=RewardWeights(),
    )
    return judged.total + sum(i % 2 == 0 for i in ids) / len(ids)


def judge(index: int, response: str, prefilled: str) -> Verdict:
    """Liubai's own countdown verifier, for the side that does not call it by itself."""
    p = problem(index)
    return grade(GradeItem(p.verifier, p.gold, response, {**p.meta, "prefilled": prefilled}))


def prompt_ids(template: Template, count: int) -> list[list[int]]:
    return [template.prompt_ids(problem(i).prompt) for i in range(count)]
