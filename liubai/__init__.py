"""Liubai: bring questions and a way to check answers, get a reasoning model.

Importing this costs nothing: names are looked up on first use, so the command line stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liubai.model.checkpoint import load
    from liubai.types import Group, Problem, Reward, Sample, Stop

__version__ = "0.1.0"

__all__ = ["Group", "Problem", "Reward", "Sample", "Stop", "__version__", "load"]

_HOMES = {
    "load": "liubai.model.checkpoint",
    **dict.fromkeys(("Group", "Problem", "Reward", "Sample", "Stop"), "liubai.types"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'liubai' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
