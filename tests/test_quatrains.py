"""The family ``verse``: its tones are the verifier's; careful poets keep the rules, careless ones do not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.grade import GradeItem, grade
from liubai.grade.tones import LEVEL as LEVEL_BIT
from liubai.grade.tones import OBLIQUE, book
from liubai.grade.verse import Reading, read_verse
from liubai.problems import Habits, family, problem_at, split_of, world_vocabulary
from liubai.problems.verse import FORM, IMAGES, LEVEL, RHYMES, STARTS, STATES, VERBS, images_of
from liubai.text.tokenizer import word_level

VERSE = family("verse")
TOKENIZER = word_level(world_vocabulary(["verse"]))
SEEDS = st.integers(0, 10**6)


def written(seed: int, habits: Habits) -> tuple[str, Reading]:
    """A document, and its poem read."""
    rng = random.Random(seed)
    problem = VERSE.found(rng, habits)
    text = VERSE.document(problem, rng, habits)
    verdict = grade(GradeItem("verse", problem.gold, text))
    assert verdict.error is None
    assert verdict.parts["format"] == 1
    assert verdict.answer is not None
    return text, read_verse(problem.gold, verdict.answer, problem.meta)


def test_its_tones_and_rhymes_are_those_of_the_verifier() -> None:
    pingshui = book("pingshui")
    for character in "".join((*IMAGES, VERBS, STATES)):
        assert pingshui.tones[character] == (LEVEL_BIT if character in LEVEL else OBLIQUE), character
    for name, group in RHYMES.items():
        shared = -1
        for character in group:
            shared &= pingshui.rhymes[character]
        assert shared, group
        assert name in group
    assert len(set(IMAGES)) == len(IMAGES)


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_a_careful_poet_keeps_the_rules(seed: int) -> None:
    text, reading = written(seed, Habits(blind=0, patient=1))
    # where a group is small a rhyme comes again, and a first line that ends in it rhymes with nothing
    assert reading.parts["tones"] >= 11 / 12
    assert reading.score > 0.8 * reading.factors["repeats"]  # which images come again, nobody minds
    start, rhyme, word = text.removeprefix("<think> ").partition(" </think>")[0].split()
    assert word == "韵"
    # what was planned is what was written
    assert start == STARTS[reading.types] or reading.parts["tones"] < 1
    assert any(line and line[-1] in RHYMES[rhyme] for line in reading.lines)


def test_the_careless_do_not_and_the_shares_are_as_asked() -> None:
    def mean(habits: Habits) -> tuple[float, float, float]:
        texts = [written(seed, habits) for seed in range(400)]
        planned = sum("韵" in text for text, _ in texts) / 400
        return sum(r.score for _, r in texts) / 400, sum(r.score == 1 for _, r in texts) / 400, planned

    blind, mixed, careful = (
        mean(h)
        for h in (Habits(blind=1), Habits(blind=0.6, stop=0.4, patient=0.1), Habits(blind=0, patient=1))
    )
    assert blind[0] < 0.55 < mixed[0] < 0.7 < 0.97 < careful[0]
    assert blind[1] < 0.01 < 0.03 < mixed[1] < 0.2 < 0.9 < careful[1]
    assert (blind[2], careful[2]) == (0, 1)
    assert mixed[2] == pytest.approx(0.4, abs=0.08)


@given(SEEDS, st.booleans())
@settings(deadline=None)
def test_documents_have_no_unknown_tokens_and_come_back(seed: int, blind: bool) -> None:
    problem = problem_at(VERSE, "train", 0, seed)
    text = f"{problem.prompt} {VERSE.document(problem, random.Random(seed), Habits(blind=float(blind)))}"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids).split() == text.split()


@given(SEEDS)
@settings(deadline=None)
def test_splits_go_by_the_two_images(seed: int) -> None:
    for split in ("train", "eval"):
        problem = problem_at(VERSE, split, seed, 3)  # type: ignore[arg-type]
        first, second = images_of(problem.prompt)
        turned = VERSE.problem(second, first)  # type: ignore[attr-defined]
        assert VERSE.key(problem) == VERSE.key(turned)
        assert split_of(f"verse/{VERSE.key(turned)}") == split
        assert problem.gold == FORM


@pytest.mark.parametrize(
    "prompt", ["", "五绝", "五绝 明 月", "七绝 明 月 孤 舟", "五绝 明 月 孤 舟 白", "五绝 月 明 孤 舟"]
)
def test_other_prompts_are_none(prompt: str) -> None:
    with pytest.raises(ValueError, match="a poem is asked for by"):
        images_of(prompt)


def test_its_words_are_added_for_itself_alone() -> None:
    assert not {"韵", "舟"} & {*world_vocabulary(), *world_vocabulary(["make", "countdown"])}
    both = world_vocabulary(["verse", "make"])
    assert both[: len(world_vocabulary(["make"]))] == world_vocabulary(["make"])
    assert set(VERSE.vocabulary) < set(both)
