"""R1-Zero: reinforcement learning on groups of answers. No critic, no examples; rewards by rule and, where
a stage before has learned them, by models.

The loop: take problems, let the engine write a group of answers to each, judge the answers, push up
what did better than its group and down what did worse. Which algorithm that is, the config says
(``preset``). Left out on purpose: curricula beside that of several stages, replay.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from liubai.learn.advantages import Advantage
from liubai.learn.losses import LossConfig
from liubai.learn.presets import expand
from liubai.learn.sharded import bring, in_layers, load_to_share, share_out
from liubai.learn.update import UpdateConfig, update
from liubai.model.lora import merged
from liubai.seeds import stream
from liubai.stages.context import Context
from liubai.stages.policy import Policy, PolicyConfig
from liubai.stages.rl_metrics import shuffle_rewards, varies
from liubai.stages.rollouts import GradedGroup, Rollouts


class Config(PolicyConfig):
    #: an algorithm by name: defaults for other keys, see liubai/learn/presets.py
    preset: str | None = None
    loss: LossConfig = LossConfig(aggregation="token-mean")
    advantage: Advantage = "grpo"
    refills: int = Field(
        0, ge=0, description="times a step writes more answers in the place of groups without variance"
    )
    reference_every: int = Field(400, gt=0, description="steps between refreshes of the KL reference")
    #: control: the rewards of each group dealt out at random
    shuffle_rewards: bool = False

    @classmethod
    def filled(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return expand(raw)


def run(config: Config, context: Context) -> None:
    with Policy(config, context) as policy:
        reference = None
        if config.loss.kl:
            reference, _ = load_to_share(policy.parent, dtype=config.dtype(), device=config.where())
            share_out(reference, in_layers(policy.model), device=config.where(), learns=False)
            policy.keep("reference", reference.state_dict)
        for step in policy.steps():
            graded = policy.write(step, lambda rollouts: collect(rollouts, config))
            groups = [g.group for g in graded]
            if config.shuffle_rewards:
                groups = shuffle_rewards(groups, stream(context.seed, "shuffle", step))
            if reference and step % config.reference_every == 0:
                bring(merged(policy.model), reference, config.dtype())
            learned = update(
                policy.model,
                policy.optimizer,
                groups,
                settings(config, policy),
                version=step,
                pad_id=policy.tokenizer.pad_id,
                lr_scale=policy.lr_scale(step),
                reference=reference,
            )
            policy.log(step, graded, learned)
        policy.save()


def settings(config: Config, policy: Policy) -> UpdateConfig:
    return UpdateConfig(
        loss=config.loss,
        advantage=config.advantage,
        minibatches=config.minibatches,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        tokens_per_microbatch=policy.tokens_per_microbatch,
        tolerance=config.engine.tolerance(config.dtype()),
    )


def collect(rollouts: Rollouts, config: Config) -> list[GradedGroup]:
    """The groups of a step. Dynamic sampling (DAPO, arXiv 2503.14476): groups whose answers all earned the
    same teach nothing, so others are written in their place, ``refills`` times at most — of problems that
    are all solved, no number of them would do."""
    graded = rollouts.collect(config.groups)
    for _ in range(config.refills):
        missing = config.groups - sum(varies(g.group) for g in graded)
        if not missing:
            break
        graded += rollouts.collect(missing)
    return graded
