"""Thoughts as tokens that are cut, closed and shuffled, and the answers that they are measured by."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch
from bridging import thought
from conftest import tiny_config, tiny_model
from torch import Tensor

from liubai.grade import GradeItem, Verdict, grade
from liubai.measure.bridge import Asked, Written, bridge
from liubai.measure.bridge_gold import golds
from liubai.measure.bridge_steps import MOST_STEPS, Cutter, Frame, Piece, Thought, cuts, frame_of, shuffled
from liubai.model.transformer import Transformer
from liubai.problems import family
from liubai.problems.countdown import parse, tries
from liubai.problems.family import distinct_problems
from liubai.text.tokenizer import TextTokenizer, byte_level, word_level
from liubai.types import Problem

pytest_plugins = ("bridging",)


def alone(model: Transformer, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of ``ids[1:]``, float64: one row, no mask, no sharing."""
    with torch.no_grad():
        full = torch.log_softmax(model(torch.tensor([list(ids)]))[0].double(), -1)[:-1]
    return full.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], -(full.exp() * full).sum(-1)


def test_steps_of_the_family_are_the_steps(world_wide: TextTokenizer) -> None:
    problem = Problem("total a 3 b 7 c 2", "12", "number", "total")
    response = "a 3 plus b 7 is 10 uh plus c 2 is 13 hm </think> <answer> 13 </answer>"
    made = Cutter(world_wide, Frame()).thought(problem, world_wide.encode(response), True)
    assert made is not None
    assert [(p.text, p.right) for p in made.pieces] == [
        ("a 3 plus b 7 is 10", True),
        ("uh plus c 2 is 13 hm", False),  # in its own words; what is muttered at the end belongs to it
    ]
    assert [p.cut for p in made.pieces] == [7, 14]
    assert len(made.ids) == 14
    assert all(made.words)


@pytest.fixture(scope="module")
def world_wide() -> TextTokenizer:
    return word_level(family("total").vocabulary)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one\n\ntwo\nthree", ["one", "two", "three"]),
        ("It is 3.11. No? Yes!", ["It is 3.11.", "No?", "Yes!"]),
        ("3 + 4 =7 :2 wait 3 * 4 =12 :3", ["3 + 4 =7 :2", "wait 3 * 4 =12 :3"]),
        ("先算。等等不对", ["先算。", "等等", "不对"]),
        ("3 , 7 : 0 , 2 : 2", ["3 ,", "7 : 0 ,", "2 : 2"]),
        ("nothing to cut", ["nothing to cut"]),
        ("  \n end \n ", ["end"]),
    ],
)
def test_where_nobody_knows_steps_they_are_cut_by_form(text: str, wanted: list[str]) -> None:
    at = cuts(f"<think>{text}</think>", 7, 7 + len(text))
    assert (at[0], at[-1]) == (7, 7 + len(text))
    pieces = [f"<think>{text}</think>"[a:b].strip() for a, b in itertools.pairwise(at)]
    assert pieces == wanted


def test_bytes_and_whole_words_are_cut_at_the_same_places() -> None:
    """With a tokenizer in which a Chinese character is several tokens."""
    text = "先 算 三。 再 算 四。\nthen wait for it"
    tokenizer = byte_level(["plain English has none of them <think> </think> <answer> </answer>"], 300)
    response = f"{text} </think> <answer> 5 </answer>"
    ids = tokenizer.encode(response)
    cutter = Cutter(tokenizer, frame_of([response]))
    assert cutter.ends(ids)[-1] == len(response)
    made = cutter.thought(Problem("q", "5", "math"), ids, True)
    assert made is not None
    assert [p.text for p in made.pieces] == ["先 算 三。", "再 算 四。", "then", "wait for it"]
    cut = made.pieces[1].cut
    assert tokenizer.decode(made.ids[:cut]).strip() == "先 算 三。 再 算 四。"
    assert tokenizer.decode(made.ids) in (text, f"{text} ")


def test_a_cut_before_a_second_thought_is_before_its_token(words: TextTokenizer) -> None:
    """The blank before a word belongs to the word's token, with whole words and with bytes alike."""
    text = "s 1 wait s 2"
    merged = byte_level([f"{text} </think> <answer> 1 </answer>"] * 9, 400)
    for tokenizer, cut in ((words, 2), (merged, None)):
        ids = tokenizer.encode(f"{text} </think> <answer> 1 </answer>")
        made = Cutter(tokenizer, Frame()).thought(Problem("q", "1", "number", "nobody's"), ids, True)
        assert made is not None
        assert [piece.text for piece in made.pieces] == ["s 1", "wait s 2"]
        assert tokenizer.decode(made.ids[: made.pieces[0].cut]).strip() == "s 1"
        assert cut is None or made.pieces[0].cut == cut


def test_a_blank_before_the_end_of_the_thought_is_written_once() -> None:
    """Against sequences alone, of a tokenizer and a manner of writing that are not the small world's."""
    tokenizer = byte_level(["one two <think> </think> <answer> </answer>"], 300)
    model = tiny_model(2, tiny_config(vocab_size=tokenizer.vocab_size))
    response = "one. \n\ntwo.\n</think>\n\n<answer>57</answer>"
    cutter = Cutter(tokenizer, frame_of([response]))
    problem, prompt = Problem("q", "57", "number"), tokenizer.encode("q <think>")
    mine = cutter.thought(problem, tokenizer.encode(response), True)
    assert mine is not None
    assert [p.text for p in mine.pieces] == ["one.", "two."]
    (b,) = bridge(model, cutter, [Asked(tuple(prompt), ("57",))], [Written(0, mine, True)])
    bare, blank = "</think>\n\n<answer>57</answer>", "\n</think>\n\n<answer>57</answer>"
    ended = [False, tokenizer.decode(mine.ids[: mine.pieces[0].cut])[-1:].isspace(), True]
    for cut, has_it, cost in zip([0, mine.pieces[0].cut, len(mine.ids)], ended, b.curve, strict=True):
        tail = tokenizer.encode(bare if has_it else blank)
        counted = len(tokenizer.encode("57</answer>"))
        logprobs, _ = alone(model, [*prompt, *mine.ids[:cut], *tail])
        assert cost == pytest.approx(-float(logprobs[-counted:].sum()) / math.log(2), abs=1e-3)


def test_a_thought_that_never_ends_and_one_that_never_begins(words: TextTokenizer) -> None:
    cutter, problem = Cutter(words, Frame()), Problem("q", "1", "number")
    cut_off = cutter.thought(problem, words.encode("s s . s"), True)
    assert cut_off is not None
    assert words.decode(cut_off.ids) == "s s . s"
    assert cutter.thought(problem, words.encode("<answer> 1 </answer>"), False) is None
    assert cutter.thought(problem, words.encode("</think> <answer> 1 </answer>"), True) == Thought((), (), ())
    inside = cutter.thought(problem, words.encode("<think> s </think> <answer> 1 </answer>"), False)
    assert inside is not None
    assert words.decode(inside.ids) == "s"


def test_many_steps_become_fewer(words: TextTokenizer) -> None:
    made = thought(words, "s . " * 150)
    assert len(made.pieces) <= MOST_STEPS
    assert made.pieces[-1].cut == len(made.ids) == 300


def test_the_frame_is_the_models_own() -> None:
    spaced = "x </think> <answer> 7 </answer>"
    assert frame_of([spaced, spaced, "y</think>\n<answer>7</answer>"]) == Frame((" ", " ", " ", " "))
    assert frame_of(["y\n</think>\n\n<answer>7</answer>"]).around(False) == (
        "\n</think>\n\n<answer>",
        "</answer>",
    )
    assert frame_of(["y\n</think>\n\n<answer>7</answer>"]).around(True)[0] == "</think>\n\n<answer>"
    assert frame_of(["z</think> so \\boxed{7}"]).around(True) == ("</think>\n\n\\boxed{", "}")
    assert frame_of(["no frame at all"]) == Frame()


def test_only_a_new_order_is_a_shuffle(words: TextTokenizer) -> None:
    made = thought(words, "s 1 . s 2 . s 3 .", steps=3)
    for seed in range(20):
        mixed = shuffled(made, random.Random(seed))
        assert mixed is not None
        assert mixed != made.ids
        parts = [mixed[i : i + 3] for i in range(0, 9, 3)]
        assert sorted(parts) == sorted(made.ids[i : i + 3] for i in range(0, 9, 3))  # whole steps
    single = shuffled(thought(words, "s 1 2", steps=1), random.Random(0))
    assert single is not None
    assert sorted(single) == sorted(words.encode("s 1 2"))
    assert shuffled(thought(words, "s s s"), random.Random(0)) is None


def test_unlike_steps_of_one_word_have_no_other_order(words: TextTokenizer) -> None:
    """Its steps are "wait wait" and "wait": in any order the same three tokens."""
    ids = tuple(words.encode("wait wait wait"))
    stuck = Thought(ids, (Piece("wait wait", 2), Piece("wait", 3)), (True, True, True))
    for made in (stuck, thought(words, "wait wait wait")):
        assert shuffled(made, random.Random(0)) is None
    # and where two of three say the same, there is one
    mixed = Thought((5, 5, 6), (Piece("a", 1), Piece("a", 2), Piece("b", 3)), (True, True, True))
    assert shuffled(mixed, random.Random(0)) in {(5, 6, 5), (6, 5, 5)}


# ---- which answer ----


def judged(items: Sequence[GradeItem]) -> list[Verdict]:
    return [grade(item) for item in items]


def test_gold_is_gold_where_it_is_an_answer() -> None:
    problems = [Problem("q", "12", "number"), Problem("q", "3.80", "number")]
    found = golds(problems, [[], []], judged, lambda answer: True)
    assert [(g.answers, g.source) for g in found] == [(("12",), "gold"), (("3.80",), "gold")]
    (unwritable,) = golds(problems[:1], [["12.0"]], judged, lambda answer: answer != "12")
    assert (unwritable.answers, unwritable.source) == (("12.0",), "own")


def test_of_a_specification_all_right_answers_are_known() -> None:
    problem = distinct_problems(family("make"), "eval", 0, 12)
    mine = [["( 1 + 1 ) + 1"]] * len(problem)  # whatever a model says changes nothing
    for p, gold in zip(problem, golds(problem, mine, judged, lambda answer: True), strict=True):
        assert gold.source == "written"
        assert all(
            grade(GradeItem(p.verifier, p.gold, f"<answer>{a}</answer>")).correct for a in gold.answers
        )
        numbers, target = parse(p.gold)
        assert set(gold.answers) == {t.answer() for t in tries(numbers) if t.value == target}
        assert len(set(gold.answers)) == len(gold.answers)
    spec = Problem("q", "3 4 5 ->35", "countdown", "nobody's")
    own, none = golds([spec, spec], [["( 3 + 4 ) * 5"], []], judged, lambda answer: True)
    assert (own.source, own.answers) == ("own", ("( 3 + 4 ) * 5",))
    assert (none.source, none.answers) == ("none", ())
