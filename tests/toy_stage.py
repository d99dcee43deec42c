"""A stage without torch, for the tests of the runner: it logs, saves and writes a checkpoint.

``python toy_stage.py RECIPE OUT`` runs a recipe of toy stages in a process that can be killed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

import liubai.files
import liubai.stages
from liubai.files import atomic_folder
from liubai.recipe import load_recipe
from liubai.recipe import run as run_recipe
from liubai.seeds import stream
from liubai.stages.config import StageConfig
from liubai.stages.context import Context
from liubai.stages.view import PlainView


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(8, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Config(StageConfig):
    steps: int = Field(gt=0)
    save_every: int = Field(3, gt=0)
    pause: float = Field(0.0, ge=0, description="seconds a step")
    share: float = Field(0.5, ge=0, le=1)
    mode: Literal["plain", "fancy"] = "plain"
    note: str | None = None
    flag: bool = False
    shape: Shape = Shape()
    weights: dict[str, float] = Field({"countdown": 1.0})


def run(config: Config, context: Context) -> None:
    start = sum(
        json.loads((f / "checkpoint" / "weights.json").read_text())[-1] for f in context.inputs.values()
    )
    values: list[float] = []
    first = 0
    if state := context.restore():
        values, first = state.meta["values"], state.step
    for step in range(first, config.steps):
        time.sleep(config.pause)
        values.append(start + config.share + stream(context.seed, "toy", step).random())
        loss = math.nan if step % 4 == 1 else 1 / (step + 1)
        context.log(step + 1, config.steps, {"accuracy": values[-1], "loss": loss})
        context.samples(step + 1, [{"text": f"答案 {values[-1]}"}, {"text": "\n"}])
        if step % 5 == 2:
            context.warn(f"step {step + 1} is a third one")
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            context.save(step + 1, {}, {"values": values})
    with atomic_folder(context.folder / "checkpoint") as new:
        (new / "weights.json").write_text(json.dumps(values))


def register(kinds: dict[str, str]) -> None:
    kinds["toy"] = "toy_stage"


def without_tensorboard() -> None:
    """Its import takes most of a second, and kills are tested by the dozen."""
    Context._tensorboard = lambda self, step, metrics: None  # type: ignore[method-assign]


def kill_at_call(number: int) -> None:
    """SIGKILL this process when it is about to make its ``number``-th change to the disk."""
    count = 0

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "truncate"):
        setattr(os, name, counting(getattr(os, name)))
    liubai.files.append = counting(liubai.files.append)  # type: ignore[assignment]


if __name__ == "__main__":
    register(liubai.stages.KINDS)
    without_tensorboard()
    recipe = load_recipe(Path(sys.argv[1]))
    print("ready", flush=True)
    with PlainView() as view:
        run_recipe(recipe, Path(sys.argv[2]), view)
