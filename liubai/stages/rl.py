"""R1-Zero: pure reinforcement learning on outcome rewards. No critic, no reward model, no examples.

The loop: take problems, let the engine write a group of answers to each, check the answers, push up
what did better than its group and down what did worse. Which algorithm that is, the config says
(``preset``). Left out on purpose: curricula, replay.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from liubai.errors import Diverged, UserError
from liubai.grade import GraderPool, RewardWeights
from liubai.learn.advantages import Advantage
from liubai.learn.losses import LossConfig
from liubai.learn.optim import Optimizer
from liubai.learn.presets import expand
from liubai.learn.update import UpdateConfig, update
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.lora import LoraConfig, attach, merged, save_adapter, trained
from liubai.model.transformer import Transformer
from liubai.problems.source import source_of
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive, stream
from liubai.stages.config import MAX_SKIPPED, Brought, Shares, Trained
from liubai.stages.context import Context
from liubai.stages.evaluate import evaluate
from liubai.stages.rl_metrics import probe_records, rollout_metrics, shuffle_rewards, varies
from liubai.stages.rollouts import GradedGroup, Rollouts
from liubai.text.template import require_readable, template_for

#: mean |Δ log-probability| that the arithmetic alone explains; stale weights make 0.2 (trl#5312)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class Config(Brought, Trained):
    #: an algorithm by name: defaults for other keys, see liubai/learn/presets.py
    preset: str | None = None
    steps: int = Field(gt=0)
    problems: Shares = {"countdown": 1.0}
    groups: int = Field(32, gt=0, description="problems a step")
    samples: int = Field(16, gt=1, description="answers a problem")
    max_tokens: int = Field(320, gt=0)
    temperature: float = Field(1.0, gt=0)
    lr: float = Field(3e-4, gt=0)
    warmup: int = Field(0, ge=0, description="steps")
    decay: float = Field(0.0, ge=0, le=1, description="share of the steps in which lr falls to 0")
    minibatches: int = Field(1, gt=0)
    max_norm: float = Field(1.0, gt=0)
    loss: LossConfig = LossConfig(aggregation="token-mean")
    advantage: Advantage = "grpo"
    refills: int = Field(
        0, ge=0, description="times a step writes more answers in the place of groups without variance"
    )
    reference_every: int = Field(400, gt=0, description="steps between refreshes of the KL reference")
    rewards: RewardWeights = RewardWeights()
    lora: LoraConfig | None = None
    slots: int = Field(256, gt=0, description="answers written at once")
    inflight: bool = False
    grader_timeout: float = Field(5.0, gt=0, description="seconds a verdict may take")
    #: controls: without the blank, and with the rewards of each group dealt out at random
    blank: bool = True
    shuffle_rewards: bool = False
    eval_every: int = Field(10, gt=0)
    eval_problems: int = Field(64, gt=0)
    eval_samples: int = Field(4, gt=0)
    probes: int = Field(3, ge=0, description="held-out prompts whose answers are kept at every eval")
    save_every: int = Field(10, gt=0)

    def families(self) -> Iterable[str]:
        return self.problems

    @classmethod
    def filled(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return expand(raw)


def run(config: Config, context: Context) -> None:
    parent = context.parent_checkpoint(config.model)
    model, tokenizer = load(parent, dtype=config.dtype(), device=config.where())
    model.checkpointing = config.checkpointing
    if config.lora:
        attach(model, config.lora, context.seed)
    template = template_for(tokenizer, parent, thinking=config.blank)
    if config.compile:
        model.compile_decoding()
    optimizer = Optimizer(
        model, lr=config.lr, max_norm=config.max_norm, betas=(0.9, 0.95), moments=config.moments()
    )
    source = source_of(config.problems, config.questions)
    if source.note:
        context.warn(source.note)
    held_out = source.held_out(config.eval_problems)
    require_readable(template, [p.prompt for p in held_out])
    prompt = source.longest(lambda text: len(template.prompt_ids(text)))
    longest = config.max_tokens + prompt
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"max_tokens {config.max_tokens} and prompts of {prompt} tokens do not fit the model's "
            f"{model.config.max_position_embeddings} positions; lower max_tokens"
        )
    # the trainer's own weights: one copy in memory, and nothing that could fail to arrive
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=config.slots, max_length=longest)
    settings = UpdateConfig(
        loss=config.loss,
        advantage=config.advantage,
        minibatches=config.minibatches,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        tokens_per_microbatch=config.microbatch(),
        tolerance=TOLERANCE[config.dtype()],
    )
    with GraderPool(timeout_s=config.grader_timeout) as pool:
        rollouts = Rollouts(
            engine,
            template,
            lambda index: source.train(context.seed, index),
            pool,
            samples=config.samples,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=context.seed,
            weights=config.rewards,
            ahead=max(1, config.slots // config.samples) if config.inflight else 0,
        )
        first, tokens, skipped = 0, 0, 0
        reference = load(parent, dtype=config.dtype(), device=config.where())[0] if config.loss.kl else None
        if state := context.restore():
            _restore(trained(model), "model/", state.tensors)
            optimizer.load_state_dict({n: state.tensors[f"optimizer/{n}"] for n in optimizer.state_dict()})
            if reference:
                _restore(reference.state_dict(), "reference/", state.tensors)
            rollouts.restore(state.meta["rollouts"])
            first, tokens, skipped = state.step, state.meta["tokens"], state.meta["skipped"]

        # an engine of its own around the same weights: the rollouts in flight are not disturbed
        evaluator = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=config.slots, max_length=longest)
        evaluator.load(model.state_dict(), version=0)

        def look(step: int) -> dict[str, float]:
            """Held-out accuracy, and the same few prompts answered again."""
            result = evaluate(
                evaluator,
                template,
                held_out,
                samples=config.eval_samples,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=derive(context.seed, "look"),
                pool=pool,
            )
            context.samples(step, probe_records(result, config.probes))
            return result.as_metrics()

        if first == 0:
            context.log(0, config.steps, look(0))
        for step in range(first, config.steps):
            started = time.perf_counter()
            engine.load(model.state_dict(), version=step)
            graded = collect(rollouts, config)
            written = time.perf_counter()
            groups = [g.group for g in graded]
            if config.shuffle_rewards:
                groups = shuffle_rewards(groups, stream(context.seed, "shuffle", step))
            if reference and step % config.reference_every == 0:
                reference.load_state_dict(merged(model))
            scale = lr_scale(config, step)
            learned = update(
                model,
                optimizer,
                groups,
                settings,
                version=step,
                pad_id=tokenizer.pad_id,
                lr_scale=scale,
                reference=reference,
            )
            ended = time.perf_counter()
            if halvings := int(learned.get("halvings", 0)):
                fits = max(1, settings.tokens_per_microbatch >> halvings)
                settings = replace(settings, tokens_per_microbatch=fits)
                context.warn(
                    f"step {step + 1}: memory ran out; micro-batches now have {fits} tokens. Nothing was lost"
                )
            lost, updates = int(learned.get("skipped", 0)), int(learned.get("updates", 0))
            skipped = skipped + 1 if lost and lost == updates else 0
            if lost:
                context.warn(
                    f"step {step + 1}: {lost} of {updates} gradients were not finite; those changed nothing"
                )
            if skipped >= MAX_SKIPPED:
                raise Diverged(
                    f"{MAX_SKIPPED} steps in a row had no finite gradient; lower lr, or look at the rewards"
                )
            metrics = rollout_metrics(graded, version=step)
            tokens += int(metrics["step_tokens"])
            metrics |= learned
            metrics |= {
                "lr": config.lr * scale,
                "tokens": tokens,
                "tokens/s": metrics["step_tokens"] / (ended - started),
                "seconds/generate": written - started - rollouts.seconds_grading,
                "seconds/grade": rollouts.seconds_grading,
                "seconds/update": ended - written,
            }
            rollouts.seconds_grading = 0.0
            done = step + 1
            if done % config.eval_every == 0 or done == config.steps:
                metrics |= look(done)
            context.log(done, config.steps, metrics)
            if done % config.save_every == 0 and done < config.steps:
                context.save(
                    done,
                    _tensors(model, optimizer, reference),
                    {"tokens": tokens, "skipped": skipped, "rollouts": rollouts.state()},
                )
    optimizer.widen_parameters()
    save_checkpoint(context.folder / "checkpoint", model, tokenizer, template.source, merged(model))
    if config.lora:
        save_adapter(context.folder / "adapter", model, config.lora, str(parent))


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


def lr_scale(config: Config, step: int) -> float:
    up = min(1.0, (step + 1) / (config.warmup + 1))
    tail = config.decay * config.steps
    return min(up, (config.steps - step) / tail) if tail else up


def _tensors(model: Transformer, optimizer: Optimizer, reference: Transformer | None) -> dict[str, Any]:
    tensors = {f"model/{n}": t for n, t in trained(model).items()}
    tensors |= {f"optimizer/{n}": t for n, t in optimizer.state_dict().items()}
    if reference:
        tensors |= {f"reference/{n}": t for n, t in reference.state_dict().items()}
    return tensors


def _restore(into: dict[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(tensors[prefix + name])
