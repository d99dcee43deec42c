"""What the ranks beside the first do in a run: wait for it to begin a stage, and run that stage with it.

They read what earlier stages wrote, and write into a folder of their own that goes when the stage ends: the
first rank's files are the run's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from liubai import ranks
from liubai.recipe.recipe import Recipe, StagePlan
from liubai.stages import stage_module
from liubai.stages.context import Context

#: Kinds of stages that all ranks run; others are the first one's alone.
TOGETHER = frozenset(
    ("pretrain", "sft", "reward_model", "process", "dpo", "rl", "ppo", "distill", "sample", "eval")
)


class Mute:
    """A view of nothing."""

    def start(self, stage: str, kind: str, total: int) -> None: ...

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, stage: str, reused: bool) -> None: ...

    def warn(self, message: str) -> None: ...

    def status(self, line: str) -> None: ...


def runs_together(plan: StagePlan) -> bool:
    """Do several ranks run this stage? Answers by several paths are written by one."""
    return plan.kind in TOGETHER and getattr(plan.config, "way", None) is None


def begin(plan: StagePlan, inputs: Mapping[str, Path], mark: str) -> None:
    """The first rank begins a stage that all run."""
    paths = {name: str(folder.absolute()) for name, folder in inputs.items()}
    ranks.tell({"stage": plan.name, "inputs": paths, "fingerprint": mark})


def end(failed: str = "") -> None:
    """There is nothing more to do."""
    ranks.tell({"stage": None, "failed": failed})


def follow(recipe: Recipe) -> None:
    """Until the first rank says that it is done. Raises ``RankLost`` when it has failed."""
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    plans = {plan.name: plan for plan in recipe.stages}
    while (task := ranks.hear())["stage"]:
        plan = plans[task["stage"]]
        inputs = {name: Path(folder) for name, folder in task["inputs"].items()}
        with tempfile.TemporaryDirectory(prefix="liubai-rank-") as scratch:
            folder = Path(scratch) / plan.name
            context = Context(folder, recipe.seed, inputs, Mute(), plan.name, task["fingerprint"])
            stage_module(plan.kind).run(plan.config, context)
            ranks.gather(None)  # until all are through
