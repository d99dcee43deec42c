"""Tree search over the steps of a thought: MCTS with PUCT (AlphaGo Zero, Silver et al. 2017; AlphaZero,
arXiv 1712.01815), at answer time only.

A node is a thought up to the end of a step: a line end or, in our worlds of words, the word that opens the
next step. A simulation goes down from the root by

    argmax  Q(child) + c_puct · P(child) · √N(parent) / (1 + N(child))        (an unvisited Q is the parent's)

to a node that was never visited, judges it, lets the model write ``branch`` next steps from it, and adds the
judgement to all nodes above. In the end the most visited way down is the answer; what it lacks is written
greedily. What a node says is written once: its children's requests begin with its tokens.

What differs from AlphaGo. There the moves are a short list that the rules give and the policy network weighs;
here they are texts, of which a few are sampled from the model itself: P is how often a step came among them.
There a value network is learned from the very games that the search plays, and the policy from its visits,
again and again; here neither learns anything. The value of a node is either the process model's chance that
its weakest step is right (``process``), or, without any model, how far the answers agree that ``rollouts``
finished thoughts come to: the share that their answers have of all answers found in this tree, as of now.
One tree serves the whole thought, not one a move.

R1's authors tried to improve a model by such a search and gave it up (arXiv 2501.12948v2, appendix G.2):
the space of texts is exponentially larger than that of a board, so that each node may have a few children
only and the search is caught in a local optimum; and the value model that would have to lead every step is
itself hard to train. Beside a value model that is there already, they say, search can help at inference:
that is what this is.

Left out: simulations at the same time (virtual loss); many questions fill the engine instead.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from liubai.errors import UserError
from liubai.problems.lexicon import translate
from liubai.rollout.thinking import Ask, Draft, Path, Spent, go_on, path_of, together
from liubai.rollout.writer import Writer
from liubai.seeds import derive
from liubai.text.tokenizer import TextTokenizer

#: The words with which steps begin in the worlds of words (:mod:`liubai.problems.lexicon`).
OPENING = "try wait plus minus over then"
#: A line end, as text and as byte-level tokenizers write it.
LINE_ENDS = ("\n", "Ċ")

Value = Literal["process", "rollouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSettings:
    """``tokens``: no simulation begins when so many have been written; 0 is no bound."""

    simulations: int = 16
    branch: int = 4
    c_puct: float = 1.5
    step_tokens: int = 64
    value: Value = "process"
    rollouts: int = 2
    tokens: int = 0


@dataclass(slots=True)
class Node:
    """A thought so far. ``total`` is the sum of the values found below (``process``), ``answers`` count what
    was answered below (``rollouts``; ``None`` for no answer). ``key`` is its place in the tree."""

    draft: Draft
    key: tuple[int, ...] = ()
    prior: float = 1.0
    visits: int = 0
    total: float = 0.0
    answers: Counter[str | None] = field(default_factory=Counter)
    children: list[Node] = field(default_factory=list)
    worth: float | None = None  #: of itself, once it was judged
    own: Counter[str | None] = field(default_factory=Counter)  #: what its own rollouts answered

    @property
    def ended(self) -> bool:
        return self.draft.stop is not None


@dataclass(frozen=True, slots=True)
class Finished:
    """A thought with its end, read once. ``ballot`` is the same for equal answers; ``None``: no answer."""

    path: Path
    ballot: str | None


class TreeSearch:
    """``await search.run()`` gives all finished paths, and which of them is chosen. ``ballot`` maps equal
    answers to one value. Deterministic by ``ask.seed``: a request's seed is derived from its node's place.

    Raises ``UserError`` at temperature 0, where there is but one next step.
    """

    def __init__(
        self, writer: Writer, ask: Ask, settings: TreeSettings, spent: Spent, ballot: Callable[[str], str]
    ) -> None:
        if ask.temperature == 0:
            raise UserError("a tree search draws next steps and needs a temperature above 0")
        self.writer, self.ask, self.settings, self.spent, self.ballot = writer, ask, settings, spent, ballot
        self.step_ids = step_ids(ask.template.tokenizer)
        self.root = Node(Draft())
        self.tally: Counter[str] = Counter()  # answers of all finished thoughts, each counted once
        self.finished: dict[tuple[int, ...], Finished] = {}  # … by their places
        self.simulations = 0

    async def run(self) -> tuple[list[Path], int]:
        await self._expand(self.root)
        while self.simulations < self.settings.simulations:
            if self.settings.tokens and self.spent.written >= self.settings.tokens:
                break
            await self._simulate()
            self.simulations += 1
        key = await self._choose()
        nodes = {node.key: node for node in self._nodes()}
        paths = []
        for place, found in self.finished.items():
            paths.append(self._path(found, nodes.get(place)))
            await asyncio.sleep(0)  # there may be many, and others are to be heard meanwhile
        return paths, list(self.finished).index(key)

    def q(self, node: Node) -> float:
        """The mean value of what was found at and below a node that was visited."""
        if self.settings.value == "process":
            return node.total / node.visits
        return self._agreement(node.answers)

    def way_down(self) -> list[Node]:
        """From the root to a node that was never visited, or to an end."""
        way = [self.root]
        while (parent := way[-1]).children:
            first = self.q(parent) if parent.visits else 0.0
            explore = self.settings.c_puct * math.sqrt(max(1, parent.visits))

            def worth(child: Node, first: float = first, explore: float = explore) -> float:
                known = self.q(child) if child.visits else first
                return known + explore * child.prior / (1 + child.visits)

            way.append(max(parent.children, key=worth))  # the first of equals
        return way

    async def _simulate(self) -> None:
        way = self.way_down()
        leaf = way[-1]
        if leaf.worth is None:
            if leaf.ended:
                await self._judge(leaf)
            else:
                await together([self._judge(leaf), self._expand(leaf)])
        assert leaf.worth is not None
        for node in way:
            node.visits += 1
            node.total += leaf.worth
            node.answers.update(leaf.own)

    async def _expand(self, node: Node) -> None:
        """The model's own next steps; the same step drawn twice is one child of twice the prior."""
        n = self.settings.branch
        drafts = await together(
            [
                go_on(
                    self.writer,
                    self.ask,
                    node.draft,
                    derive(self.ask.seed, "tree", *node.key, i),
                    self.spent,
                    step_ids=self.step_ids,
                    most=self.settings.step_tokens,
                )
                for i in range(n)
            ]
        )
        drawn = Counter((draft.ids, draft.stop) for draft in drafts)
        distinct = {(draft.ids, draft.stop): draft for draft in drafts}  # in the order of their first
        for i, (what, draft) in enumerate(distinct.items()):
            child = Node(draft, (*node.key, i), drawn[what] / n)
            node.children.append(child)
            if child.ended:
                self._finish(child.key, draft)

    async def _judge(self, node: Node) -> None:
        if self.settings.value == "process":
            node.worth = await self._process(node)
            return
        if node.ended:
            node.own[self.finished[node.key].ballot] += 1
        else:
            ends = await together([self._rollout(node, i) for i in range(self.settings.rollouts)])
            node.own.update(found.ballot for found in ends)
        node.worth = 0.0  # the agreement changes with every answer: see ``q``

    async def _rollout(self, node: Node, i: int) -> Finished:
        seed = derive(self.ask.seed, "rollout", *node.key, i)
        draft = await go_on(self.writer, self.ask, node.draft, seed, self.spent)
        return self._finish((*node.key, -1 - i), draft)

    async def _process(self, node: Node) -> float:
        """The process model's word on the steps so far; to end without an answer is worth nothing."""
        ids, tokenizer = node.draft.ids, self.ask.template.tokenizer
        if node.ended:
            path = self.finished[node.key].path
            if path.answer is None:
                return 0.0
            text = path.response
        else:
            if ids[-1] in opening_ids(tokenizer):
                ids = ids[:-1]  # it has begun a step, and nobody can say yet whether that is right
            text = tokenizer.decode(ids)
        self.spent.judged += len(self.ask.prompt_ids) + len(ids)
        [score] = await self.writer.judge("process", [(self.ask.question, text)])
        return score

    async def _choose(self) -> tuple[int, ...]:
        """The place of the finished path at the end of the most visited way; an end without an answer is
        taken where there is nothing else."""

        def liked(node: Node) -> tuple[bool, int, float, float]:
            usable = not node.ended or self.finished[node.key].ballot is not None
            return usable, node.visits, self.q(node), node.prior

        node = self.root
        while visited := [child for child in node.children if child.visits]:
            node = max(visited, key=liked)
        if node.ended:
            return node.key
        if self.settings.value == "rollouts" and (
            below := [k for k in self.finished if self._is_below(k, node)]
        ):
            # they were written already: the one whose answer most others share
            return max(below, key=lambda k: self._agreement(Counter([self.finished[k].ballot])))
        greedy = replace(self.ask, temperature=0.0)
        draft = await go_on(self.writer, greedy, node.draft, self.ask.seed, self.spent)
        key = (*node.key, -1)
        self._finish(key, draft)
        return key

    def _is_below(self, key: tuple[int, ...], node: Node) -> bool:
        return key[: len(node.key)] == node.key

    def _finish(self, key: tuple[int, ...], draft: Draft) -> Finished:
        path = path_of(self.ask, draft)
        ballot = None if path.answer is None else self.ballot(path.answer)
        self.finished[key] = found = Finished(path, ballot)
        if ballot is not None:
            self.tally[ballot] += 1
        return found

    def _agreement(self, answers: Counter[str | None]) -> float:
        """The mean share that these answers have of all in the tree; no answer shares in nothing."""
        found, count = sum(self.tally.values()), sum(answers.values())
        if not found or not count:
            return 0.0
        shared = sum(n * self.tally[a] for a, n in answers.items() if a is not None)
        return shared / (found * count)

    def _nodes(self) -> list[Node]:
        found, at = [self.root], 0
        while at < len(found):
            found += found[at].children
            at += 1
        return found

    def _path(self, found: Finished, node: Node | None) -> Path:
        if node is not None:
            return replace(found.path, votes=node.visits, score=self.q(node) if node.visits else None)
        if self.settings.value == "rollouts":
            return replace(found.path, score=self._agreement(Counter([found.ballot])))
        return found.path


@lru_cache(maxsize=16)
def step_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The tokens with which a step ends: those that end a line or, without any, those that open a step."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    ends = tuple(sorted(i for text, i in vocabulary.items() if text.endswith(LINE_ENDS)))
    return ends or tuple(sorted(opening_ids(tokenizer)))


@lru_cache(maxsize=16)
def opening_ids(tokenizer: TextTokenizer) -> frozenset[int]:
    """The words of :data:`OPENING` in both languages, as far as the tokenizer is one of words."""
    if tokenizer.unknown_id is None:
        return frozenset()
    words = f"{OPENING} {translate(OPENING, 'zh')}".split()
    return frozenset(i for word in words if (i := tokenizer.id_of(word)) is not None)
