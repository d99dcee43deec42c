"""``python -m bench.bridge CKPT --problems total``: how many thoughts a minute the bridge measures.

Prints one JSON object: seconds of writing the thoughts, of finding right answers and of measuring, the nodes
that were read and the tokens that would have been without sharing them, and the largest difference in nats
between a node's log-probability and that of its sequence alone, over ``--checked`` thoughts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from liubai.measure import bridge_tree
from liubai.measure.bridge_tree import ROOT, TokenTree
from liubai.model.checkpoint import load
from liubai.model.transformer import Transformer
from liubai.stages.bridge import measured
from liubai.stages.evaluate import held_out_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--problems", default="total")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--checked", type=int, default=8)
    asked = parser.parse_args()
    trees: list[TokenTree] = []
    seconds = 0.0
    plain = bridge_tree.score

    def watched(model: Transformer, some: list[TokenTree]) -> list[bridge_tree.Scores]:
        nonlocal seconds
        trees.extend(some)
        began = time.perf_counter()
        try:
            return plain(model, some)
        finally:
            seconds += time.perf_counter() - began

    import liubai.measure.bridge as instrument

    instrument.score = watched  # type: ignore[assignment]
    problems = held_out_of(asked.problems, asked.limit, 0)
    measured(asked.checkpoint, problems[:2], samples=2)  # libraries load, kernels compile
    trees.clear()
    seconds = 0.0
    began, busy = time.perf_counter(), time.process_time()
    found = measured(asked.checkpoint, problems, samples=asked.samples).figures
    whole = time.perf_counter() - began
    result: dict[str, Any] = {
        "problems": asked.problems,
        "thoughts": found["thoughts"],
        "seconds": {
            "all": round(whole, 2),
            **found["seconds"],
            "model": round(seconds, 2),
            "of processor": round(time.process_time() - busy, 2),
        },
        "thoughts/min": round(60 * found["thoughts"] / whole),
        "thoughts/min, writing apart": round(60 * found["thoughts"] / found["seconds"]["measuring"]),
        "nodes": sum(map(len, trees)),
        "tokens without sharing": sum(_unshared(tree) for tree in trees),
        "largest error": _error(asked.checkpoint, trees[: asked.checked]),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, ensure_ascii=False))


def _leaves(tree: TokenTree) -> list[int]:
    return sorted(set(range(len(tree))) - set(tree.parents))


def _unshared(tree: TokenTree) -> int:
    return sum(tree.depths[leaf] + 1 for leaf in _leaves(tree))


@torch.no_grad()
def _error(checkpoint: Path, trees: list[TokenTree]) -> float:
    model, _ = load(checkpoint)
    worst = 0.0
    for tree, scores in zip(trees, bridge_tree.score(model, trees), strict=True):
        for leaf in _leaves(tree):
            path = [leaf]
            while tree.parents[path[-1]] != ROOT:
                path.append(tree.parents[path[-1]])
            path.reverse()
            ids = torch.tensor([[tree.ids[node] for node in path]])
            logprobs = torch.log_softmax(model(ids)[0].double(), -1)
            for at, node in enumerate(path):
                if tree.scored[node]:
                    want = float(logprobs[at - 1, tree.ids[node]])
                    worst = max(worst, abs(float(scores.logprobs_T[node]) - want))
    return worst


if __name__ == "__main__":
    main()
