"""What stages that learn from their own answers share: a model and its engine, questions, rewards, a look
at held-out questions, numbers, resume points.

The loop in which it belongs::

    with Policy(config, context) as policy:
        for step in policy.steps():             # from the last resume point; saves one where it is due
            graded = policy.write(step)
            learned = update(policy.model, policy.optimizer, ...)
            policy.log(step, graded, learned)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from liubai import ranks
from liubai.errors import Diverged, UserError
from liubai.grade import RewardWeights, Verdict
from liubai.grade.language import require_known
from liubai.grade.readable import ReadableConfig
from liubai.learn.optim import Optimizer
from liubai.learn.sharded import load_to_share, share_out
from liubai.measure.readiness import warn_unjudged
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.lora import LoraConfig, attach, merged, save_adapter
from liubai.model.transformer import Transformer
from liubai.problems import FAMILIES, family
from liubai.problems.family import Audited
from liubai.problems.source import source_of
from liubai.rollout.engine import Answerer
from liubai.rollout.engines import EngineConfig
from liubai.seeds import derive
from liubai.stages.config import MAX_SKIPPED, Brought, KindName, Shares, StageConfig, Trained
from liubai.stages.context import WARNINGS, Context
from liubai.stages.evaluate import evaluate
from liubai.stages.rl_metrics import probe_records, rollout_metrics
from liubai.stages.rollouts import PASSAGES, GradedGroup, Rollouts, passage_of, weights_for
from liubai.stages.sampler import Elsewhere, Embedded, Sampler, is_elsewhere
from liubai.stages.scoring import scorers_of
from liubai.stages.supervised import under
from liubai.text.template import require_readable, template_for


class PolicyConfig(Brought, Trained):
    """What is asked, what is rewarded, how much is written, and how fast is learned."""

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
    rewards: RewardWeights = RewardWeights()
    #: other rewards for the problems of single families, or of single verifiers
    rewards_of: dict[KindName, RewardWeights] = {}
    lora: LoraConfig | None = None
    #: who writes the answers: "torch", "vllm", or a table; see liubai/rollout/engines.py
    engine: EngineConfig = EngineConfig()
    slots: int = Field(256, gt=0, description="answers written at once")
    inflight: bool = False
    #: in flight: how many versions old the oldest token of an answer may be; older ones are written again.
    #: Without it none is, and writing is ahead of learning by ``lead`` steps all the same
    max_staleness: int | None = Field(None, ge=0)
    grader_timeout: float = Field(5.0, gt=0, description="seconds a verdict may take")
    #: control: without the blank
    blank: bool = True
    eval_every: int = Field(10, gt=0)
    eval_problems: int = Field(64, gt=0)
    eval_samples: int = Field(4, gt=0)
    probes: int = Field(3, ge=0, description="held-out prompts whose answers are kept at every eval")
    save_every: int = Field(10, gt=0)

    @property
    def lead(self) -> int:
        """Steps that writing is ahead of learning, in flight."""
        return 1 if self.max_staleness is None else self.max_staleness

    def families(self) -> Iterable[str]:
        return self.problems

    def located(self, folder: Path) -> StageConfig:
        return super().located(folder).model_copy(update={"engine": self.engine.located(folder)})

    def require_model(self, stage: str, parents: Sequence[str]) -> None:
        super().require_model(stage, parents)
        self.engine.require(self.lora)

    @model_serializer(mode="wrap")
    def _resolved(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without keys that came later, where they are as usual: what was computed before has the same
        fingerprint."""
        whole: dict[str, Any] = handler(self)
        usual = {"engine": self.engine == EngineConfig(), "max_staleness": self.max_staleness is None}
        return {key: value for key, value in whole.items() if not usual.get(key)}


class Policy:
    """Made at the beginning of a stage. Raises ``UserError`` for what does not fit together."""

    def __init__(self, config: PolicyConfig, context: Context, begin: Path | None = None) -> None:
        """It begins with the checkpoint ``begin``, or with the stage's only one."""
        self.config, self.context = config, context
        self.parent = parent = begin or context.parent_checkpoint(config.model)
        self.model, self.tokenizer = model, tokenizer = load_to_share(
            parent, dtype=config.dtype(), device=config.where()
        )
        model.checkpointing = config.checkpointing
        if config.lora:
            attach(model, config.lora, context.seed)
        self.template = template = template_for(tokenizer, parent, thinking=config.blank)
        share_out(model, device=config.where())
        self.optimizer = Optimizer(
            model, lr=config.lr, max_norm=config.max_norm, betas=(0.9, 0.95), moments=config.moments()
        )
        source = source_of(config.problems, config.questions)
        self.held_out = source.held_out(config.eval_problems)
        require_readable(template, [p.prompt for p in self.held_out])
        prompt = source.longest(lambda text: len(template.prompt_ids(text)))
        longest = config.max_tokens + prompt
        if longest > model.config.max_position_embeddings:
            raise UserError(
                f"max_tokens {config.max_tokens} and prompts of {prompt} tokens do not fit the model's "
                f"{model.config.max_position_embeddings} positions; lower max_tokens"
            )
        self._source = source
        self.tokens_per_microbatch = config.microbatch()
        self._kept: dict[str, tuple[Callable[[], Mapping[str, Tensor]], Callable[[Any], None]]] = {}
        self.keep("model", self.optimizer.weights, self.optimizer.load_weights)
        self.keep("optimizer", self.optimizer.state_dict, self.optimizer.load_state_dict)
        self._tokens, self._skipped = 0, 0
        self._started = self._brought = self._written = 0.0
        weights = [config.rewards, *config.rewards_of.values()]
        if any(w.language for w in weights):
            require_known(source.languages())
        self._require_steps()
        self._require_passages()
        self._scorers = scorers_of(context, weights, config.where())
        with ExitStack() as stack:  # what an engine has opened is closed when something else fails
            self.sampler = self._sampler(stack, longest)
            self._stack = stack.pop_all()

    def _sampler(self, stack: ExitStack, longest: int) -> Sampler:
        """For answers whose prompt and completion are ``longest`` at most."""
        config, context = self.config, self.context
        how: dict[str, Any] = {"eos_ids": self.tokenizer.eos_ids, "slots": config.slots}
        how["max_length"] = longest
        if not is_elsewhere(config.engine, context):
            whole = self._copy(config.where())
            if config.compile:
                whole.compile_decoding()
            return Embedded(self.model, whole, **how)
        return Elsewhere(
            self.model,
            self._copy("cpu") if ranks.is_main() else None,
            config.engine,
            prompts=[self.template.prompt_ids(p.prompt) for p in self.held_out],
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=context.seed,
            stack=stack,
            parent=self.parent,
            folder=context.folder / "weights",
            lora=config.lora,
            cluster=context.cluster,
            inflight=config.inflight,
            max_staleness=config.max_staleness,
            device=config.where(),
            compile=config.compile,
            **how,
        )

    def _copy(self, device: str | torch.device) -> Transformer:
        """The model or, where it is shared out, a copy on ``device`` that is whole."""
        if ranks.world() == 1:
            return self.model
        # of a copy to send, adapters alone will change
        mapped = device == "cpu" and self.config.lora is not None
        whole, _ = load(self.parent, dtype=self.config.dtype(), device=device, mapped=mapped)
        if self.config.lora:
            attach(whole, self.config.lora, self.context.seed)
        return whole

    def _require_steps(self) -> None:
        """A process reward of steps that nobody can check would be 0 for every answer, without a word."""
        c = self.config
        asked = ["questions of a file"] if c.questions else c.problems
        for name in asked:
            weights = c.rewards_of.get(name, c.rewards)
            if weights.process and (c.questions or not isinstance(family(name), Audited)):
                raise UserError(
                    f"rewards.process = {weights.process}: nobody can check the steps of {name}; it is for "
                    f"{', '.join(n for n, f in FAMILIES.items() if isinstance(f, Audited))}"
                )

    def _require_passages(self) -> None:
        """Without a passage an answer is faithful to nothing: said now, and not in the first step."""
        for problem in self.held_out:
            weights = weights_for(problem, self.config.rewards, self.config.rewards_of)
            if weights.faithful and passage_of(problem) is None:
                asked = problem.family or problem.verifier
                raise UserError(
                    f"rewards.faithful = {weights.faithful}, and {asked} has no passages: {PASSAGES}"
                )

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.pool = stack.enter_context(self.context.graders(self.config.grader_timeout))
            self.rollouts = self._rollouts()
            self._stack = stack.pop_all()
        return self

    def _rollouts(self) -> Rollouts:
        config = self.config
        return self.sampler.rollouts(
            self.template,
            lambda index: self._source.train(self.context.seed, index),
            self.pool,
            samples=config.samples,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=self.context.seed,
            weights=config.rewards,
            weights_of=config.rewards_of,
            scorers=self._scorers,
            ahead=groups_ahead(config, None if self.sampler.goes_on else config.slots, self.sampler.shares),
            max_staleness=config.max_staleness,
        )

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def keep(
        self,
        name: str,
        tensors: Callable[[], Mapping[str, Tensor]],
        load: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        """Let resume points hold these tensors, too. They are restored by ``load``, or in place. To be called
        before ``steps``."""
        self._kept[name] = tensors, load or partial(_copy, tensors)

    def steps(self) -> Iterator[int]:
        """The steps that are left. A resume point is made after a step where one is due."""
        config, context = self.config, self.context
        first = 0
        if state := context.restore(self._held()):
            for name, (_, load_) in self._kept.items():
                load_(under(f"{name}/", state.tensors))
            self.rollouts.restore(state.meta["rollouts"])
            first, self._tokens, self._skipped = state.step, state.meta["tokens"], state.meta["skipped"]
            self.tokens_per_microbatch = min(self.tokens_per_microbatch, state.meta["microbatch"])
        if first == 0:
            if self._source.note:
                context.warn(self._source.note)
            context.log(0, config.steps, self.look(0))
        for step in range(first, config.steps):
            yield step
            done = step + 1
            if done % config.save_every == 0 and done < config.steps:
                meta = {
                    "tokens": self._tokens,
                    "skipped": self._skipped,
                    "microbatch": self.tokens_per_microbatch,  # halved sums are other sums
                    "rollouts": self.rollouts.state(),
                }
                context.save(done, self._held(), meta)

    def _held(self) -> dict[str, Tensor]:
        return {f"{name}/{k}": t for name, (made, _) in self._kept.items() for k, t in made().items()}

    def write(
        self, step: int, collect: Callable[[Rollouts], list[GradedGroup]] | None = None
    ) -> list[GradedGroup]:
        """The graded groups of a step, written under the weights of now, which are version ``step``."""
        self._started = time.perf_counter()
        self.rollouts.seconds_grading = 0.0  # what was graded beside an evaluation
        self.sampler.bring(step)
        self._brought = time.perf_counter()
        graded = collect(self.rollouts) if collect else self.rollouts.collect(self.config.groups)
        self._written = time.perf_counter()
        return graded

    def lr_scale(self, step: int) -> float:
        return lr_scale(self.config, step)

    def log(self, step: int, graded: Sequence[GradedGroup], learned: Mapping[str, float]) -> None:
        """Numbers of a step, a look at held-out questions where one is due, and what went wrong in it.
        Raises ``Diverged`` when nothing could be learned several times in a row."""
        ended = time.perf_counter()
        config, context = self.config, self.context
        self._notice(step, learned)
        self._judged(a.verdict for g in graded for a in g.answers)
        metrics = rollout_metrics(graded, version=step)
        self._tokens += int(metrics["step_tokens"])
        metrics |= learned
        metrics |= {
            "lr": config.lr * self.lr_scale(step),
            "tokens": self._tokens,
            "tokens/s": metrics["step_tokens"] / (ended - self._started),
            "seconds/generate": self._written - self._brought - self.rollouts.seconds_grading,
            "seconds/grade": self.rollouts.seconds_grading,
            "seconds/update": ended - self._written,
        }
        if config.max_staleness is not None:
            metrics["stale"] = self.rollouts.stale
        if self.sampler.transfer is not None:
            metrics["seconds/transfer"] = self.sampler.transfer
        if self.sampler.gap is not None:
            metrics["logprob_gap/canary"] = self.sampler.gap
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            metrics |= self.look(done)
        context.log(done, config.steps, metrics)

    def _notice(self, step: int, learned: Mapping[str, float]) -> None:
        if halvings := int(learned.get("halvings", 0)):
            self.tokens_per_microbatch = max(1, self.tokens_per_microbatch >> halvings)
            self.context.warn(
                f"step {step + 1}: memory ran out; micro-batches now have "
                f"{self.tokens_per_microbatch} tokens. Nothing was lost"
            )
        lost, updates = int(learned.get("skipped", 0)), int(learned.get("updates", 0))
        self._skipped = self._skipped + 1 if lost and lost == updates else 0
        if lost:
            self.context.warn(
                f"step {step + 1}: {lost} of {updates} gradients were not finite; those changed nothing"
            )
        if self._skipped >= MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row had no finite gradient; lower lr, or look at the rewards"
            )

    def _judged(self, verdicts: Iterable[Verdict]) -> None:
        warn_unjudged(verdicts, self.context.warn, self.context.folder / WARNINGS)

    def look(self, step: int) -> dict[str, float]:
        """Held-out accuracy after ``step`` steps, and the same few prompts answered again."""
        ask = partial(self._look, step=step)
        return self.sampler.look(step, self.rollouts, ask, last=step == self.config.steps)

    def _look(self, engine: Answerer, step: int) -> dict[str, float]:
        config = self.config
        result = evaluate(
            engine,
            self.template,
            self.held_out,
            samples=config.eval_samples,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=derive(self.context.seed, "look"),
            pool=self.pool,
        )
        self._judged(verdict for row in result.verdicts for verdict in row)
        self.context.samples(step, probe_records(result, config.probes))
        thoughts = result.process(ReadableConfig())
        said = {name: thoughts[name] for name in ("readable", "unsound")}
        return result.as_metrics() | {name: value for name, value in said.items() if value is not None}

    def save(self) -> None:
        """The checkpoint that the stage leaves, and the adapter if it trained one."""
        folder, model = self.context.folder, self.model
        self.optimizer.widen_parameters()
        save_checkpoint(folder / "checkpoint", model, self.tokenizer, self.template.source, merged(model))
        if self.config.lora:
            save_adapter(folder / "adapter", model, self.config.lora, str(self.parent))


def _copy(tensors: Callable[[], Mapping[str, Tensor]], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors().items():
        tensor.copy_(saved[name])


def groups_ahead(config: PolicyConfig, slots: int | None, writers: int = 1) -> int:
    """Groups that each of so many ``writers`` begins beyond those of its step: in flight, those of
    ``config.lead`` steps. What is begun beyond would be too old when its turn comes. With ``slots`` slots
    that stand still during an update, no more than fill them."""
    if not config.inflight or not config.lead:
        return 0
    most = config.groups * config.lead // writers
    return max(1, most if slots is None else min(most, slots // config.samples))


def lr_scale(config: PolicyConfig, step: int) -> float:
    up = min(1.0, (step + 1) / (config.warmup + 1))
    tail = config.decay * config.steps
    return min(up, (config.steps - step) / tail) if tail else up
