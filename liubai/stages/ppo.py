"""PPO with a critic: what GRPO replaced (arXiv 1707.06347; R1 compares the two, arXiv 2501.12948v2, fig. 3).

A second model says at every token what it expects the answer to earn; generalised advantage estimation
(arXiv 1506.02438) turns reward and expectations into an advantage for each token. With λ = γ = 1 that is
what the answer earned less what was expected, the form that works for rewards at the end. Left out on
purpose: a KL to the reference inside the reward, which works as a hidden length penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, field_validator

from liubai import ranks
from liubai.errors import Diverged
from liubai.learn.critic import explained_variance, gae, value_loss, whiten_tokens
from liubai.learn.losses import LossConfig, token_weights
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.learn.replicas import Replicas
from liubai.learn.sharded import load_to_share, share_out
from liubai.learn.update import Judged, UpdateConfig, improve
from liubai.model.scorer import Scorer, scorer_from
from liubai.model.transformer import Transformer
from liubai.seeds import derive
from liubai.stages.config import MAX_SKIPPED
from liubai.stages.context import Context
from liubai.stages.policy import Policy, PolicyConfig
from liubai.stages.supervised import batches_within_memory
from liubai.types import Group


class Config(PolicyConfig):
    loss: LossConfig = LossConfig(aggregation="token-mean", clip_low=0.2, clip_high=0.2)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(1.0, ge=0, le=1, description="λ of GAE; 0.95 does far worse with rewards at the end")
    critic_lr: float = Field(1e-3, gt=0)
    critic_epochs: int = Field(1, gt=0, description="times the critic reads the answers of a step")
    critic_warmup: int = Field(2, ge=0, description="steps in which the critic alone learns")
    #: acts from the second of ``critic_epochs`` on: in the first, no value has moved yet
    value_clip: float = Field(0.5, ge=0, description="a value moves by no more in a step; 0: no bound")

    @field_validator("loss")
    @classmethod
    def _without_reference(cls, loss: LossConfig) -> LossConfig:
        if loss.kl > 0:
            raise ValueError("kl must be 0: ppo has no reference model; use kind rl for a KL penalty")
        return loss


def run(config: Config, context: Context) -> None:
    with Policy(config, context) as policy:
        critic = Critic(config, policy, derive(context.seed, "critic"))
        for step in policy.steps():
            graded = policy.write(step)
            groups = [g.group for g in graded]
            judged, expected = critic.judge(groups)
            learned = critic.learn(expected, policy.lr_scale(step))
            if judged and step >= config.critic_warmup:
                halvings = learned.get("halvings", 0)
                learned |= improve(
                    policy.model,
                    policy.optimizer,
                    judged,
                    settings(config, policy),
                    version=step,
                    pad_id=policy.tokenizer.pad_id,
                    lr_scale=policy.lr_scale(step),
                )
                if halvings := max(halvings, learned.get("halvings", 0)):
                    learned["halvings"] = halvings
            policy.log(step, graded, learned)
        policy.save()


def settings(config: Config, policy: Policy) -> UpdateConfig:
    return UpdateConfig(
        loss=config.loss,
        advantage="grpo",  # not used: the critic gives the advantages
        minibatches=config.minibatches,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        tokens_per_microbatch=policy.tokens_per_microbatch,
        tolerance=config.engine.tolerance(config.dtype()),
    )


class Critic:
    """The value model and its optimizer; both are part of the stage's resume points. Its micro-batches are
    as large as the policy's."""

    def __init__(self, config: Config, policy: Policy, seed: int) -> None:
        self.config, self.policy, self.pad_id = config, policy, policy.tokenizer.pad_id
        trunk, _ = load_to_share(policy.parent, dtype=config.dtype(), device=config.where())
        self.scorer = scorer_from(trunk, seed)
        self.scorer.checkpointing = config.checkpointing
        with torch.no_grad():
            self.scorer.score.weight.zero_()  # nothing is expected of anything, at first
        share_out(self.scorer, device=config.where())
        self.optimizer = Optimizer(
            self.scorer,
            lr=config.critic_lr,
            max_norm=config.max_norm,
            betas=(0.9, 0.95),
            moments=config.moments(),
        )
        self.shares = self.halvings = 0  # of this step's micro-batches: for all ranks' work, for memory
        self.skipped = torch.zeros((), dtype=torch.long)  # steps in a row that were not finite
        policy.keep("critic", self.optimizer.weights, self.optimizer.load_weights)
        policy.keep("critic_optimizer", self.optimizer.state_dict, self.optimizer.load_state_dict)
        policy.keep("critic_skipped", lambda: {"steps": self.skipped})

    def judge(self, groups: Sequence[Group]) -> tuple[list[list[Judged]], list[Batch]]:
        """Each answer with the advantages of its tokens, mean 0 and standard deviation 1 over all; and
        batches with the values ``old``, ``returns`` and ``weights`` for the critic to learn from. Answers
        that could not be graded are left out; of these alone there is nothing to learn."""
        self.halvings = 0
        listed = [
            (g, i)
            for g, group in enumerate(groups)
            for i, reward in enumerate(group.rewards)
            if "error" not in reward.parts
        ]
        if not listed:
            return [], []
        lengths = [len(groups[g].samples[i].completion_ids) for g, i in listed]
        weights = token_weights(lengths, "token-mean", self.config.max_tokens)
        sequences = []
        for number, ((g, i), n, weight) in enumerate(zip(listed, lengths, weights, strict=True)):
            sample, blank = groups[g].samples[i], len(groups[g].samples[i].prompt_ids)
            earned = [0.0] * (n - 1) + [groups[g].rewards[i].total]
            values = {"reward": earned, "weights": [weight] * n, "number": [float(number)] * n}
            sequences.append(
                Sequence1(
                    sample.prompt_ids + sample.completion_ids,
                    [False] * blank + [True] * n,
                    {name: [0.0] * blank + row for name, row in values.items()},
                )
            )
        tokens, most = sum(len(s.ids) for s in sequences), self.policy.tokens_per_microbatch
        batches = micro_batches(sequences, self.pad_id, ranks.portion(tokens, most))
        self.shares = ranks.halvings(tokens, most)
        batches, self.halvings = batches_within_memory(Replicas(self.scorer), self._expect, batches)
        flat_N = torch.cat([b.values["advantages"][b.mask_BT] for b in batches])
        white_N = whiten_tokens(flat_N[None], torch.ones(1, len(flat_N), dtype=torch.bool))[0]
        found: dict[int, list[float]] = {}
        at = 0
        for b in batches:
            for row, mask in zip(b.values["number"], b.mask_BT, strict=True):
                n = int(mask.sum())
                found[int(row[mask][0])] = white_N[at : at + n].tolist()
                at += n
        judged: list[list[Judged]] = [[] for _ in groups]
        for number, (g, i) in enumerate(listed):
            judged[g].append((groups[g].samples[i], found[number]))
        return [group for group in judged if group], batches

    @torch.no_grad()
    def _expect(self, model: Transformer, batches: Sequence[Batch]) -> list[Batch]:
        found = []
        for batch in batches:
            on = batch.to(model.head_weight.device)
            values_BT = torch.where(on.mask_BT, model(on.ids_BT, on.positions_BT).float(), 0.0).cpu()
            advantages_BT, returns_BT = gae(
                batch.values["reward"], values_BT, batch.mask_BT, self.config.gamma, self.config.lam
            )
            more = {"old": values_BT, "advantages": advantages_BT, "returns": returns_BT}
            found.append(replace(batch, values=batch.values | more))
        return found

    def learn(self, batches: Sequence[Batch], scale: float) -> dict[str, float]:
        """Fit the values to the returns; what to log. What is not finite changes nothing. Raises ``Diverged``
        when that happened in ``MAX_SKIPPED`` steps in a row."""
        if not batches:
            return {}
        replicas = Replicas(self.scorer)
        loss = norm = 0.0
        halvings = 0
        for _ in range(self.config.critic_epochs):
            losses, more = batches_within_memory(replicas, self._backward, batches, self.optimizer.zero_grad)
            halvings = max(halvings, more)
            loss = sum(losses)
            if not math.isfinite(loss):
                self.optimizer.zero_grad()
            norm = self.optimizer.step(scale) if math.isfinite(loss) else math.nan
            if not math.isfinite(norm):
                break
        self._notice(norm)
        halvings += self.halvings
        old_N, returns_N = (
            torch.cat([b.values[name][b.mask_BT] for b in batches]) for name in ("old", "returns")
        )
        return {
            "critic/loss": loss,
            "critic/grad_norm": norm,
            "critic/explained": explained_variance(old_N, returns_N),
            "critic/value": float(old_N.mean()),
            **({"halvings": self.shares + halvings} if halvings else {}),
        }

    def _notice(self, norm: float) -> None:
        if math.isfinite(norm):
            self.skipped.zero_()
            return
        self.skipped += 1
        self.policy.context.warn("the critic's loss or gradient was not finite; its step changed nothing")
        if self.skipped >= MAX_SKIPPED:
            raise Diverged(
                f"the critic had {MAX_SKIPPED} steps in a row that were not finite; lower critic_lr"
            )

    def _backward(self, model: Transformer, batches: Sequence[Batch]) -> list[float]:
        assert isinstance(model, Scorer)
        losses = []
        for waiting in batches:
            b = waiting.to(model.head_weight.device)
            values_BT = model(b.ids_BT, b.positions_BT).float()
            v = b.values
            loss, _ = value_loss(
                values_BT, v["old"], v["returns"], v["weights"], b.mask_BT, self.config.value_clip
            )
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
        return losses
