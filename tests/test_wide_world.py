"""The wide world: problems that repeat and are split, true documents, words that stand for one thing."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.grade import GradeItem, check_verifier, grade
from liubai.problems import (
    FAMILIES,
    SMALL,
    WIDE,
    Habits,
    family,
    lexicon,
    problem_at,
    split_of,
    world_vocabulary,
)
from liubai.problems.countdown import apply
from liubai.problems.errand import TIMES, UNSAFE
from liubai.problems.family import CAREFUL
from liubai.problems.lexicon import (
    CHINESE,
    COLOURS,
    ENGLISH,
    FILLERS,
    LANGUAGES,
    NAMES,
    THINGS,
    answered,
    translate,
)
from liubai.text.tokenizer import TAGS, UNKNOWN, word_level
from liubai.types import Problem

NAMED = [f.name for f in WIDE]
SOME = st.sampled_from(NAMED)
INDICES = st.integers(0, 10**6)
#: Everything that people of the wide world do, often.
WILD = Habits(blind=0.2, stop=0.3, patient=0.5, hopeless=0.3, mixed=0.7, muttered=0.5, careless=0.4, rude=0.5)
#: An English text does not say these, a Chinese one not those.
FOREIGN = {"en": set(ENGLISH), "zh": set(CHINESE)}


def other_language(problem: Problem) -> Problem:
    language = "zh" if problem.language == "en" else "en"
    prompt, gold = (translate(text, language) for text in (problem.prompt, problem.gold))
    return replace(problem, prompt=prompt, gold=gold, language=language)


def other_orders(problem: Problem, rng: random.Random) -> Iterator[Problem]:
    """The same question with its numbers or sentences in another order, without the family's help."""
    words = problem.prompt.split()
    match problem.family:
        case "make":
            for numbers in permutations(words[1:4]):
                gold = " ".join([*numbers, words[4]])
                yield replace(problem, prompt=f"{words[0]} {gold}", gold=gold)
        case "total":
            words[2::2] = rng.sample(words[2::2], len(words[2::2]))  # under the names a, b, c, …
            yield replace(problem, prompt=" ".join(words))
        case "greater":
            yield replace(problem, prompt=" ".join(words[::-1]))
        case "passage":
            sentences = re.findall(r"[^.]+ \.", problem.prompt)
            facts = problem.gold.split(" , ")
            for order in permutations(range(len(facts))):
                told = [*(sentences[i].strip() for i in order), words[-1]]
                yield replace(problem, prompt=" ".join(told), gold=" , ".join(facts[i] for i in order))


def right_answer(problem: Problem) -> str:
    """Found by search, or read off the prompt by other means than the family's own."""
    words = translate(problem.prompt, "en").split()
    match problem.family:
        case "make":
            target = int(words[4].removeprefix("->"))
            for (a, b, c), op, op2 in product(permutations(map(int, words[1:4])), "+-*", "+-*"):
                if apply(apply(a, op, b), op2, c) == target:
                    return f"( {a} {op} {b} ) {op2} {c}"
            raise AssertionError(f"no answer: {problem.prompt}")
        case "total":
            return str(sum(int(word) for word in words if word.isdigit()))
        case "greater":
            return max(words[0], words[2], key=float)
        case "solve":
            factor, sign, shift, result = int(words[1]), words[4], int(words[5]), int(words[7])
            return str(next(x for x in range(100) if apply(factor * x, sign, shift) == result))
        case "passage":
            told = re.findall(r"(\w+) has (\d) \w+ (\w+) \.", " ".join(words))
            return translate(" , ".join(map(" ".join, told)), problem.language)
    match words[1:]:
        case [_, thing] if thing in UNSAFE:
            said = "sorry cannot"
        case ["say", *what, times]:
            said = " ".join(["gladly", *what * TIMES[times]])
        case ["name", count, kind]:
            pool = {"colours": COLOURS, "names": NAMES, "things": THINGS}[kind]
            said = f"gladly {' , '.join(list(pool)[: int(count)])}"
        case ["greet", *names]:
            said = f"gladly hello {' , '.join(names)}"
    return translate(said, problem.language)


def thought_and_answer(document: str) -> tuple[str, str]:
    match = re.fullmatch(r"<think> (.*?) ?</think> <answer> (.+) </answer>", document)
    assert match, document
    return match[1], match[2]


# --- problems -------------------------------------------------------------------------------------


@given(SOME, st.sampled_from(["train", "eval"]), st.integers(0, 9), INDICES)
def test_problems_and_documents_are_a_function_of_seed_split_and_index(
    name: str, split: str, seed: int, index: int
) -> None:
    one, other = (problem_at(family(name), split, seed, index) for _ in range(2))  # type: ignore[arg-type]
    assert one == other
    assert (one.family, one.verifier) == (name, FAMILIES[name].verifier)
    assert split_of(f"{name}/{FAMILIES[name].key(one)}") == split
    texts = [FAMILIES[name].document(p, random.Random(seed), WILD) for p in (one, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NAMED)
def test_seeds_and_indices_give_other_problems_in_both_languages(name: str) -> None:
    listed = [[problem_at(family(name), "train", seed, i) for i in range(200)] for seed in (0, 1)]
    assert listed[0] != listed[1]
    assert all(len({p.prompt for p in row}) > 80 for row in listed)
    share = sum(p.language == "zh" for row in listed for p in row) / 400
    assert 0.4 < share < 0.6
    assert {p.language for row in listed for p in row} == set(LANGUAGES)


@pytest.mark.parametrize("name", NAMED)
def test_train_and_eval_are_disjoint(name: str) -> None:
    keys = {
        split: {
            FAMILIES[name].key(problem_at(family(name), split, seed, i))
            for seed in (0, 1)
            for i in range(300)
        }
        for split in ("train", "eval")
    }
    assert not keys["train"] & keys["eval"]
    assert len(keys["eval"]) > 40


@settings(max_examples=200)
@given(SOME, INDICES, st.randoms(use_true_random=False))
def test_no_language_and_no_order_moves_a_problem(name: str, index: int, rng: random.Random) -> None:
    problem = problem_at(family(name), "train", 0, index)
    key = FAMILIES[name].key(problem)
    assert all(FAMILIES[name].key(other) == key for other in other_orders(problem, rng))
    assert FAMILIES[name].key(other_language(problem)) == key
    assert other_language(other_language(problem)) == problem


def test_a_passage_is_the_same_in_other_colours() -> None:
    passage = FAMILIES["passage"]
    problem = problem_at(passage, "train", 0, 3)
    redder = replace(problem, prompt=re.sub("|".join([*COLOURS, *COLOURS.values()]), "red", problem.prompt))
    assert redder != problem
    assert passage.key(redder) == passage.key(problem)


@pytest.mark.parametrize("name", NAMED)
def test_other_problems_have_other_keys(name: str) -> None:
    """A key that forgot a part of the problem would hold too much out."""
    problems = [problem_at(family(name), "train", 0, i) for i in range(400)]
    asked = {  # what is left when language, colours and the order of words do not count
        (*sorted(w for w in translate(p.prompt, "en").split() if name == "errand" or w not in COLOURS),)
        for p in problems
    }
    same_words = {"passage", "solve"}  # solve 3 * x + 4 = 5 and 4 * x + 3 = 5 have the same words
    keys = {FAMILIES[name].key(p) for p in problems}
    assert len(keys) >= len(asked) if name in same_words else len(keys) == len(asked)


def test_make_has_hopeless_problems_only_where_people_write_about_them() -> None:
    for hopeless in (0.0, 0.4, 1.0):
        rng, without = random.Random(0), 0
        for _ in range(400):
            problem = FAMILIES["make"].found(rng, Habits(hopeless=hopeless))
            try:
                right_answer(problem)
            except AssertionError:
                without += 1
        assert without / 400 == pytest.approx(hopeless, abs=0.0 if hopeless in (0, 1) else 0.06)


# --- answers --------------------------------------------------------------------------------------

WORLD = word_level(world_vocabulary(["make"]))


@settings(max_examples=200)
@given(SOME, INDICES)
def test_right_answers_pass_and_the_question_does_not(name: str, index: int) -> None:
    problem = problem_at(family(name), "train", 0, index)
    check_verifier(problem.verifier)
    said = right_answer(problem)
    if name in ("total", "greater", "solve", "passage"):
        assert said == problem.gold
    for answer, correct in ((said, True), (problem.prompt, False)):
        text = answered("", answer)
        # as the model says it: through the tokenizer and back
        for response in (text, WORLD.decode(WORLD.encode(text))):
            verdict = grade(GradeItem(problem.verifier, problem.gold, response, problem.meta))
            assert verdict.error is None
            assert verdict.correct is correct


@settings(max_examples=200)
@given(SOME, INDICES, st.integers(0, 99))
def test_careful_documents_are_right_and_well_formed(name: str, index: int, seed: int) -> None:
    problem = problem_at(family(name), "train", 0, index)
    text = FAMILIES[name].document(problem, random.Random(seed), CAREFUL)
    verdict = grade(GradeItem(problem.verifier, problem.gold, text))
    assert verdict.parts == {"correct": 1.0, "format": 1.0}
    thought, answer = thought_and_answer(text)
    assert thought, "careful people think"
    # and they keep to the question's language, thought and answer
    assert not {*thought.split(), *answer.split()} & FOREIGN[problem.language]
    assert not set(thought.split()) & {*FILLERS, *FILLERS.values()}


@settings(max_examples=200)
@given(SOME, INDICES)
def test_documents_of_all_people_are_well_formed(name: str, seed: int) -> None:
    rng = random.Random(seed)
    problem = FAMILIES[name].found(rng, WILD)
    verdict = grade(GradeItem(problem.verifier, problem.gold, FAMILIES[name].document(problem, rng, WILD)))
    assert verdict.error is None
    assert verdict.parts["format"] == 1.0


@pytest.mark.parametrize("name", ["make", "total", "solve"])
def test_blind_answers_are_mostly_wrong_where_it_matters(name: str) -> None:
    right = 0
    for i in range(400):
        problem = problem_at(family(name), "train", 0, i)
        text = FAMILIES[name].document(problem, random.Random(i), Habits(blind=1.0))
        right += grade(GradeItem(problem.verifier, problem.gold, text)).correct
    assert 0 < right < 0.2 * 400


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_prompts_and_documents_have_the_words_of_their_family_only(name: str) -> None:
    own = {*FAMILIES[name].vocabulary, *TAGS}
    tokenizer = word_level(world_vocabulary([name]))
    rng, seen = random.Random(0), set[str]()
    for _ in range(2000):
        problem = FAMILIES[name].found(rng, WILD)
        text = f"{problem.prompt} {FAMILIES[name].document(problem, rng, WILD)}"
        ids = tokenizer.encode(text)
        # a decimal is three tokens; all other words are one, so that nothing changes on the way
        assert tokenizer.decode(ids) == re.sub(r"(\d)\.(\d)", r"\1 . \2", text)
        seen |= {tokenizer.decode([i]) for i in ids}
    assert UNKNOWN not in seen
    assert seen <= own
    words = {word for word in FAMILIES[name].vocabulary if word in CHINESE or word in ENGLISH}
    assert words <= seen, "and no word for nothing"


@pytest.mark.parametrize("name", NAMED)
def test_prompts_are_in_their_language(name: str) -> None:
    for i in range(300):
        problem = problem_at(family(name), "train", 0, i)
        words = set(problem.prompt.split())
        assert not words & FOREIGN[problem.language]
        assert words & FOREIGN[other_language(problem).language], "there is something to tell it by"


def test_the_wide_world_leaves_the_small_one_as_it_was() -> None:
    """A base of the small world has these ids in its weights."""
    small = world_vocabulary()
    digest = hashlib.blake2b("\n".join(small).encode(), digest_size=8).hexdigest()
    assert (len(small), digest) == (416, "0d6ab2969b973533")
    assert small == world_vocabulary(["countdown"]) == world_vocabulary(f.name for f in SMALL)
    wide = world_vocabulary(["make"])
    assert len(wide) == len(set(wide))
    assert wide[: len(small)] == small
    assert all(world_vocabulary([name]) == wide == world_vocabulary(["chain", name]) for name in NAMED)
    tokenizer = word_level(small)
    assert [tokenizer.id_of(word) for word in small] == [WORLD.id_of(word) for word in small]


def test_every_word_stands_for_one_thing() -> None:
    derived = ("CHINESE", "ENGLISH", "INTO")
    tables = [t for name, t in vars(lexicon).items() if isinstance(t, dict) and name.isupper()]
    tables = [table for table in tables if table not in [vars(lexicon)[name] for name in derived]]
    assert all(table in tables for table in (lexicon.WORDS, NAMES, FILLERS))
    english = [word for table in tables for word in table]
    chinese = [word for table in tables for word in table.values()]
    both = [*english, *chinese]
    assert len(both) == len(set(both)) == 2 * len(CHINESE)
    assert set(CHINESE) == set(english)
    assert {ENGLISH[c]: c for c in chinese} == CHINESE
    assert all(re.fullmatch(r"[a-z]+", word) for word in english)
    assert all(re.fullmatch(r"[\u4e00-\u9fff]+", word) for word in chinese)
    assert not set(both) & {"x", *map(str, range(100)), *"+-*=.,()"}


LEXICON = st.sampled_from([*CHINESE, *ENGLISH, "7", "=7", "->7", "x", ".", ",", "3.8", "<think>", "foo"])


@given(st.lists(LEXICON, max_size=20))
def test_translating_there_and_back_changes_nothing(words: list[str]) -> None:
    text = " ".join(words)
    for one, other in (LANGUAGES, LANGUAGES[::-1]):
        there = translate(text, one)
        assert translate(there, one) == there
        assert not set(there.split()) & FOREIGN[one]
        assert len(there.split()) == len(words)
        assert translate(translate(there, other), one) == there
    kept = [word for word in words if word not in CHINESE and word not in ENGLISH]
    assert translate(" ".join(kept), "zh") == " ".join(kept)
