"""On-policy distillation: the student writes, and at every token learns what the teacher would have said.

Reverse KL over the whole vocabulary on the student's own answers (GKD, arXiv 2306.13649; MiniLLM, arXiv
2306.08543): a signal at each token where an outcome reward gives one number an answer, and, other than SFT
on the teacher's texts, about the states that the student gets into. R1's own distillation is that SFT: the
kinds ``sample`` and ``sft``. Both models must have the same vocabulary.

``from`` names the student's stage first and the teacher's second; or ``model`` is the student.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from liubai import ranks
from liubai.errors import UserError
from liubai.learn.distil import forward_kl, reverse_kl
from liubai.learn.losses import token_weights
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.replicas import Replicas
from liubai.model.checkpoint import load
from liubai.model.hub import find_folder
from liubai.model.transformer import Transformer, causal
from liubai.stages.context import Context
from liubai.stages.policy import Policy, PolicyConfig
from liubai.stages.supervised import batches_within_memory
from liubai.types import Group


class Config(PolicyConfig):
    #: reverse: be nowhere where the teacher is not; forward: be everywhere where it is
    kl: Literal["reverse", "forward"] = "reverse"
    samples: int = Field(4, gt=0, description="answers a problem")  # they are not compared: one would do

    @field_validator("minibatches")
    @classmethod
    def _one(cls, value: int) -> int:
        if value > 1:
            raise ValueError("must be 1: distill takes one optimizer step for the answers of a step")
        return value


def run(config: Config, context: Context) -> None:
    found = context.given("checkpoint")
    if config.model:
        found.insert(0, find_folder(config.model))
    if len(found) != 2:
        raise UserError(
            f"stage '{context.stage}' needs a student and a teacher: name both stages in 'from', the student "
            "first, or the teacher's stage in 'from' and the student as model"
        )
    teacher, teachers = load(found[1], dtype=config.dtype(), device=config.where())
    with Policy(config, context, begin=found[0]) as policy:
        if teachers.backend.get_vocab() != policy.tokenizer.backend.get_vocab():
            raise UserError(
                "student and teacher have different vocabularies, and cannot be compared token by token; "
                "use a stage of kind sample and one of kind sft instead"
            )
        for step in policy.steps():
            graded = policy.write(step)
            batches, shares = answers_of([g.group for g in graded], policy)
            policy.log(step, graded, learn(policy, Imitation(teacher, config.kl), batches, shares, step))
        policy.save()


def learn(
    policy: Policy, imitation: Imitation, batches: Sequence[Batch], shares: int, step: int
) -> dict[str, float]:
    """One optimizer step; what to log. What is not finite changes nothing."""
    optimizer = policy.optimizer
    losses, halvings = batches_within_memory(
        Replicas(policy.model), imitation.learn, batches, optimizer.zero_grad
    )
    loss = sum(losses)
    if not math.isfinite(loss):
        optimizer.zero_grad()
    norm = optimizer.step(policy.lr_scale(step)) if math.isfinite(loss) else math.nan
    return {
        "loss": loss,
        "grad_norm": norm,
        "updates": 1,
        "skipped": int(not math.isfinite(norm)),
        "update_tokens": sum(int(batch.mask_BT.sum()) for batch in batches),
        **({"halvings": shares + halvings} if halvings else {}),
    }


def answers_of(groups: Sequence[Group], policy: Policy) -> tuple[list[Batch], int]:
    """All answers of a step, each token with its weight in the mean over all tokens; and how often the size
    of a micro-batch was halved so that every rank has some."""
    samples = [s for g in groups for s in g.samples]
    lengths = [len(s.completion_ids) for s in samples]
    weights = token_weights(lengths, "token-mean", policy.config.max_tokens)
    sequences = [
        Sequence1(
            s.prompt_ids + s.completion_ids,
            [False] * len(s.prompt_ids) + [True] * n,
            {"weights": [0.0] * len(s.prompt_ids) + [weight] * n},
        )
        for s, n, weight in zip(samples, lengths, weights, strict=True)
    ]
    tokens, most = sum(len(s.ids) for s in sequences), policy.tokens_per_microbatch
    batches = micro_batches(sequences, policy.tokenizer.pad_id, ranks.portion(tokens, most))
    return batches, ranks.halvings(tokens, most)


class Imitation:
    """The mean KL between student and teacher at the student's tokens, in nats.

    Models of one tokenizer may have unlike numbers of rows for no token, to round the vocabulary up (Qwen2.5:
    151,936 or 152,064): the rows that both have are compared.
    """

    def __init__(self, teacher: Transformer, kl: Literal["reverse", "forward"]) -> None:
        self.teacher, self.kl = teacher, {"reverse": reverse_kl, "forward": forward_kl}[kl]

    def learn(self, model: Transformer, batches: Sequence[Batch]) -> list[float]:
        losses = []
        rows = min(len(model.head_weight), len(self.teacher.head_weight))
        for waiting in batches:
            batch = waiting.to(model.head_weight.device)
            mask_BT = batch.mask_BT
            with torch.no_grad():
                # the student may have written what is a row of its own alone
                known_BT = batch.ids_BT.clamp(max=len(self.teacher.head_weight) - 1)
                theirs_ND = self.teacher.hidden(known_BT, batch.positions_BT, causal())[mask_BT]
            own_ND = model.hidden(batch.ids_BT, batch.positions_BT, causal())[mask_BT]
            kl_N = self.kl(
                own_ND, first(model.head_weight, rows), theirs_ND, first(self.teacher.head_weight, rows)
            )
            loss = (kl_N * batch.values["weights"][mask_BT]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
        return losses


def first(weight_VD: Tensor, rows: int) -> Tensor:
    """Its first rows; itself where these are all."""
    return weight_VD if len(weight_VD) == rows else weight_VD[:rows]
