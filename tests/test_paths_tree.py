"""A tree of steps to one answer, against its rule played again, in a maze whose way is known."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from families import QWEN2, QWEN_SPECIAL, THOUGHT, byte_level
from searching import WORDS, ask, local, outcome

from liubai.rollout import tree as tree_module
from liubai.rollout.engine import Request
from liubai.rollout.local import run
from liubai.rollout.paths import PathsConfig, answer, ballot
from liubai.rollout.thinking import Ask, Path, Spent, go_on, path_of
from liubai.rollout.tree import Node, TreeSearch, TreeSettings, step_ids
from liubai.rollout.writer import Beams, Heard, Judge
from liubai.seeds import derive
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Sample, Span, Stop


class Maze:
    """Thoughts of three letters, ``try a wait b wait a``, mostly a's; the answer is the number of b's, and
    1. A process model knows the way: each letter that is on it so far is good."""

    way = "bab"

    def __init__(self, chance_of_a: float = 0.7) -> None:
        self.chance, self.requests, self.judged = chance_of_a, list[Request](), list[str]()

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        self.requests.append(request)
        rng = random.Random(request.seed)
        text = WORDS.decode(request.prompt_ids).split("<think>")[1]
        ids = list[int]()
        while len(ids) < request.max_tokens:
            words = [*text.split(), *WORDS.decode(ids).split()]
            ids.append(WORDS.encode(self.next(words, rng, request.temperature))[0])
            if ids[-1] in (*request.stop_ids, WORDS.eos_id):
                return self.sample(request, ids, Stop.EOS)
        return self.sample(request, ids, Stop.LENGTH)

    def next(self, words: list[str], rng: random.Random, temperature: float) -> str:
        letters = [w for w in words if w in "ab"]
        if "<answer>" in words:
            said = words[words.index("<answer>") + 1 :]
            return [str(1 + letters.count("b")), "</answer>", "<|end|>"][len(said)]
        if "</think>" in words:
            return "<answer>"
        if not words or words[-1] not in "ab":
            if words and words[-1] in ("try", "wait"):
                return "a" if rng.random() < (self.chance if temperature else 1.0) else "b"
            return "try"
        return "</think>" if len(letters) == 3 else "wait"

    def sample(self, request: Request, ids: list[int], stop: Stop) -> Sample:
        return Sample(request.prompt_ids, tuple(ids), (-0.5,) * len(ids), stop, (Span(0, len(ids)),))

    async def beams(self, request: Request, width: int) -> Beams:
        raise NotImplementedError

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        self.judged += [response for _, response in answers]
        found = []
        for _, response in answers:
            letters = [w for w in response.split() if w in "ab"]
            good = [0.95 if mine == right else 0.2 for mine, right in zip(letters, self.way, strict=False)]
            found.append(min(good, default=0.0))
        return found

    def judges(self) -> frozenset[Judge]:
        return frozenset({"process"})


def searched(maze: Maze, asked: Ask | None = None, **settings: Any) -> tuple[TreeSearch, list[Path], int]:
    search = TreeSearch(maze, asked or ask(), TreeSettings(**settings), Spent(), ballot)
    paths, chosen = asyncio.run(search.run())
    return search, paths, chosen


def nodes_of(search: TreeSearch) -> list[Node]:
    found, at = [search.root], 0
    while at < len(found):
        found += found[at].children
        at += 1
    return found


def letters(node: Node) -> str:
    return "".join(w for w in WORDS.decode(node.draft.ids).split() if w in "ab")


def test_a_tree_finds_what_a_draw_seldom_does() -> None:
    hits = 0
    for seed in range(6):
        _, paths, chosen = searched(Maze(), ask(seed), simulations=40, branch=12)
        hits += paths[chosen].thought == "try b wait a wait b"
    assert hits >= 5  # a draw: 0.3 · 0.7 · 0.3 = 6 %; and one of twelve is a b in 99 %


@pytest.mark.parametrize("value", ["process", "rollouts"])
def test_the_counts_are_those_of_the_rule_played_again(value: Any) -> None:
    """PUCT once more, by recursion, on the finished tree: every visit and every mean must come out."""
    search, _, _ = searched(Maze(), value=value, simulations=25, branch=5, c_puct=1.2)
    replay = {id(n): [0, 0.0, Counter[str | None]()] for n in nodes_of(search)}
    tally, seen = Counter[str](), set[int]()
    tally.update(b for n in search.root.children if n.ended and (b := said(n.draft)))

    def q(node: Node) -> float:
        visits, total, answers = replay[id(node)]
        if value == "process":
            return total / visits
        mine, every = sum(answers.values()), sum(tally.values())
        return sum(k * tally[a] for a, k in answers.items() if a) / (mine * every) if mine and every else 0.0

    def play(node: Node) -> tuple[float, Counter[str | None]]:
        visits = replay[id(node)][0]
        if node.children and (visits or node is search.root):
            known = q(node) if visits else 0.0
            worth = [
                (q(c) if replay[id(c)][0] else known)
                + 1.2 * c.prior * math.sqrt(max(1, visits)) / (1 + replay[id(c)][0])
                for c in node.children
            ]
            result = play(node.children[worth.index(max(worth))])
        else:
            if id(node) not in seen:
                seen.add(id(node))
                tally.update(b for c in node.children if c.ended and (b := said(c.draft)))
                if not node.ended:
                    tally.update({a: k for a, k in node.own.items() if a})
            assert node.worth is not None
            result = node.worth, node.own
        record = replay[id(node)]
        record[0] += 1
        record[1] += result[0]
        record[2].update(result[1])
        return result

    for _ in range(25):
        play(search.root)
    for node in nodes_of(search):
        visits, total, answers = replay[id(node)]
        assert (node.visits, node.answers) == (visits, answers)
        assert node.total == pytest.approx(total)
        if node.children and node is not search.root:
            assert node.visits == 1 + sum(c.visits for c in node.children)
    assert search.root.visits == sum(c.visits for c in search.root.children) == 25
    assert search.tally == tally


def said(draft: Any) -> str | None:
    found = path_of(ask(), draft).answer
    return None if found is None else ballot(found)


def test_priors_are_how_often_a_step_was_drawn() -> None:
    search, _, _ = searched(Maze(), simulations=12, branch=8)
    for node in nodes_of(search):
        if node.children:
            assert sum(c.prior for c in node.children) == pytest.approx(1.0)
            drawn = asyncio.run(steps_from(node, 8))
            assert [c.prior for c in node.children] == [drawn[c.draft.ids] / 8 for c in node.children]
            texts = [WORDS.decode(c.draft.ids) for c in node.children]
            assert len(set(texts)) == len(texts)


async def steps_from(node: Node, n: int) -> Counter[tuple[int, ...]]:
    """The same draws once more."""
    seeds = [derive(ask().seed, "tree", *node.key, i) for i in range(n)]
    ends = step_ids(WORDS)
    drafts = [await go_on(Maze(), ask(), node.draft, s, Spent(), step_ids=ends, most=64) for s in seeds]
    return Counter(draft.ids for draft in drafts)


def test_no_token_is_written_twice() -> None:
    """A child's request begins with its parent's tokens, and what is spent is what was written."""
    maze = Maze()
    search, paths, _ = searched(maze, simulations=20, branch=4)
    known = {node.draft.ids for node in nodes_of(search)}
    start = len(ask().prompt_ids)
    # a step that closes the thought is written on to the end, from where it stands
    assert all(any(ids == r.prompt_ids[start:] or ids[: len(r.prompt_ids) - start] == r.prompt_ids[start:]
                   for ids in known) for r in maze.requests)  # fmt: skip
    assert search.spent.read == sum(len(r.prompt_ids) for r in maze.requests)
    whole = sum(p.tokens for p in paths)
    assert search.spent.written < 80 * whole


def test_a_judge_reads_whole_steps_only() -> None:
    maze = Maze()
    search, _, _ = searched(maze, simulations=15)
    assert maze.judged
    for text in maze.judged:
        assert text.split()[-1] not in ("try", "wait")
    reads = [len(WORDS.encode(t)) + len(ask().prompt_ids) for t in maze.judged]
    assert sum(reads) <= search.spent.judged <= sum(reads) + len(reads)  # the end token is read, too


def test_an_end_without_an_answer_is_worth_nothing() -> None:
    class Mute(Maze):
        def next(self, words: list[str], rng: random.Random, temperature: float) -> str:
            return "<|end|>" if words and words[-1] == "b" else super().next(words, rng, temperature)

    maze = Mute(0.5)
    search, paths, chosen = searched(maze, simulations=20)
    assert all(node.worth in (0.0, None) for node in nodes_of(search) if letters(node).endswith("b"))
    assert paths[chosen].answer == "1"


def test_rollouts_agree_by_their_share() -> None:
    search, paths, chosen = searched(Maze(), value="rollouts", simulations=10, branch=3, rollouts=3)
    every = Counter(p.answer for p in paths)
    assert search.tally == every
    total = sum(every.values())
    for node in nodes_of(search):
        if node.visits:
            count = sum(node.answers.values())
            assert search.q(node) == pytest.approx(
                sum(every[a] * k for a, k in node.answers.items()) / (total * count)
            )
    assert search.spent.judged == 0
    assert paths[chosen].ended


@pytest.mark.parametrize("value", ["process", "rollouts"])
def test_what_is_finished_is_read_once(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read an answer is to decode it; a tree asks for it at every visit."""
    read = list[Any]()

    def counted(asked: Ask, draft: Any) -> Path:
        read.append(draft)
        return path_of(asked, draft)

    monkeypatch.setattr(tree_module, "path_of", counted)
    search, paths, _ = searched(Maze(), value=value, simulations=30)
    assert len(read) == len(search.finished) == len(paths)


def test_others_are_heard_while_a_tree_reads_its_paths() -> None:
    search = TreeSearch(Maze(), ask(), TreeSettings(value="rollouts", simulations=30), Spent(), ballot)
    turns, at = 0, list[int]()
    shown = search._path

    def noted(*given: Any) -> Path:
        at.append(turns)
        return shown(*given)

    async def story() -> None:
        nonlocal turns
        searching = asyncio.create_task(search.run())
        while not searching.done():
            turns += 1
            await asyncio.sleep(0)

    search._path = noted  # type: ignore[method-assign]
    asyncio.run(story())
    assert len(set(at)) == len(at) == len(search.finished) > 10


def test_a_budget_of_tokens_ends_the_search() -> None:
    free, _, _ = searched(Maze(0.5), simulations=60)
    bounded, _, _ = searched(Maze(0.5), simulations=60, tokens=50)
    assert free.simulations == 60
    assert bounded.simulations < 60
    before = bounded.spent.written
    longest = max(found.path.tokens for found in free.finished.values())
    assert (
        50 <= before <= 50 + 5 * longest
    )  # the last simulation's four steps, and what is written in the end
    assert before < free.spent.written


def test_no_step_is_longer_than_it_may_be() -> None:
    search, _, _ = searched(Maze(), simulations=10, step_tokens=1)
    for node in nodes_of(search):
        for child in node.children:
            if not child.ended:
                assert len(child.draft.ids) - len(node.draft.ids) == 1


def test_the_seed_decides_and_nothing_else() -> None:
    def shape(search: TreeSearch) -> list[tuple[tuple[int, ...], int]]:
        return [(n.draft.ids, n.visits) for n in nodes_of(search)]

    first, second = searched(Maze(), ask(1), simulations=15), searched(Maze(), ask(1), simulations=15)
    assert shape(first[0]) == shape(second[0])
    assert first[1:] == second[1:]
    assert shape(searched(Maze(), ask(2), simulations=15)[0]) != shape(first[0])
    # beside others on an engine, too
    alone = outcome("tree:6:rollouts", ask(3))[0]
    writer = local()
    config = PathsConfig.parse("tree:6:rollouts")
    beside = run(writer, [answer(writer, ask(seed), config) for seed in (5, 3, 8)])[1]
    assert [p.sample.completion_ids for p in beside.paths] == [p.sample.completion_ids for p in alone.paths]
    assert beside.chosen == alone.chosen


def test_where_steps_end() -> None:
    assert {WORDS.decode([i]) for i in step_ids(WORDS)} == {"try", "wait", "等等"}
    chat = TextTokenizer(byte_level(QWEN2, QWEN_SPECIAL, THOUGHT), "<|im_end|>", None)
    ends = {chat.decode([i]) for i in step_ids(chat)}
    assert "\n" in ends
    assert all(text.endswith("\n") for text in ends)
