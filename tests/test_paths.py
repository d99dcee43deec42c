"""Several paths to one answer: votes, judges and trees, each against its definition written out here."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path as Folder
from typing import Any

import pytest
from conftest import Silent, tiny_config, tiny_model
from families import QWEN2, QWEN_SPECIAL, THOUGHT, byte_level
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from liubai.cli import app
from liubai.errors import UserError
from liubai.problems import family
from liubai.problems.family import distinct_problems
from liubai.recipe.recipe import load_recipe
from liubai.rollout import tree as tree_module
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request, generate
from liubai.rollout.local import LocalWriter, run
from liubai.rollout.paths import Outcome, PathsConfig, answer, ballot, elect
from liubai.rollout.thinking import Ask, Path, Spent, go_on, path_of
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.tree import Node, TreeSearch, TreeSettings, step_ids
from liubai.rollout.writer import Beams, Heard, Judge, Piece
from liubai.seeds import derive
from liubai.stages import evaluate
from liubai.stages.by_paths import Way, answers_by, described, way_of
from liubai.stages.context import Context
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import TextTokenizer, word_level
from liubai.types import Sample, Span, Stop

WORDS = word_level(["a", "b", "c", "try", "wait", "等等", "1", "2", "3", "4"])
TEMPLATE = Template(WORDS, BARE)


def ask(seed: int = 7, max_tokens: int = 40, **more: Any) -> Ask:
    prompt = tuple(TEMPLATE.prompt_ids("a b"))
    return Ask(question="a b", template=TEMPLATE, prompt_ids=prompt, max_tokens=max_tokens, seed=seed, **more)


# --- what may be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("greedy", {"kind": "greedy", "number": 1}),
        ("sample", {"kind": "sample", "number": 1}),
        ("sample:5", {"kind": "sample", "n": 5}),
        ("beam:6", {"kind": "beam", "width": 6}),
        ("beam", {"kind": "beam", "number": 4}),
        ("vote:16", {"kind": "vote", "n": 16, "number": 16}),
        ("vote", {"kind": "vote", "number": 8}),
        ("best:4:preference", {"kind": "best", "n": 4, "judge": "preference"}),
        ("tree:32", {"kind": "tree", "simulations": 32, "value": None}),
        ("tree:8:rollouts", {"kind": "tree", "simulations": 8, "value": "rollouts"}),
        ("tree:8:process", {"kind": "tree", "judge": "process"}),
    ],
)
def test_a_text_names_paths(text: str, expected: dict[str, Any]) -> None:
    config = PathsConfig.parse(text)
    assert {key: getattr(config, key) for key in expected} == expected
    assert PathsConfig.parse(config.name) == PathsConfig.parse(PathsConfig.parse(config.name).name)
    assert PathsConfig.model_validate_json(json.dumps(text), strict=True) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("votes:8", "did you mean 'vote'"),
        ("vote:", "no number"),
        ("vote:-1", "no number"),
        ("vote:0", "greater than or equal to 1"),
        ("vote:9999", "less than or equal to 1024"),
        ("vote:1e3", "no number"),
        ("vote:٣", "no number"),
        ("greedy:2", "takes no number"),
        ("best:4:taste", "'preference' or 'process'"),
        ("best:4:process:9", "KIND:N:JUDGE"),
        ("vote:4:process", "'judge' means nothing to vote"),
        ("tree:4:preference", "judges whole answers"),
        ("", "there is no kind ''"),
        ("vote:" + "9" * 80, "write KIND"),
    ],
)
def test_a_text_that_names_none_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PathsConfig.parse(text)


@pytest.mark.parametrize(
    "raw",
    [
        {"kind": "vote", "width": 3},
        {"kind": "beam", "n": 3},
        {"kind": "sample", "alpha": 1.0},
        {"kind": "vote", "simulations": 3},
        {"kind": "tree", "rollouts": 3},
        {"kind": "tree", "value": "rollouts", "judge": "process"},
        {"kind": "vote", "n": True},
        {"kind": "vote", "n": 2.0},
        {"kind": "vote", "n": "2"},
        {"kind": "vote", "many": 2},
        {"kind": "tree", "c_puct": math.inf},
        {"kind": "other"},
    ],
)
def test_a_key_that_does_not_belong_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PathsConfig.model_validate_json(json.dumps(raw))
    with pytest.raises(ValidationError):
        PathsConfig.model_validate(raw)


def test_how_many_are_written_at_once() -> None:
    names = ("greedy", "vote:5", "beam:3", "tree:50", "tree:50:process")
    assert [PathsConfig.parse(name).at_once for name in names] == [1, 5, 3, 6, 6]
    assert PathsConfig(kind="tree", value="process", branch=7).at_once == 7
    assert [PathsConfig.parse(name).in_all for name in names] == [1, 5, 3, 300, 300]
    assert PathsConfig(kind="tree", simulations=9, value="rollouts", branch=7, rollouts=3).in_all == 90


# --- the vote -------------------------------------------------------------------------------------


def path(said: str | None, logprob: float = -1.0, stop: Stop = Stop.EOS) -> Path:
    sample = Sample((1,), (2,), (logprob,), stop, (Span(0, 1),))
    return Path(sample, (False,), said or "", "", said or "", said, logprob, 0)


@pytest.mark.parametrize(
    ("answers", "chosen", "votes"),
    [
        ([("1", -1.0), ("2", -1.0), ("2", -5.0)], 1, [1, 2, 2]),
        ([("1", -9.0), ("2", -1.0), ("1", -9.0), ("2", -2.0)], 1, [2, 2, 2, 2]),  # a tie: the likelier
        ([("1", -2.0), ("2", -2.0)], 0, [1, 1]),  # in all: the first
        ([(None, 0.0), (None, 0.0), ("3", -50.0)], 2, [None, None, 1]),  # nothing said never wins
        ([(None, -3.0), (None, -2.0)], 1, [None, None]),
        # e⁻² + e⁻² > e⁻¹·⁵ though each is less likely; equal votes would need equal numbers
        ([("1", -1.5), ("1", -900.0), ("2", -2.0), ("2", -2.0)], 2, [2, 2, 2, 2]),
        ([("3.80", -1.0), ("3.8", -1.0), ("4", -0.1)], 0, [2, 2, 1]),
        ([("1/2", -1.0), (" 0.5 ", -1.0), ("2", -0.1)], 0, [2, 2, 1]),
        ([("( 1 + 2 )", -1.0), ("(1+2)", -1.0), ("3", -0.1)], 0, [2, 2, 1]),
    ],
)
def test_votes_by_hand(answers: list[tuple[str | None, float]], chosen: int, votes: list[int | None]) -> None:
    paths, winner = elect([path(said, logprob) for said, logprob in answers])
    assert winner == chosen
    assert [p.votes for p in paths] == votes


def test_who_was_cut_off_wins_only_against_others_who_were() -> None:
    paths = [path(None, -0.1, Stop.LENGTH), path(None, -9.0), path(None, -8.0)]
    assert elect(paths)[1] == 2
    assert elect(paths[:1])[1] == 0


@given(
    st.lists(
        st.tuples(st.sampled_from([None, "1", "2", "3"]), st.sampled_from([-1.0, -2.0, -800.0])), min_size=1
    )
)
def test_votes_by_the_book(answers: list[tuple[str | None, float]]) -> None:
    _, winner = elect([path(said, logprob) for said, logprob in answers])
    said = [a for a, _ in answers]
    if not any(said):
        assert answers[winner][1] == max(logprob for _, logprob in answers)
        return
    mass = {a: sum(Fraction(math.exp(p)) for b, p in answers if b == a) for a in said if a}
    most = max((said.count(a), mass[a]) for a in mass)
    # sums of tiny numbers are told apart by rounding; equal ones by who came first
    best = [a for a in mass if said.count(a) == most[0] and math.isclose(mass[a], most[1], rel_tol=1e-9)]
    assert said[winner] in best
    assert winner == said.index(said[winner])


@pytest.mark.parametrize("text", ["1/0", "1" * 5000, "1e999", "0x10", "", "½", "٣", "-", "1/", "nan"])
def test_no_answer_stops_the_vote(text: str) -> None:
    assert isinstance(ballot(text), str)


# --- draws, beams, judges -------------------------------------------------------------------------


def engine_of(slots: int = 8) -> TorchEngine:
    model = tiny_model(9, tiny_config(vocab_size=WORDS.vocab_size, eos_token_id=WORDS.eos_id))
    engine = TorchEngine(model, eos_ids=WORDS.eos_ids, slots=slots, max_length=90, lot=1)
    engine.load(model.state_dict(), 0)
    return engine


def local(judges: dict[Judge, Any] | None = None) -> LocalWriter:
    return LocalWriter(engine_of(), eos_ids=WORDS.eos_ids, judges=judges)


def outcome(
    name: str, asked: Ask, writer: LocalWriter | None = None
) -> tuple[Outcome, dict[int, list[Piece]]]:
    writer, told = writer or local(), dict[int, list[Piece]]()

    def heard(i: int, piece: Piece) -> None:
        told.setdefault(i, []).append(piece)

    [found] = run(writer, [answer(writer, asked, PathsConfig.parse(name), heard)])
    return found, told


@pytest.mark.parametrize("name", ["greedy", "sample", "sample:3", "vote:5"])
def test_draws_are_the_engines(name: str) -> None:
    asked = ask()
    found, told = outcome(name, asked)
    config = PathsConfig.parse(name)
    temperature = 0.0 if name == "greedy" else 1.0
    seeds = [7, *(derive(7, "path", i) for i in range(1, config.number))]
    wanted = generate(
        engine_of(),
        [
            Request(id=i, prompt_ids=asked.prompt_ids, max_tokens=40, seed=s, temperature=temperature)
            for i, s in enumerate(seeds)
        ],
    )
    assert [p.sample.completion_ids for p in found.paths] == [s.completion_ids for s in wanted]
    for i, p in enumerate(found.paths):
        assert tuple(token for piece in told[i] for token in piece.ids) == p.sample.completion_ids
    assert found.spent.written == sum(p.tokens for p in found.paths)
    assert found.spent.read == config.number * len(asked.prompt_ids)
    assert found.chosen == (elect(found.paths)[1] if config.kind == "vote" else 0)


def test_the_best_is_the_judges() -> None:
    judged: list[tuple[str, str]] = []

    def judge(answers: Sequence[tuple[str, str]]) -> list[float]:
        judged.extend(answers)
        return [float(-len(response)) for _, response in answers]

    found, _ = outcome("best:6:process", ask(), local({"process": judge}))
    assert judged == [("a b", p.response) for p in found.paths]
    key = [(p.ended, p.answer is not None, -len(p.response), p.logprob) for p in found.paths]
    assert found.chosen == key.index(max(key))
    assert [p.score for p in found.paths] == [-len(p.response) for p in found.paths]
    assert found.spent.judged == sum(p.tokens + len(p.sample.prompt_ids) for p in found.paths)


def test_an_answer_comes_before_a_score() -> None:
    """What was cut off, and what nobody can read, is not the best whatever the judge says."""
    says = Said(["a", "</think> <answer> 1 </answer>", "a </think>"], {"preference": lambda r: -len(r)})
    found = asyncio.run(answer(says, ask(), PathsConfig.parse("best:3")))
    assert found.best.answer == "1"
    longer = Said(["a " * 60, "a </think> b"], {"preference": len})
    assert asyncio.run(answer(longer, ask(), PathsConfig.parse("best:2"))).chosen == 1
    thought = Said(["a a a a </think> <answer> 1 </answer>"], {"preference": len})
    spent = asyncio.run(answer(thought, ask(), PathsConfig.parse("best:1"))).spent
    assert spent.judged == len(ask().prompt_ids) + 4  # the thought is not read: three words, and the end


class Said:
    """A writer that gives the answers of a list in turn."""

    def __init__(self, answers: Sequence[str], judges: dict[Judge, Any]) -> None:
        self.answers, self._judges, self.count = answers, judges, 0

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        ids = [*WORDS.encode(self.answers[self.count]), WORDS.eos_id]
        self.count += 1
        stop = Stop.EOS if len(ids) <= request.max_tokens else Stop.LENGTH
        ids = ids[: request.max_tokens]
        return Sample(request.prompt_ids, tuple(ids), (-1.0,) * len(ids), stop, (Span(0, len(ids)),))

    async def beams(self, request: Request, width: int) -> Beams:
        raise NotImplementedError

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        return [float(self._judges[judge](response)) for _, response in answers]

    def judges(self) -> frozenset[Judge]:
        return frozenset(self._judges)


def test_of_two_judges_the_one_who_reads_the_thought() -> None:
    both: dict[Judge, Any] = {"preference": len, "process": lambda r: -len(r)}
    answers = ["a a </think> <answer> 1 </answer>", "</think> <answer> 2 </answer>"]
    for name, chosen in (("best:2", 1), ("best:2:preference", 0)):
        assert asyncio.run(answer(Said(answers, both), ask(), PathsConfig.parse(name))).chosen == chosen


def test_beams_are_scored_and_silent() -> None:
    found, told = outcome("beam:3", ask())
    assert told == {}
    scores = [p.score for p in found.paths if p.ended]
    assert scores == [pytest.approx(p.logprob) for p in found.paths if p.ended]
    assert found.chosen == 0
    engine, asked = engine_of(), ask()
    request = Request(id=0, prompt_ids=asked.prompt_ids, max_tokens=asked.max_tokens, seed=0)
    search, steps = BeamSearch(engine.model, request, 3, eos_ids=WORDS.eos_ids), 1
    while search.step():
        steps += 1
    assert [p.sample.completion_ids for p in found.paths] == [s.completion_ids for s in search.best()]
    assert found.spent.written == 3 * steps
    even = asyncio.run(answer_by_beams(PathsConfig(kind="beam", width=3, alpha=1.0), local()))
    assert [p.score for p in even.paths] == [pytest.approx(p.logprob / p.tokens) for p in even.paths]
    assert even.best.score == max(p.score for p in even.paths if p.ended)  # type: ignore[type-var]


def test_beams_cost_what_was_computed() -> None:
    """Not what is left of it: a search is sure of short answers only when it has looked further."""

    class Sure(Said):
        async def beams(self, request: Request, width: int) -> Beams:
            return Beams([await self.write(request) for _ in range(width)], 9)

    found = asyncio.run(answer(Sure(["</think> 1"] * 4, {}), ask(), PathsConfig.parse("beam:4")))
    assert max(p.tokens for p in found.paths) == 3
    assert found.spent.written == 4 * 9


async def answer_by_beams(config: PathsConfig, writer: LocalWriter) -> Outcome:
    serving = asyncio.create_task(writer.serve())
    try:
        return await answer(writer, ask(), config)
    finally:
        serving.cancel()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("best:4", {}, "needs a model that judges"),
        ("best:4:preference", {}, "needs a reward model"),
        ("tree:4:process", {}, "needs one"),
        ("vote:4", {"temperature": 0.0}, "raise the temperature"),
        ("tree:4:rollouts", {"temperature": 0.0}, "above 0"),
        ("beam:4", {"budget": 3}, "whole answers"),
        ("beam:4", {"at_least": 3}, "whole answers"),
    ],
)
def test_what_cannot_be_is_one_sentence(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        outcome(name, ask(**more))


# --- trees ----------------------------------------------------------------------------------------


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


# --- evaluation -----------------------------------------------------------------------------------


def evaluation_of(way: Way | None, base: Folder, samples: int = 3) -> evaluate.Evaluation:
    problems = distinct_problems(family("countdown"), "eval", 0, 3)
    return evaluate.answered(base / "checkpoint", problems, samples, 24, 1.0, 1.0, 5, slots=16, way=way)


def test_one_draw_is_the_plain_evaluation(base: Folder) -> None:
    plain, drawn = evaluation_of(None, base), evaluation_of(Way(PathsConfig()), base)
    assert [[s.completion_ids for s in row] for row in drawn.samples] == [
        [s.completion_ids for s in row] for row in plain.samples
    ]
    assert drawn.verdicts == plain.verdicts
    figures = drawn.summary()
    assert figures["tokens_spent"] == figures["mean_tokens"] == plain.summary()["mean_tokens"]
    assert {
        k: v for k, v in figures.items() if not k.startswith(("tokens_s", "tokens_read", "tokens_j", "sec"))
    } == (plain.summary())
    assert drawn.of("countdown").summary()["tokens_spent"] == figures["tokens_spent"]
    assert plain.of("countdown").summary() == plain.summary()


def test_repeats_have_seeds_of_their_own_and_settled_ways_have_none(base: Folder) -> None:
    voted = evaluation_of(Way(PathsConfig.parse("vote:4")), base)
    assert voted.summary()["samples"] == 3
    assert voted.summary()["tokens_spent"] > 3 * voted.summary()["mean_tokens"]
    assert len({s.completion_ids for row in voted.samples for s in row}) > 3
    for name in ("greedy", "beam:2"):
        settled = evaluation_of(Way(PathsConfig.parse(name)), base)
        assert settled.summary()["samples"] == 1
        assert "stderr" in settled.summary()


def test_evaluations_without_paths_keep_their_fingerprints(tmp_path: Folder) -> None:
    """What was finished before there were paths is taken over by --reuse as before."""
    plain = evaluate.Config(problems="countdown")
    assert not {"paths", "thinking_budget", "think_at_least"} & plain.model_dump(mode="json").keys()
    assert evaluate.Config(thinking_budget=0).model_dump(mode="json")["thinking_budget"] == 0
    text = '[stages.e]\nkind = "eval"\nmodel = "x"\n'
    (tmp_path / "a.toml").write_text(text + 'paths = "vote:4"\n', encoding="utf-8")
    (tmp_path / "b.toml").write_text(text + 'paths = { kind = "vote", n = 4 }\n', encoding="utf-8")
    (tmp_path / "c.toml").write_text(text + 'paths = "vote:5"\n', encoding="utf-8")
    recipes = [load_recipe(tmp_path / f"{name}.toml") for name in "abc"]
    configs = [r.stages[0].config for r in recipes]
    assert isinstance(configs[0], evaluate.Config)
    assert configs[0].paths == PathsConfig(kind="vote", n=4)
    assert configs[0] == configs[1] != configs[2]
    (tmp_path / "again.toml").write_text(recipes[0].to_toml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml").stages[0].config.model_dump() == configs[0].model_dump()
    (tmp_path / "bad.toml").write_text(text + 'paths = "votes:4"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"stages.e.paths.*did you mean 'vote'"):
        load_recipe(tmp_path / "bad.toml")


def test_a_stage_by_paths_says_how_and_for_how_much(base: Folder, tmp_path: Folder) -> None:
    config = evaluate.Config(
        limit=3, samples=2, max_tokens=24, slots=16, paths=PathsConfig.parse("tree:2"), thinking_budget=8
    )
    context = Context(tmp_path / "2-eval", 0, {"base": base}, Silent())
    context._tensorboard = lambda step, metrics: None  # type: ignore[method-assign]
    evaluate.run(config, context)
    figures = json.loads((tmp_path / "2-eval" / "eval.json").read_text(encoding="utf-8"))
    assert figures["way"] == {
        "name": "tree:2", "kind": "tree", "number": 2, "by": "rollouts", "thinking_budget": 8,
        "think_at_least": 0,
    }  # fmt: skip
    assert figures["tokens_spent"] > figures["mean_tokens"] > 0
    assert figures["seconds"] > 0


def test_what_was_left_open_is_said() -> None:
    there = {"process": Folder("p"), "preference": Folder("q")}
    cases: list[tuple[str, dict[str, Folder], str | None]] = [
        ("best:2", {}, "preference"),
        ("best:2", there, "process"),
        ("best:2:preference", there, "preference"),
        ("tree", {}, "rollouts"),
        ("tree", there, "process"),
        ("tree:4:rollouts", there, "rollouts"),
        ("vote", there, None),
    ]
    for name, judges, by in cases:
        assert described(Way(PathsConfig.parse(name), judges=judges))["by"] == by  # type: ignore[arg-type]


def test_judges_are_told_apart_by_their_folders(tmp_path: Folder) -> None:
    for name, files in {"a": ["config.json"], "b": ["config.json", "calibration.json"], "c": []}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}", encoding="utf-8")
    a, b, c = (tmp_path / name for name in "abc")
    way = way_of("best:4", [a, b])
    assert way is not None
    assert way.judges == {"process": a, "preference": b}
    assert way_of(None, []) is None
    with pytest.raises(UserError, match="both process"):
        way_of("best:4", [a, a])
    with pytest.raises(UserError, match="no model that judges"):
        way_of("best:4", [c])
    with pytest.raises(UserError, match="--paths best:8"):
        way_of(None, [a])


def test_the_command(base: Folder) -> None:
    asked = ["eval", str(base / "checkpoint"), "--problems", "countdown", "--limit", "2", "--samples", "2"]
    asked += ["--max-tokens", "16", "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, [*asked, "--paths", "vote:3"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert figures["paths"] == "vote:3"
    assert figures["tokens_spent"] > figures["mean_tokens"]
    wrong = CliRunner().invoke(app, [*asked, "--paths", "vote:x"])
    assert isinstance(wrong.exception, UserError)
    assert "paths" not in json.loads(CliRunner().invoke(app, asked).output)


def test_progress_counts_answers() -> None:
    writer, told = local(), list[tuple[int, int]]()
    problems = distinct_problems(family("countdown"), "eval", 0, 2)
    answers_by(
        Way(PathsConfig.parse("vote:2")), writer, TEMPLATE, problems, samples=2, max_tokens=8,
        temperature=1.0, top_p=1.0, seed=0, progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert told == [(i, 4) for i in range(1, 5)]
