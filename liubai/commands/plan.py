"""``liubai plan``: what a recipe needs and how fast it may be, before it runs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from liubai.plan.advice import Planner
    from liubai.plan.hardware import Device
    from liubai.plan.reading import Job

GB = 1e9
#: what is said in the place of figures that would be wrong by more than a factor
TOO_SMALL = "too small for these GPUs: fixed costs would decide, which are not foretold"
#: rows of the memory table that say nothing to who has not read the code
ROWS = {
    "replicas": "gradients of each thread's own",
    "holes": "what malloc keeps beside what it was asked for",
}


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What would be run.")],
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="How many GPUs.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100, l40s, 4090, or cpu: this machine, measured now.")
    ] = "h100",
    tokens: Annotated[
        float | None,
        typer.Option(min=1.0, help="Mean length of an answer.", show_default="half of max_tokens"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    staleness: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Updates that writing may run ahead.",
            show_default="max_staleness of the stage, or 1",
        ),
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(
            "--model-config", metavar="FILE", help="The config.json of the models that stages bring."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="STAGE.KEY=VALUE", help="Change one key of the recipe; may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Memory for each GPU, tokens/s of both sides, the bottleneck, and how to share the GPUs out.

    An estimate by rooflines (docs/scale.md says how far off it was where it could be measured).
    """
    from liubai.commands.stopping import under_torchrun
    from liubai.plan.hardware import device as device_of
    from liubai.plan.hardware import known

    name = known(gpu)  # before anything that takes time
    if under_torchrun() and os.environ.get("RANK", "0") != "0":
        return  # nothing here is shared out: the first says it all

    import torch

    from liubai.plan.advice import Planner
    from liubai.plan.reading import jobs
    from liubai.recipe import load_recipe

    asked = load_recipe(recipe, overrides or [])
    found = jobs(asked, given=model_config, tokens=tokens, prompt=prompt)
    threads = asked.threads or torch.get_num_threads()
    device = device_of(name, threads)
    told: dict[str, Any] = {"recipe": asked.name, "gpus": gpus, "device": _device(device), "stages": []}
    for job in found:
        if job.work is None:
            told["stages"].append(_supervised(job, device, gpus, threads))
        else:
            planner = Planner(job, device, gpus, staleness, threads)
            told["stages"].append(_own_answers(job, planner))
    if as_json:
        print(json.dumps(told, ensure_ascii=False))
        return
    print(_words(told))


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "memory": device.memory,
        "flops": device.flops,
        "bandwidth": device.bandwidth,
        "source": device.source,
    }


def _model(job: Job) -> dict[str, Any]:
    return {
        "stage": job.stage,
        "kind": job.kind,
        "architecture": job.model.architecture,
        "parameters": job.size.parameters,
        "trained": job.size.trained,
    }


def _supervised(job: Job, device: Device, gpus: int, threads: int) -> dict[str, Any]:
    """A stage that learns from given examples: its memory, and how fast it reads them. Where the recipe does
    not say how many tokens a step has, it is taken for one of 64 micro-batches on each GPU."""
    from dataclasses import replace

    from liubai.errors import UserError
    from liubai.plan.advice import dtype_of, microbatch_of, told_apart, training_memory
    from liubai.plan.memory import layered
    from liubai.plan.roofline import Model, Work, too_small, update

    room, tokens = device.memory * device.usable, microbatch_of(job, device)
    steps, each = getattr(job.config, "steps", 0), getattr(job.config, "tokens_per_step", 0)
    if each:  # of several ranks each has two micro-batches, at least (liubai.ranks.portion)
        tokens = min(tokens, math.ceil(each / (gpus if gpus == 1 else 2 * gpus)))
    while sum((parts := training_memory(job, device, tokens, gpus, threads)).values()) > room:
        if tokens < 256:
            need, has = told_apart(sum(parts.values()), room)
            raise UserError(
                f"stage '{job.stage}' does not fit: {need} GB on each of {gpus} × {device.name}, and a "
                f'program has {has} GB; set checkpointing = true or optimizer_state = "bfloat16", or take '
                "more GPUs"
            )
        tokens //= 2
    read = each or 64 * tokens * gpus
    # the reference's log-probabilities are computed once, by what is about to learn
    forwards = 1 / getattr(job.config, "epochs", 1) if job.kind == "dpo" else 0.0
    work = Work(
        groups=1, samples=1, prompt=0, tokens=read, longest=read, forwards=forwards,
        checkpointing=job.config.checkpointing, moments=job.config.optimizer_state, microbatch=tokens,
    )  # fmt: skip
    # examples are short beside what is read: their attention is left out
    model = Model(config=job.model, size=job.size, dtype=dtype_of(job, device))
    work = replace(work, layered=layered(job.size, model.dtype, device))
    seconds = update(model, device, work, gpus, context=0)
    found = _model(job) | {
        "memory": {"trainer": parts},
        "microbatch": tokens,
        "tokens/s": {"read": read / sum(seconds.values())},
        "too small": too_small(seconds),
    }
    if steps and each:
        found["hours"] = steps * each / found["tokens/s"]["read"] / 3600
    return found


def _own_answers(job: Job, planner: Planner) -> dict[str, Any]:
    from liubai.plan.advice import AHEAD, bottleneck
    from liubai.plan.roofline import too_small

    work, layouts = planner.work, planner.layouts()
    best = max(layouts, key=lambda layout: layout.rate)
    steps = getattr(job.config, "steps", 0)
    what, helps = bottleneck(best, work)
    return _model(job) | {
        "step": {
            "groups": work.groups, "samples": work.samples, "tokens": work.tokens, "longest": work.longest,
            "prompt": work.prompt,
        },
        "ways": [
            {
                "way": one.way,
                "trainer": one.trainer.gpus,
                "rollout": one.rollout.gpus,
                "gpus of an engine": one.parts,
                "tokens/s": {
                    "written": work.written / one.writing.seconds,
                    "learned": work.written / one.update_seconds,
                    "all": one.rate,
                },
                "seconds": {
                    "writing": one.writing.seconds, "update": one.update_seconds, "transfer": one.transfer,
                    "step": one.step,
                },
                "answers at once": one.writing.rhythm.batch,
                "answers that fit": one.fit,
                "microbatch": one.microbatch,
                "memory": {"trainer": one.trainer.memory, "rollout": one.rollout.memory},
                "writing goes to": one.writing.shares,
                "update goes to": one.update,
                "too small": too_small(one.update),
            }
            for one in layouts
        ],
        "suggested": best.way,
        # None: this way writes nothing ahead
        "staleness": planner.staleness if best.way in AHEAD else None,
        "staleness of the stage": job.config.lead,  # type: ignore[attr-defined]
        "bottleneck": what,
        "would help": helps,
        "hours": steps * best.step / 3600,
    }  # fmt: skip


# words


def _words(told: dict[str, Any]) -> str:
    device = told["device"]
    dtype = max(device["flops"], key=lambda name: device["flops"][name])
    lines = [
        f"{told['recipe']}: {told['gpus']} × {device['name']} ({device['memory'] / GB:,.0f} GB, "
        f"{_big(device['flops'][dtype])}FLOP/s, {_big(device['bandwidth'])}B/s; {device['source']})"
    ]
    for stage in told["stages"]:
        lines += ["", *(_stage(stage) if "ways" in stage else _reader(stage))]
    if device["name"] != "cpu":
        lines += ["", "Estimates by data sheet; nothing of this kind was measured on a GPU (docs/scale.md)."]
    return "\n".join(lines)


def _head(stage: dict[str, Any]) -> str:
    thin = "" if stage["trained"] == stage["parameters"] else f", {_big(stage['trained'])} trained"
    size = f"{_big(stage['parameters'])} parameters{thin}"
    return f"{stage['stage']} ({stage['kind']}): {stage['architecture']}, {size}"


def _reader(stage: dict[str, Any]) -> list[str]:
    hours = f", {_time(stage['hours'] * 3600)} in all" if "hours" in stage else ""
    table = [_head(stage), *_memory({"trainer": stage["memory"]["trainer"]})]
    if stage["too small"]:
        return [*table, f"  {TOO_SMALL}"]
    return [
        *table,
        f"  reads {stage['tokens/s']['read']:,.0f} tokens/s in micro-batches of {stage['microbatch']:,} "
        f"tokens{hours}",
    ]


def _stage(stage: dict[str, Any]) -> list[str]:
    step = stage["step"]
    best = next(way for way in stage["ways"] if way["way"] == stage["suggested"])
    lines = [
        _head(stage),
        f"  a step: {step['groups']:,} problems × {step['samples']} answers of {step['tokens']:,.0f} tokens "
        f"on the mean, {step['longest']:,} at most; prompts of {step['prompt']:,}",
        *_memory(best["memory"]),
        f"  {best['answers that fit']:,} answers of full length fit the cache of an engine"
        + (f" of {best['gpus of an engine']} GPUs" if best["gpus of an engine"] > 1 else "")
        + f"; micro-batches of {best['microbatch']:,} tokens",
        f"  {'':<22}{'GPUs':>11}{'tokens/s written':>18}{'learned':>12}{'all in all':>12}{'a step':>10}",
    ]
    for way in stage["ways"]:
        apart = way["way"].startswith("apart")
        gpus = f"{way['trainer']} + {way['rollout']}" if apart else f"{way['trainer']}"
        speed = way["tokens/s"]
        learned = "–" if way["too small"] else f"{speed['learned']:,.0f}"
        lines.append(
            f"{'*' if way is best else ' '} {way['way']:<22}{gpus:>11}{speed['written']:>18,.0f}"
            f"{learned:>12}{speed['all']:>12,.0f}{_time(way['seconds']['step']):>10}"
        )
    times = f"{_time(stage['hours'] * 3600)} for all steps, new weights take "
    times += _time(best["seconds"]["transfer"])
    return [
        *lines,
        f"  * suggested (trainer + rollout); {TOO_SMALL if best['too small'] else times}",
        *_lead(stage),
        f"  bottleneck: {stage['bottleneck']}",
        f"  what would help: {stage['would help']}",
    ]


def _lead(stage: dict[str, Any]) -> list[str]:
    """How far ahead answers are begun, and what the run needs for it to be so."""
    lead = stage["staleness"]
    if lead is None:
        return []
    line = f"  answers are begun up to {_updates(lead)} ahead"
    if lead != stage["staleness of the stage"]:
        line += f", with max_staleness = {math.ceil(lead)} in the stage"
    return [line]


def _updates(count: float) -> str:
    return f"{count:,.3g} update{'' if count == 1 else 's'}"


def _memory(sides: dict[str, dict[str, float]]) -> list[str]:
    """A table, GB for each GPU; parts that are nothing are left out."""
    names = list(dict.fromkeys(name for parts in sides.values() for name in parts))
    names = [name for name in names if any(parts.get(name, 0) >= 5e-4 * GB for parts in sides.values())]
    rows = [f"  {'GB for each GPU':<22}" + "".join(f"{side:>11}" for side in sides)]
    for name in names:
        rows.append(f"    {name:<20}" + "".join(_cell(parts.get(name, 0)) for parts in sides.values()))
    rows.append(f"    {'all':<20}" + "".join(_cell(sum(parts.values())) for parts in sides.values()))
    return rows + [f"  ({name}: {meaning})" for name, meaning in ROWS.items() if name in names]


def _cell(size: float) -> str:
    if size < 5e-4 * GB:
        return f"{'–':>11}"
    return f"{size / GB:>11.3f}" if size < 0.1 * GB else f"{size / GB:>11.1f}"


def _big(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g} "


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
