"""What thoughts are worth: trees against sequences alone, models whose thoughts have a known worth, intervals
by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from bridging import thought
from conftest import Silent, tiny_config, tiny_model
from torch import Tensor, nn
from typer.testing import CliRunner

from liubai.commands.bridge import bridge as command
from liubai.commands.bridge import table
from liubai.errors import UserError
from liubai.measure import bridge_tree
from liubai.measure.bridge import CONTEXTS, Asked, Bridged, Written, bridge
from liubai.measure.bridge_figures import bootstrap, figures, forks
from liubai.measure.bridge_steps import Cutter, Frame, Piece, Thought
from liubai.measure.bridge_tree import ROOT, TokenTree, score
from liubai.model.transformer import Attend, Transformer
from liubai.stages import bridge as stage
from liubai.stages.context import Context
from liubai.text.tokenizer import TextTokenizer

pytest_plugins = ("bridging",)

# ---- trees ----


def alone(model: Transformer, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of ``ids[1:]``, float64: one row, no mask, no sharing."""
    with torch.no_grad():
        full = torch.log_softmax(model(torch.tensor([list(ids)]))[0].double(), -1)[:-1]
    return full.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], -(full.exp() * full).sum(-1)


def grown(seed: int, roots: int = 1) -> tuple[TokenTree, list[tuple[list[int], list[int]]]]:
    """A tree of random sequences over three words, so that many begin alike."""
    rng, tree, kept = random.Random(seed), TokenTree(), []
    for _ in range(rng.randint(2, 20)):
        ids = [rng.randrange(roots), *(rng.randrange(3) for _ in range(rng.randint(1, 12)))]
        kept.append((ids, tree.extend(ROOT, ids, [False] + [True] * (len(ids) - 1))))
    return tree, kept


ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen2ForCausalLM", "CrateForCausalLM",
                 "CrateAlphaForCausalLM")  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("held", [4096, 40, 1])
def test_a_node_scores_as_in_a_sequence_of_its_own(
    architecture: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_tree, "TOKENS", held)
    monkeypatch.setattr(bridge_tree, "WEIGHTS", 40 * held)
    heads = {"num_key_value_heads": 4} if architecture.startswith("Crate") else {}
    model = tiny_model(1, tiny_config(architecture, **heads))
    exact = tiny_model(1, tiny_config(architecture, **heads)).double()
    trees, kept = zip(*(grown(seed, roots=1 + seed % 3) for seed in range(8)), strict=True)
    assert any(len(tree) < sum(len(ids) for ids, _ in paths) for tree, paths in zip(trees, kept, strict=True))
    for scores, paths in zip(score(model, trees), kept, strict=True):
        for ids, nodes in paths:
            logprobs, entropies = alone(exact, ids)
            np.testing.assert_allclose(scores.logprobs_T[nodes[1:]], logprobs, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(scores.entropies_T[nodes[1:]], entropies, rtol=1e-4, atol=1e-4)
            assert math.isnan(scores.logprobs_T[nodes[0]])  # nobody asked, and nobody could tell


def test_a_tree_holds_each_beginning_once() -> None:
    tree = TokenTree()
    trunk = tree.extend(ROOT, [7, 8, 9])
    assert trunk == [0, 1, 2]
    left, right = tree.extend(trunk[1], [5, 6], [True, False]), tree.extend(trunk[1], [5, 7], True)
    assert left[0] == right[0]
    assert (tree.parents, tree.depths) == ([-1, 0, 1, 1, 3, 3], [0, 1, 2, 2, 3, 3])
    assert tree.scored == [False, False, False, True, False, True]
    assert (tree.trunk, tree.groups()) == (3, {1: [3, 4, 5]})
    with pytest.raises(ValueError, match="no probability"):
        tree.extend(ROOT, [1], True)
    assert score(tiny_model(), []) == []


# ---- models whose thoughts have a known worth ----


class Planted(nn.Module):
    """Says next what it has seen: the logit of a word is 10 times its share of the tokens up to here, each of
    which counts ``haste`` times as much as the one before it. At 1 order means nothing; above, it does."""

    def __init__(self, vocabulary: int, haste: float) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(10 * torch.eye(vocabulary))
        self.haste, self.config = haste, tiny_config(vocab_size=vocabulary)

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """By attention alone, so that whatever a mask lets through is seen."""
        V = len(self.head_weight)
        seen = nn.functional.one_hot(ids, V).float().unsqueeze(-2)
        key, query = torch.zeros_like(seen), torch.zeros_like(seen)
        key[..., 0] = positions.unsqueeze(-1) * math.log(self.haste)
        query[..., 0] = V**0.5  # attention divides by √E
        return attend(0, query, key, seen).squeeze(-2)

    def count_parameters(self) -> int:
        return self.head_weight.numel()


def told(haste: float, ids: Sequence[int], scored: Sequence[bool], vocabulary: int) -> float:
    """−log₂ p of the scored tokens of a sequence: the planted model by the book, in float64."""
    total = 0.0
    for t, counts in enumerate(scored):
        if not counts:
            continue
        weights = [haste**i for i in range(t)]
        logits = [0.0] * vocabulary
        for i in range(t):
            logits[ids[i]] += 10 * weights[i] / sum(weights)
        total += math.log2(sum(math.exp(x) for x in logits)) - logits[ids[t]] / math.log(2)
    return total


def measured(
    tokenizer: TextTokenizer, haste: float, texts: Sequence[str], right: tuple[str, ...] = ("1",),
    others: tuple[str, ...] = ("2",),
) -> tuple[list[Bridged], Cutter, list[Asked]]:  # fmt: skip
    """Two problems, ``texts`` written about each in turn."""
    cutter = Cutter(tokenizer, Frame())
    asked = [Asked(tuple(tokenizer.encode(f"{q} <think>")), right, others, "k") for q in ("q", "r")]
    written = [Written(i % 2, thought(tokenizer, t), t.count("1") > 0) for i, t in enumerate(texts)]
    model = Planted(tokenizer.vocab_size, haste)
    return bridge(model, cutter, asked, written), cutter, asked  # type: ignore[arg-type]


TEXTS = ("s s . wait 1 1 .", "2 2 . s wait 2 .", "1 . 1 1 s .", "s 3 . s s s 2 . wait 1 s .")


@pytest.mark.parametrize("haste", [1.0, 1.5])
def test_every_figure_of_a_planted_model(words: TextTokenizer, haste: float) -> None:
    found, cutter, asked = measured(words, haste, TEXTS)
    tail = cutter.tail("1")
    assert words.decode(tail.ids) == "</think> <answer> 1 </answer>"
    assert tail.scored == (False, False, True, True)  # the answer, and that it ends

    def cost(prompt: tuple[int, ...], ids: Sequence[int]) -> float:
        all_ids = [*prompt, *ids, *tail.ids]
        return told(haste, all_ids, [False] * (len(all_ids) - 4) + list(tail.scored), words.vocab_size)

    for i, b in enumerate(found):
        prompt, mine = asked[b.written.problem].prompt, b.written.thought
        assert b.nll["empty"] == pytest.approx(cost(prompt, ()), abs=1e-4)
        assert b.nll["own"] == pytest.approx(cost(prompt, mine.ids), abs=1e-4)
        foreign = found[(i + 1) % 4].written.thought  # the next one is about the other problem
        assert b.nll["foreign"] == pytest.approx(cost(prompt, foreign.ids), abs=1e-4)
        assert b.nll["another"] == pytest.approx(found[(i + 2) % 4].nll["own"])
        ends = [0, *(piece.cut for piece in mine.pieces)]
        assert b.curve == pytest.approx([cost(prompt, mine.ids[:end]) for end in ends], abs=1e-4)
        assert sum(b.gains) == pytest.approx(b.utility)
        assert len(b.token_entropy) == len(mine.ids) + 1  # and whether to go on
        perplexity = figures([b])["perplexity"]["all"]["own"]["mean"]
        assert perplexity == pytest.approx(2 ** (b.nll["own"] / 2))  # two tokens are scored
        ids = [*prompt, *mine.ids, tail.ids[0]]
        for t, surprise in enumerate(b.surprise, len(prompt)):
            one = told(haste, ids[: t + 1], [False] * t + [True], words.vocab_size)
            assert surprise == pytest.approx(one, abs=1e-4)


def test_a_thought_that_holds_the_answer_is_worth_more(words: TextTokenizer) -> None:
    holds, misleads = measured(words, 1.0, ["s s . 1 1 1 1 1 1 1 1 1 .", "s s . 2 2 2 2 2 2 2 2 2 ."])[0]
    assert holds.utility > 3 > 0 > misleads.utility
    assert holds.gains[0] < 1 < 2 < holds.gains[1]  # the second step has it


def test_order_counts_only_where_the_model_minds_it(words: TextTokenizer) -> None:
    for haste, same in ((1.0, True), (2.0, False)):
        for b in measured(words, haste, ["s s s . 1 1 1 1 ."] * 2)[0]:
            assert (abs(b.nll["shuffled"] - b.nll["own"]) < 1e-4) is same
            assert haste == 1.0 or b.nll["shuffled"] > b.nll["own"]  # of two steps there is one other order


def test_probabilities_of_several_right_answers_are_added(words: TextTokenizer) -> None:
    both = measured(words, 1.0, TEXTS, right=("1", "2"))[0]
    for b, one, two in zip(
        both, measured(words, 1.0, TEXTS)[0], measured(words, 1.0, TEXTS, right=("2",))[0], strict=True
    ):
        wanted = -math.log2(2 ** -one.nll["own"] + 2 ** -two.nll["own"])
        assert b.nll["own"] == pytest.approx(wanted, abs=1e-4)


def test_the_entropy_is_a_lower_bound_that_more_answers_tighten(words: TextTokenizer) -> None:
    """Against the distribution over all answers of at most two words, written out."""
    cutter = Cutter(words, Frame())
    asked_prompt = tuple(words.encode("q <think>"))
    V, stop = words.vocab_size, words.encode("</answer>")[0]
    base = [*asked_prompt, *thought(words, "1 1 2 .").ids, *words.encode("</think> <answer>")]

    def logp(ids: Sequence[int]) -> float:
        """log₂ p of the last of ``ids``."""
        return -told(1.0, ids, [False] * (len(ids) - 1) + [True], V)

    def entropy(ids: Sequence[int]) -> float:
        return -sum(2 ** logp([*ids, v]) * logp([*ids, v]) for v in range(V))

    one, two, three = (words.encode(w)[0] for w in "123")
    # H(first) + Σ_v p(v) H(next | v): the beginnings that are known
    first = entropy(base)
    wanted = {
        ("1",): first + 2 ** logp([*base, one]) * entropy([*base, one]),
        ("1", "2", "3"): first + sum(2 ** logp([*base, v]) * entropy([*base, v]) for v in (one, two, three)),
        ("1", "1 2"): first
        + 2 ** logp([*base, one]) * entropy([*base, one])
        + 2 ** (logp([*base, one]) + logp([*base, one, two])) * entropy([*base, one, two]),
    }
    whole = first + sum(2 ** logp([*base, v]) * entropy([*base, v]) for v in range(V) if v != stop)
    for answers, bits in wanted.items():
        asked = [Asked(asked_prompt, answers[:1], answers[1:])]
        written = [Written(0, thought(words, "1 1 2 ."), True)]
        (b,) = bridge(Planted(V, 1.0), cutter, asked, written)  # type: ignore[arg-type]
        assert b.entropy[-1] == pytest.approx(bits, abs=1e-3)
    assert wanted["1",] < wanted["1", "2", "3"] <= whole


def test_empty_thoughts_are_left_out_and_too_long_ones_refused(words: TextTokenizer) -> None:
    cutter = Cutter(words, Frame())
    asked = [Asked(tuple(words.encode("q <think>")), ("1",))]
    model = Planted(words.vocab_size, 1.0)
    empty, full = Thought((), (), ()), thought(words, "s 1 .")
    found = bridge(model, cutter, asked, [Written(0, empty, True), Written(0, full, True)])  # type: ignore[arg-type]
    assert [b.written.thought for b in found] == [full]
    assert found[0].nll.keys() == {"empty", "own", "shuffled"}  # nobody else has thought
    model.config = tiny_config(max_position_embeddings=8)
    with pytest.raises(UserError, match="lower max_tokens"):
        bridge(model, cutter, asked, [Written(0, full, True)])  # type: ignore[arg-type]


# ---- figures ----


def test_intervals_by_hand() -> None:
    """Of two problems the bootstrap draws AA, AB, BB with chances 1/4, 1/2, 1/4: with 3 values in A and 1 in
    B that is 0, 1/4 and 1, whatever the seed."""
    (e,) = bootstrap([0.0, 0.0, 0.0, 1.0], [5, 5, 5, 9], draws=4000)
    assert (e.mean, e.low, e.high, e.n) == (0.25, 0.0, 1.0, 4)
    wanted = math.sqrt((0 + 2 * 0.25**2 + 1) / 4 - (1.5 / 4) ** 2)
    assert e.stderr == pytest.approx(wanted, rel=0.05)


def test_intervals_cluster_by_problem() -> None:
    """Repeating every thought must not make an interval narrower; more problems must."""
    rng = np.random.default_rng(1)
    values, problems = rng.normal(size=40), np.arange(40)
    (once,) = bootstrap(values, problems.tolist())
    (often,) = bootstrap(np.repeat(values, 8), np.repeat(problems, 8).tolist())
    assert often.stderr == pytest.approx(once.stderr)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert once.stderr == pytest.approx(values.std() / math.sqrt(40), rel=0.1)


def test_intervals_of_little() -> None:
    gaps = bootstrap([[1.0, math.nan], [3.0, math.nan], [5.0, 2.0]], [0, 0, 1])
    assert (gaps[0].mean, gaps[0].n) == (3.0, 3)
    assert (gaps[1].mean, gaps[1].low, gaps[1].n) == (2.0, None, 1)
    assert bootstrap(np.empty((0, 2)), [])[1].mean is None
    assert bootstrap([1.0, 2.0], [3, 3])[0].low is None  # one problem


def made(problem: int, right: bool, curve: list[float], tokens: list[float], ids: tuple[int, ...]) -> Bridged:
    pieces = tuple(Piece("step", i, i % 2 == 1) for i in range(1, len(curve)))
    written = Written(problem, Thought(ids, pieces, ()), right)
    nll = {"empty": curve[0], "own": curve[-1], "shuffled": 3.0}
    return Bridged(written, 2.0, nll, curve, [c / 2 for c in curve], tokens, tokens)


def test_figures_are_plain_means() -> None:
    found = [
        made(0, True, [4.0, 3.0, 0.0], [1.0, 0.0], (7, 8)),
        made(0, False, [4.0, 6.0], [2.0], (7,)),
        made(1, True, [2.0, 1.0], [0.5], (9,)),
    ]
    told = figures(found, lambda id: f"w{id}")
    assert told["utility"]["all"]["mean"] == pytest.approx((4 - 2 + 1) / 3)
    assert told["utility"]["right"]["mean"] == pytest.approx(2.5)
    assert told["utility"]["wrong"]["mean"] == pytest.approx(-2)
    assert told["nll"]["right"]["own"]["mean"] == pytest.approx(0.5)
    assert told["nll"]["all"]["foreign"]["mean"] is None
    assert told["perplexity"]["right"]["empty"]["mean"] == pytest.approx(2 ** ((4 / 2 + 2 / 2) / 2))
    assert told["chance"]["right"]["own"]["mean"] == pytest.approx((1 + 0.5) / 2)
    assert told["thought"]["all"]["entropy"]["mean"] == pytest.approx(3.5 / 4)  # of tokens, not of thoughts
    assert told["gain"]["step"]["mean"] == pytest.approx((1 + 3 - 2 + 1) / 4)
    assert told["gain"]["right_step"]["mean"] == pytest.approx((1 - 2 + 1) / 3)
    assert told["gain"]["wrong_step"]["mean"] == pytest.approx(3)
    assert told["gain"]["costly"]["mean"] == pytest.approx(1 / 4)
    curve = [e["mean"] for e in told["curve"]["right"]["nll"]]
    assert curve[0] == pytest.approx(3.0)
    assert curve[5] == pytest.approx((3 + 2) / 2)  # half of two steps is one, half of one is none
    assert curve[-1] == pytest.approx(0.5)
    assert told["nll"].keys() == {"all", "right", "wrong"}
    assert tuple(told["nll"]["all"]) == CONTEXTS
    json.dumps(told, allow_nan=False)
    json.dumps(figures([]), allow_nan=False)


def test_forks_are_the_top_fifth() -> None:
    # ten tokens: the two of highest entropy are forks, both of word 7
    found = [
        made(0, True, [1.0, 0.0], [0.1, 3.0, 0.2, 0.1, 0.1], (8, 7, 8, 8)),  # the last is that of the end
        made(1, True, [1.0, 0.0], [2.0, 0.1, 0.1, 0.1, 0.2], (7, 7, 8, 9)),
    ]
    told = forks(found, lambda id: f"w{id}")
    assert told["tokens"] == 10
    assert told["threshold"] == 2.0
    assert told["carry"] == pytest.approx(5.0 / 6.0)
    assert told["words"] == [
        {"word": "w7", "forking": 2, "written": 3, "entropy": pytest.approx(5.1 / 3)},
    ]


# ---- the stage ----


@pytest.mark.usefixtures("_no_tensorboard")
def test_a_stage_writes_what_the_report_reads(base: Path, tmp_path: Path) -> None:
    config = stage.Config(
        problems={"countdown": 1.0, "chain": 1.0}, label="Base", limit=6, samples=3, max_tokens=64
    )
    context = Context(tmp_path / "2-bridge", 0, {"base": base}, Silent())
    stage.run(config, context)
    told = json.loads((context.folder / "bridge.json").read_text())
    assert told["label"] == "Base"
    assert told["gold"] == {"written": 3, "gold": 3}
    assert told["thoughts"] + round(told["empty"] * 18) == 18
    rows = [json.loads(line) for line in (context.folder / "thoughts.jsonl").read_text().splitlines()]
    assert len(rows) == told["thoughts"] > 0
    assert all(len(r["curve"]) == len(r["entropy"]) == len(r["steps"]) + 1 for r in rows)
    assert told["utility"]["all"]["mean"] == pytest.approx(
        np.mean([r["curve"][0] - r["curve"][-1] for r in rows]), abs=1e-3
    )
    assert {r["family"] for r in told["shown"]} == {"countdown", "chain"}
    again = Context(tmp_path / "3-bridge", 0, {"base": base}, Silent())
    stage.run(config, again)
    assert (again.folder / "thoughts.jsonl").read_bytes() == (context.folder / "thoughts.jsonl").read_bytes()


def test_the_command_prints_a_table_or_json_and_writes_a_page(base: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    asked = [str(base / "checkpoint"), "--problems", "chain", "--limit", "4", "--samples", "2"]
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(app, [*asked, "--out", str(page)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "bits that the thought buys" in shown.stdout
    assert "about 4 problems" in shown.stdout
    assert "1-base" in page.read_text(encoding="utf-8")
    one = [*asked[:3], "--limit", "1", "--samples", "1"]
    assert "about 1 problem (" in CliRunner().invoke(app, one, catch_exceptions=False).stdout
    silent = {"n_problems": 3, "samples": 2, "thoughts": 0, "right": 0, "empty": 1.0, "gold": {"none": 1}}
    assert table(silent).splitlines() == [
        "0 thoughts about 3 problems (0 led to a right answer); 100.0% of the 3 × 2 answers came without a "
        "thought",
        "There was no thought to measure.",
        "1 problem without a known right answer left out",
    ]
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert told["label"] == "1-base"
    assert told["n_problems"] == 4
    with pytest.raises(UserError, match="positions"):
        CliRunner().invoke(app, [*asked, "--max-tokens", "5000"], catch_exceptions=False)


@pytest.fixture
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
