"""The bridge from question to answer: what a thought is worth, step by step, in bits.

x is a question, z a thought that the model wrote, y a right answer. All probabilities are the model's own at
temperature 1, by forced decoding: after x comes some text in the place of the thought, the thought is closed
there, and y is scored. Only y counts, with the token that ends it (:mod:`.bridge_steps`); where several right
answers are known, their probabilities are added (:mod:`.bridge_gold`)::

    NLL(c)  = −log₂ Σ_y p(y | x, c)                        c in the place of the thought
    U       = NLL(nothing) − NLL(z)                        what the thought buys the answer
    gain_k  = NLL(z≤k−1) − NLL(z≤k)                        what its k-th step buys; the gains add up to U
    H_k     = Σ_v p(v | x, z≤k) · H(next token | x, z≤k, v)

H_k, the entropy of the answer after k steps (arXiv 2508.20395), is taken by the chain rule over all
beginnings v of the answers that are known: the right ones, and those that the model gave to this problem most
often. Beginnings that are not known would only add to it, so it is a lower bound, and exact where an answer
is one token. It is nothing about whether the answer is right.

In the place of the thought stand: nothing; the model's own thought; those of its other answers to the same
problem; its own with the steps in another order; its thought about another problem. Empty thoughts (a guess)
are left out here: they are worth 0 by definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from liubai.errors import UserError
from liubai.measure.bridge_steps import Cutter, Tail, Thought, shuffled
from liubai.measure.bridge_tree import ROOT, Scores, TokenTree, score
from liubai.model.transformer import Transformer
from liubai.seeds import stream

#: What stands in the place of the thought.
CONTEXTS = ("empty", "own", "another", "shuffled", "foreign")
#: Trees that are held at once.
HELD = 512
BIT = math.log(2)  #: nats


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem as tokens: the prompt with the beginning of the thought, the right answers and what else the
    model answers. ``kind`` groups problems whose thoughts are alike."""

    prompt: tuple[int, ...]
    right: tuple[str, ...]
    others: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """A thought about problem number ``problem``, and whether the answer after it was right; ``closed``: the
    model ended the thought itself."""

    problem: int
    thought: Thought
    right: bool
    closed: bool = True


@dataclass(slots=True)
class Bridged:
    """One thought, measured. Bits. ``nll[c]`` for each of :data:`CONTEXTS` that exists; ``curve[k]`` and
    ``entropy[k]`` after k steps, the first before any; of each token of the thought, and of its end where the
    model wrote that, the entropy that it was taken from and its own surprise."""

    written: Written
    tokens: float  #: that are scored of a right answer, the mean: its own, and the one that ends it
    nll: dict[str, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    token_entropy: list[float] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)

    @property
    def utility(self) -> float:
        return self.nll["empty"] - self.nll["own"]

    @property
    def gains(self) -> list[float]:
        return [before - after for before, after in zip(self.curve, self.curve[1:], strict=False)]


#: The scored nodes of some answers: a row for each.
Paths = list[list[int]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where in the tree of one thought everything stands."""

    tree: TokenTree
    thought: list[int]  #: its nodes, and that of its end
    steps: list[tuple[Paths, Paths]]  #: after each step: right answers, other answers
    controls: dict[str, Paths]


def bridge(
    model: Transformer,
    cutter: Cutter,
    asked: Sequence[Asked],
    written: Sequence[Written],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Bridged]:
    """Measure the thoughts that say something, in their order. ``seed`` decides the orders of the shuffled.
    Raises ``UserError`` when a thought and its answer do not fit the model."""
    told = [w for w in written if w.thought.ids]
    foreign = _foreign(asked, told)
    found: list[Bridged] = []
    for start in range(0, len(told), HELD):
        plans = []
        for i in range(start, min(start + HELD, len(told))):
            plans.append(_plan(cutter, asked[told[i].problem], told[i], foreign[i], seed, i))
            need, room = max(plans[-1].tree.depths) + 1, model.config.max_position_embeddings
            if need > room:
                raise UserError(
                    f"a thought and the answer behind it need {need} positions; the model has {room}: lower "
                    "max_tokens"
                )
        scored = score(model, [plan.tree for plan in plans])
        found += [
            _read(told[start + i], plan, scores)
            for i, (plan, scores) in enumerate(zip(plans, scored, strict=True))
        ]
        if progress:
            progress(len(found))
    _others(found)
    return found


def _foreign(asked: Sequence[Asked], told: Sequence[Written]) -> list[tuple[int, ...]]:
    """For each thought one about another problem of its kind, or of any: the next that says something."""
    found: list[tuple[int, ...]] = []
    for i, mine in enumerate(told):
        others: tuple[int, ...] = ()
        for step in range(1, len(told)):
            other = told[(i + step) % len(told)]
            if other.problem == mine.problem:
                continue
            others = others or other.thought.ids
            if asked[other.problem].kind == asked[mine.problem].kind:
                others = other.thought.ids
                break
        found.append(others)
    return found


def _plan(
    cutter: Cutter, asked: Asked, mine: Written, foreign: tuple[int, ...], seed: int, number: int
) -> _Plan:
    tree, ids = TokenTree(), mine.thought.ids
    start = tree.extend(ROOT, asked.prompt)[-1]
    trunk = tree.extend(start, ids, True)

    def answers(node: int, text: Sequence[int], said: Sequence[str]) -> Paths:
        ended = cutter.blank(text)
        return [_nodes(tree, node, cutter.tail(answer, ended)) for answer in said]

    cuts = [0, *(piece.cut for piece in mine.thought.pieces)]
    steps = []
    for cut in cuts:
        node = trunk[cut - 1] if cut else start
        text = ids[:cut] or asked.prompt
        steps.append((answers(node, text, asked.right), answers(node, text, asked.others)))
    controls = {}
    # what has no other order is its own shuffle
    mixed = shuffled(mine.thought, stream(seed, "shuffle", number)) or ids
    for name, other in (("shuffled", mixed), ("foreign", foreign)):
        if other:
            controls[name] = answers(tree.extend(start, other)[-1], other, asked.right)
    end = []
    if mine.closed:  # whether to go on is the last choice of a thought
        end = tree.extend(trunk[-1], cutter.tail(asked.right[0], cutter.blank(ids)).ids[:1], True)
    return _Plan(tree, trunk + end, steps, controls)


def _nodes(tree: TokenTree, node: int, tail: Tail) -> list[int]:
    path = tree.extend(node, tail.ids, tail.scored)
    return [at for at, counts in zip(path, tail.scored, strict=True) if counts]


def _read(mine: Written, plan: _Plan, scores: Scores) -> Bridged:
    logprobs, entropies = scores.logprobs_T.tolist(), scores.entropies_T.tolist()
    parents = plan.tree.parents
    curve = [_nll(right, logprobs) for right, _ in plan.steps]
    counts = [len(path) for path in plan.steps[-1][0]]
    return Bridged(
        mine,
        sum(counts) / len(counts),
        {"empty": curve[0], "own": curve[-1]}
        | {name: _nll(paths, logprobs) for name, paths in plan.controls.items()},
        curve,
        [_entropy([*right, *others], parents, logprobs, entropies) for right, others in plan.steps],
        [entropies[node] / BIT for node in plan.thought],
        [-logprobs[node] / BIT for node in plan.thought],
    )


def _nll(paths: Paths, logprobs: Sequence[float]) -> float:
    """−log₂ of the probability of any of these answers."""
    each = [math.fsum(logprobs[node] for node in path) for path in paths]
    best = max(each)
    return -(best + math.log(math.fsum(math.exp(value - best) for value in each))) / BIT


def _entropy(
    paths: Paths, parents: Sequence[int], logprobs: Sequence[float], entropies: Sequence[float]
) -> float:
    """H_k of the module's head, over the beginnings that these answers have."""
    parts: dict[int, float] = {}
    for path in paths:
        reached = 0.0
        for node in path:
            parts.setdefault(parents[node], math.exp(reached) * entropies[node])
            reached += logprobs[node]
    return math.fsum(parts.values()) / BIT


def _others(found: Sequence[Bridged]) -> None:
    """In the place of a thought, another one about the same problem: the mean over all others. (Over all
    thoughts together it is what they are worth themselves; apart, right ones and wrong ones differ.)"""
    by_problem: dict[int, list[Bridged]] = {}
    for b in found:
        by_problem.setdefault(b.written.problem, []).append(b)
    for row in by_problem.values():
        total = math.fsum(b.nll["own"] for b in row)
        for b in row if len(row) > 1 else ():
            b.nll["another"] = (total - b.nll["own"]) / (len(row) - 1)
