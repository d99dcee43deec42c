"""Liubai's side: the loop of ``stages/rl.py`` and the embedded engine, from the real modules."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from bench import world
from bench.job import Job, Result, own_peak_rss
from liubai.grade import GraderPool, RewardWeights
from liubai.learn.losses import LossConfig
from liubai.learn.optim import Optimizer
from liubai.learn.update import UpdateConfig, update
from liubai.model.checkpoint import load
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages import rl
from liubai.stages.rl_metrics import rollout_metrics
from liubai.stages.rollouts import GradedGroup, Rollouts
from liubai.text.template import template_for
from liubai.types import Group, Reward, Stop


def step(job: Job) -> Result:
    """GRPO steps: load, generate, grade, metrics, update. ``knob``: slots, inflight."""
    checkpoint = Path(job.checkpoint)
    model, tokenizer = load(checkpoint)
    sampler, _ = load(checkpoint)
    template = template_for(tokenizer, checkpoint)
    defaults = rl.Config(steps=1)
    slots = job.knob.get("slots", defaults.slots)
    optimizer = Optimizer(model, lr=1e-6, max_norm=1.0)
    engine = TorchEngine(sampler, eos_ids=tokenizer.eos_ids, slots=slots, max_length=job.cap + 512)
    settings = UpdateConfig(
        loss=LossConfig(aggregation="token-mean"),
        advantage="grpo",
        minibatches=1,
        max_tokens=job.cap,
        temperature=1.0,
        tokens_per_microbatch=job.knob.get("tokens_per_microbatch", defaults.tokens_per_microbatch),
    )
    seconds: list[float] = []
    tokens: list[int] = []
    lengths: list[int] = []
    parts = {"generate": 0.0, "update": 0.0}
    zero_variance = staleness = 0.0
    with GraderPool() as pool:
        rollouts = Rollouts(
            engine,
            template,
            world.problem,
            pool,
            samples=job.samples,
            max_tokens=job.cap,
            temperature=1.0,
            seed=job.seed,
            weights=RewardWeights(),
            ahead=max(1, slots // job.samples) if job.knob.get("inflight") else 0,
        )
        for number in range(job.warmup + job.steps):
            started = time.perf_counter()
            engine.load(model.state_dict(), version=number)
            graded = rollouts.collect(job.prompts)
            written = time.perf_counter()
            groups = [_rewarded(g, job.cap) for g in graded]
            learned = update(model, optimizer, groups, settings, version=number, pad_id=tokenizer.pad_id)
            metrics = rollout_metrics(graded, version=number)
            ended = time.perf_counter()
            if number < job.warmup:
                continue
            seconds.append(ended - started)
            parts["generate"] += (written - started) / job.steps
            parts["update"] += (ended - written) / job.steps
            mine = [len(s.completion_ids) for g in groups for s in g.samples]
            tokens.append(sum(mine))
            lengths += mine
            zero_variance = max(zero_variance, learned["zero_variance"])
            staleness = max(staleness, metrics["staleness"])
    return Result(
        seconds=seconds,
        tokens=tokens,
        lengths=lengths,
        prompt_tokens=len(template.prompt_ids(world.problem(0).prompt)),
        peak_rss=own_peak_rss(),
        notes={"zero_variance": zero_variance, "staleness": staleness, "seconds": parts},
    )


def _rewarded(graded: GradedGroup, cap: int) -> Group:
    """The group under the benchmark's reward, from the verdicts that ``Rollouts`` already has."""
    totals = [
        world.total_reward(a.verdict, a.sample.completion_ids, eos=a.sample.stop is Stop.EOS, cap=cap)
        for a in graded.answers
    ]
    return replace(graded.group, rewards=tuple(Reward({"bench": t}, t) for t in totals))


def write(job: Job) -> Result:
    """Generation alone: ``prompts`` requests through ``knob["slots"]`` slots."""
    checkpoint = Path(job.checkpoint)
    model, tokenizer = load(checkpoint)
    template = template_for(tokenizer, checkpoint)
    prompts = world.prompt_ids(template, job.prompts)
    engine = TorchEngine(
        model,
        eos_ids=tokenizer.eos_ids,
        slots=job.knob.get("slots", 256),
        max_length=len(prompts[0]) + job.cap + 8,
    )
    engine.load(model.state_dict(), version=0)

    def requests(count: int, cap: int, repetition: int) -> list[Request]:
        return [
            Request(
                id=i,
                prompt_ids=tuple(ids),
                max_tokens=cap,
                seed=derive(job.seed, "bench", repetition, i),
            )
            for i, ids in enumerate(prompts[:count])
        ]

    for repetition in range(job.warmup):
        generate(engine, requests(min(64, job.prompts), min(16, job.cap), -1 - repetition))
    seconds: list[float] = []
    tokens: list[int] = []
    lengths: list[int] = []
    for repetition in range(job.steps):
        wanted = requests(job.prompts, job.cap, repetition)
        started = time.perf_counter()
        samples = generate(engine, wanted)
        seconds.append(time.perf_counter() - started)
        mine = [len(s.completion_ids) for s in samples]
        tokens.append(sum(mine))
        lengths += mine
    return Result(
        seconds=seconds,
        tokens=tokens,
        lengths=lengths,
        prompt_tokens=len(prompts[0]),
        peak_rss=own_peak_rss(),
    )
