"""The stages: one readable loop each. This file only says where each kind lives."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from liubai.errors import UserError, nearest

#: kind in a recipe -> module with a ``Config`` (a :class:`StageConfig`) and ``run(config, context)``.
#: Modules are imported on use: torch takes seconds, a typing mistake should not.
KINDS = {
    "pretrain": "liubai.stages.pretrain",
    "sft": "liubai.stages.sft",
    "sample": "liubai.stages.sample",
    "rl": "liubai.stages.rl",
    "ppo": "liubai.stages.ppo",
    "reward_model": "liubai.stages.reward_model",
    "process": "liubai.stages.process",
    "dpo": "liubai.stages.dpo",
    "distill": "liubai.stages.distill",
    "eval": "liubai.stages.evaluate",
    "bridge": "liubai.stages.bridge",
    "hallucination": "liubai.stages.hallucination",
    "scaling": "liubai.stages.scaling",
    "attention": "liubai.stages.attention",
    "whitebox": "liubai.stages.whitebox",
    "thinker": "liubai.stages.thinker",
}


def stage_module(kind: str) -> ModuleType:
    """The module of a stage kind. Raises ``UserError`` for an unknown one."""
    if kind not in KINDS:
        raise UserError(f"unknown stage kind '{kind}'; {nearest(kind, KINDS)}")
    return import_module(KINDS[kind])
