"""The peers' side: TRL's ``GRPOTrainer`` and ``transformers.generate``, in float32 on the CPU.

TRL's defaults that would slow it down or change the task are set explicitly: bf16 autocast off (it
is on by default), gradient checkpointing off, no logging, no saving, nothing reported anywhere.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from bench import world
from bench.job import Job, Result, own_peak_rss
from liubai.model.checkpoint import load
from liubai.text.template import Template, template_for


class _Clock(TrainerCallback):
    """Wall time from the end of one optimizer step to the end of the next: nothing is left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def step(job: Job) -> Result:
    """GRPO steps of ``GRPOTrainer``. ``knob``: micro (answers a micro-batch), continuous, cache."""
    model, tokenizer, template = _load(job.checkpoint)
    eos, prefilled = tokenizer.eos_token_id, template.prefilled
    total = job.warmup + job.steps
    answers = job.prompts * job.samples
    micro = job.knob.get("micro", min(64, answers))
    lengths: list[list[int]] = []
    equal_groups = 0

    def rewards(
        completion_ids: Sequence[Sequence[int]], completions: Sequence[str], number: Sequence[int], **_: Any
    ) -> list[float]:
        nonlocal equal_groups
        lengths.append([len(ids) for ids in completion_ids])
        totals = [
            world.total_reward(world.judge(n, text, prefilled), ids, eos=ids[-1] == eos, cap=job.cap)
            for n, text, ids in zip(number, completions, completion_ids, strict=True)
        ]
        groups = [totals[i : i + job.samples] for i in range(0, answers, job.samples)]
        equal_groups += sum(max(g) - min(g) < 1e-6 for g in groups)
        return totals

    problems = range(total * job.prompts)
    texts = [template.render(world.problem(i).prompt) for i in problems]
    _check_prompts(tokenizer, template, texts)
    clock = _Clock()
    continuous: dict[str, Any] = {}
    if job.knob.get("continuous"):
        continuous = {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": job.knob["continuous"],
        }
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                fp16=False,
                gradient_checkpointing=False,
                max_steps=total,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=answers // micro,
                num_generations=job.samples,
                max_completion_length=job.cap,
                cache_implementation=job.knob.get("cache"),
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                beta=0.0,
                num_iterations=1,
                epsilon=0.2,
                epsilon_high=0.28,
                loss_type="dapo",
                scale_rewards="group",
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                shuffle_dataset=False,
                seed=job.seed + 1,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                **continuous,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts, "number": list(problems)}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        torch.set_num_threads(job.threads)
        trainer.train()
    dtypes = {str(p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {"torch.float32"}, dtypes
    assert len(lengths) == total, "one generation a step"
    assert len(clock.ends) == total + 1, "one update a step"
    spent = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    counted = lengths[job.warmup :]
    return Result(
        seconds=spent[job.warmup :],
        tokens=[sum(mine) for mine in counted],
        lengths=[n for mine in counted for n in mine],
        prompt_tokens=len(template.prompt_ids(world.problem(0).prompt)),
        peak_rss=own_peak_rss(),
        notes={"zero_variance": equal_groups / (total * job.prompts), "threads": torch.get_num_threads()},
    )


def write(job: Job) -> Result:
    """Generation alone, in batches of ``knob["batch"]`` prompts, or continuously batched."""
    model, tokenizer, template = _load(job.checkpoint)
    model.eval()
    prompts = world.prompt_ids(template, job.prompts)
    _check_prompts(tokenizer, template, [template.render(world.problem(0).prompt)])
    batch = job.knob.get("batch", 256)

    def config(cap: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=cap,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            cache_implementation=job.knob.get("cache"),
            disable_compile=True,
        )

    def answer(count: int, cap: int) -> list[int]:
        if job.knob.get("continuous"):
            from transformers.generation.configuration_utils import ContinuousBatchingConfig

            outputs = model.generate_batch(
                prompts[:count],
                generation_config=config(cap),
                continuous_batching_config=ContinuousBatchingConfig(**job.knob["continuous"]),
                progress_bar=False,
            )
            assert len(outputs) == count, "continuous batching lost requests"
            return [len(output.generated_tokens) for output in outputs.values()]
        lengths: list[int] = []
        for i in range(0, count, batch):
            ids_BT = torch.tensor(prompts[i : min(i + batch, count)])
            out_BT = model.generate(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config(cap)
            )
            lengths += _lengths(out_BT[:, ids_BT.shape[1] :], tokenizer.eos_token_id)
        return lengths

    torch.manual_seed(job.seed)
    with torch.no_grad():
        for _ in range(job.warmup):
            answer(min(64, job.prompts), min(16, job.cap))
        seconds: list[float] = []
        per_repetition: list[list[int]] = []
        for _ in range(job.steps):
            started = time.perf_counter()
            per_repetition.append(answer(job.prompts, job.cap))
            seconds.append(time.perf_counter() - started)
    return Result(
        seconds=seconds,
        tokens=[sum(mine) for mine in per_repetition],
        lengths=[n for mine in per_repetition for n in mine],
        prompt_tokens=len(prompts[0]),
        peak_rss=own_peak_rss(),
    )


def _load(checkpoint: str) -> tuple[Any, Any, Template]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    _, own = load(checkpoint)
    return model, tokenizer, template_for(own, Path(checkpoint))


def _check_prompts(tokenizer: Any, template: Template, texts: Sequence[str]) -> None:
    """Both sides must read the same ids."""
    theirs = tokenizer(text=list(texts))["input_ids"]
    if theirs != [template.tokenizer.encode(text) for text in texts]:
        raise AssertionError("transformers reads the prompts as other ids than Liubai")


def _lengths(ids_BT: torch.Tensor, eos: int) -> list[int]:
    """Real tokens of each row: up to and with the first end token."""
    ended_BT = (ids_BT == eos).cumsum(1)
    return ((ended_BT == 0).sum(1) + (ended_BT[:, -1] > 0)).tolist()
