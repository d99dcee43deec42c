"""Algorithms by name: which advantage, which loss, which sampling. One table to read them side by side.

``preset = "dapo"`` in a recipe's RL stage stands for these keys; a key that the recipe sets itself wins.
Left out: learning rates, batch sizes and lengths of the papers, which belong to their models.
"""

from __future__ import annotations

from typing import Any

from liubai.errors import UserError, nearest

PRESETS: dict[str, dict[str, Any]] = {
    # ours: every token counts the same, room to grow for rare tokens, no reference model
    "liubai": {
        "advantage": "grpo",
        "loss": {"aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.28},
    },
    # DeepSeek-R1 (Nature 2025, supplement): a clip so wide that it never acts but on runaways
    "paper-r1": {
        "advantage": "grpo",
        "loss": {"aggregation": "sequence-mean", "clip_low": 10.0, "clip_high": 10.0, "kl": 1e-3},
        "reference_every": 400,
        "minibatches": 16,
    },
    # arXiv 2402.03300: GRPO as first printed
    "deepseekmath": {
        "advantage": "grpo",
        "loss": {"aggregation": "sequence-mean", "clip_low": 0.2, "clip_high": 0.2, "kl": 0.04},
    },
    # arXiv 2503.20783: neither the length nor the spread of a group may weigh
    "dr-grpo": {
        "advantage": "dr-grpo",
        "loss": {"aggregation": "dr-grpo", "clip_low": 0.2, "clip_high": 0.2},
    },
    # arXiv 2503.14476: clip-higher, token mean, dynamic sampling, soft overlong punishment
    "dapo": {
        "advantage": "grpo",
        "loss": {"aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.28},
        "refills": 3,
        "minibatches": 16,
        "rewards": {"overlong": -1.0, "overlong_from": 0.8},
    },
    # arXiv 2507.18071
    "gspo": {
        "advantage": "grpo",
        "loss": {"aggregation": "sequence-mean", "objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
        "minibatches": 4,
    },
    # arXiv 2506.13585, with the cap of ScaleRL (arXiv 2510.13786)
    "cispo": {
        "advantage": "grpo",
        "loss": {"aggregation": "token-mean", "objective": "cispo", "ratio_cap": 5.0},
    },
    # arXiv 2402.14740: an answer is one action (its tokens' sum), no clip to speak of, KL inside the reward
    "rloo": {
        "advantage": "rloo",
        "loss": {
            "aggregation": "dr-grpo",
            "clip_low": 10.0,
            "clip_high": 10.0,
            "kl": 0.03,
            "kl_estimator": "k1",
            "kl_in": "reward",
        },
    },
    # arXiv 2501.03262: a baseline of the whole batch
    "reinforce++": {
        "advantage": "reinforce++",
        "loss": {
            "aggregation": "token-mean",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "kl": 0.01,
            "kl_estimator": "k1",
            "kl_in": "reward",
        },
    },
}


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with the keys of its ``preset`` under its own; a loss that says neither a preset nor how tokens
    are weighed weighs them as ``liubai`` does. Raises ``UserError`` for an unknown name."""
    name = raw.get("preset")
    if name is None:
        ours = {"aggregation": PRESETS["liubai"]["loss"]["aggregation"]}
        return _over({"loss": ours}, raw) if isinstance(raw.get("loss"), dict) else raw
    if name not in PRESETS:
        raise UserError(f"there is no preset '{str(name)[:40]}'; {nearest(str(name), PRESETS)}")
    return _over(PRESETS[name], raw)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above``, and from ``below`` what it does not say; tables are joined key by key."""
    joined = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            joined[key] = _over(below[key], above[key])
    return joined
