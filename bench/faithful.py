"""``python -m bench.faithful [FOLDER] [--fit]``: the faithfulness rules against people's labels.

FOLDER holds ``faithfulness_summedits.jsonl`` and ``faithfulness_begin.jsonl`` (default: ``../shared/data``
beside the checkout). Documents are halved by a hash of their text: weights were fitted on the first half, so
the second is what counts. ``--fit`` fits the weights of :mod:`liubai.grade.faithful` again: a logistic
regression with weights that are not negative and a little L2, each domain and label with the same say.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from liubai.grade.faithful import MOST, SUPPORTED, Passage, claims_in, findings, judge, lost_share
from liubai.grade.prose import tokens

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
#: what is fitted together: a date is a number, and to affirm what is denied is as bad as the reverse
FITTED = {
    "number": ("number", "date"),
    "name": ("name",),
    "negation": ("negation", "affirmed"),
    "limit": ("limit",),
    "opposite": ("opposite",),
    "relation": ("relation",),
    "count": ("count",),
    "word": ("word",),
}
L2, RATE, STEPS = 1e-2, 0.3, 4000
DRAWS = 300  #: of documents, for standard errors

Array = NDArray[np.float64]


class Row(NamedTuple):
    domain: str
    passage: str
    summary: str
    consistent: bool

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.passage.encode()).digest()[-1] % 2 == 1


def read(folder: Path) -> list[Row]:
    rows = []
    for name, passage, summary in (("summedits", "document", "summary"), ("begin", "passage", "response")):
        with open(folder / f"faithfulness_{name}.jsonl", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                rows.append(
                    Row(row.get("domain", "begin"), row[passage], row[summary], bool(row["consistent"]))
                )
    return rows


def auc(scores: Array, right: NDArray[np.bool_]) -> float:
    """The chance that a consistent one scores higher than an inconsistent one, ties counting half."""
    wins = (scores[right][:, None] > scores[~right]) + 0.5 * (scores[right][:, None] == scores[~right])
    return float(wins.mean())


def balanced(scores: Array, right: NDArray[np.bool_]) -> float:
    """The mean of both shares that are judged rightly."""
    said = scores >= SUPPORTED
    return float((said[right].mean() + (~said[~right]).mean()) / 2)


def error_of(scores: Array, right: NDArray[np.bool_], documents: list[str]) -> float:
    """The standard error of the balanced accuracy: rows of one document are not independent, so documents
    are drawn."""
    rng = np.random.default_rng(0)
    places = {name: [i for i, other in enumerate(documents) if other == name] for name in set(documents)}
    names = sorted(places)
    found = []
    for _ in range(DRAWS):
        at = [i for k in rng.integers(0, len(names), len(names)) for i in places[names[k]]]
        if 0 < right[at].sum() < len(at):
            found.append(balanced(scores[at], right[at]))
    return float(np.std(found))


def table(rows: list[Row]) -> None:
    started = time.perf_counter()
    scores = np.array([judge(row.passage, row.summary).score for row in rows])
    took = time.perf_counter() - started
    print(f"{'domain':<12} {'half':<9} {'rows':>5} {'documents':>9} {'AUC':>6} {'balanced accuracy':>18}")
    for domain in dict.fromkeys(row.domain for row in rows):
        for held_out in (False, True):
            at = np.array([row.domain == domain and row.held_out is held_out for row in rows])
            right = np.array([row.consistent for row in rows])[at]
            documents = [row.passage for row, here in zip(rows, at, strict=True) if here]
            error, different = error_of(scores[at], right, documents), len(set(documents))
            print(
                f"{domain:<12} {'held out' if held_out else 'fitted':<9} {at.sum():>5} {different:>9} "
                f"{auc(scores[at], right):>6.3f} {balanced(scores[at], right):>18.3f} ± {error:.3f}"
            )
    print(f"{len(rows) / took:,.0f} summaries/s")


def fit(rows: list[Row]) -> tuple[dict[str, float], float]:
    """(cost of each kind, the bound) from the first half."""
    rows = [row for row in rows if not row.held_out]
    features = []
    for row in rows:
        said = tokens(row.summary)
        found = findings(Passage(row.passage), said)
        n = Counter(finding.kind for finding in found)
        counts = [min(sum(n[kind] for kind in kinds), MOST) for kinds in FITTED.values()]
        features.append([*counts, lost_share(found, claims_in(said))])
    X, right = np.array(features, float), np.array([row.consistent for row in rows])
    groups = Counter((row.domain, row.consistent) for row in rows)
    say = np.array([1 / groups[row.domain, row.consistent] for row in rows])
    say /= say.sum()
    costs, bound = np.zeros(X.shape[1]), 0.0
    for _ in range(STEPS):
        error = say * (1 / (1 + np.exp(X @ costs - bound)) - right)
        bound -= RATE * error.sum()
        costs = np.maximum(0.0, costs - RATE * (L2 * costs - X.T @ error))
    return dict(zip([*FITTED, "share"], costs.tolist(), strict=True)), float(bound)


def main() -> None:
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    rows = read(Path(names[0]) if names else FOLDER)
    if "--fit" in sys.argv:
        costs, bound = fit(rows)
        print({kind: round(cost, 2) for kind, cost in costs.items()}, "bound", round(bound, 2))
    table(rows)


if __name__ == "__main__":
    main()
