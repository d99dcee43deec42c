"""What decides a stage's result, as hashes: is what a folder holds what is asked for now?

Left out on purpose: what the runner does about it (:mod:`liubai.recipe.runner`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

#: Keys that say where a stage computes and how much at once; of ``engine``, where it is and what is put up
#: with. They move the last bits, and in flight which answers end first, but a half-done stage can go on with
#: others: where memory or a server was not enough, they are what a message says to change. A key that is not
#: here begins it again, which is safe.
PLACE = frozenset(("tokens_per_microbatch", "checkpointing", "slots", "device", "compile", "grader_timeout"))
ENGINE_PLACE = frozenset(("url", "folder", "address", "timeout", "gpu_memory_utilization", "bound"))


class Mark(NamedTuple):
    """``fingerprint``: of all that decides a stage's result to the last bit. ``settings``: of all but where
    it is computed and how much at once."""

    fingerprint: str
    settings: str


def mark_of(what: Mapping[str, Any]) -> Mark:
    """Of all that decides a stage's result, as JSON values; ``what["config"]`` is its resolved config."""
    config = {key: value for key, value in what["config"].items() if key not in PLACE}
    if engine := config.get("engine"):
        config["engine"] = {key: value for key, value in engine.items() if key not in ENGINE_PLACE}
    return Mark(_hash(what), _hash({**what, "config": config}))


def _hash(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
