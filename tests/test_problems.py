"""Families: reproducible, split without overlap, solvable, and true in every step they show."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.grade import GradeItem, check_verifier, grade
from liubai.problems import FAMILIES as ALL
from liubai.problems import SMALL, Habits, family, problem_at, split_of, world_vocabulary
from liubai.problems.chain import Chain
from liubai.problems.chain import parse as parse_chain
from liubai.problems.compare import Compare, Decimal
from liubai.problems.compare import parse as parse_compare
from liubai.problems.countdown import apply, tries
from liubai.problems.countdown import parse as parse_countdown
from liubai.text.tokenizer import UNKNOWN, word_level
from liubai.types import Problem

#: the wide world's have tests of their own
FAMILIES = {f.name: f for f in SMALL}
NAMES = st.sampled_from(sorted(FAMILIES))
THINKERS = Habits(blind=0.0)
TOKENIZER = word_level(world_vocabulary())


def right_answer(problem: Problem) -> str:
    """Found by search or by other arithmetic than the family's own."""
    if problem.family == "countdown":
        numbers, target = parse_countdown(problem.gold)
        return next(t.answer() for t in tries(numbers) if t.value == target)
    if problem.family == "chain":
        return str(sum(map(int, problem.prompt.split()[1:-2])) % 10)
    return max(problem.prompt.split(" or "), key=float)


def document(problem: Problem, seed: int, habits: Habits = THINKERS) -> str:
    return FAMILIES[problem.family].document(problem, random.Random(seed), habits)


@given(NAMES, st.sampled_from(["train", "eval"]), st.integers(0, 9), st.integers(0, 10**6))
def test_problems_are_a_function_of_seed_split_and_index(
    name: str, split: str, seed: int, index: int
) -> None:
    one, other = (problem_at(family(name), split, seed, index) for _ in range(2))  # type: ignore[arg-type]
    assert one == other
    key = FAMILIES[name].key(one)
    assert split_of(f"{name}/{key}") == split
    assert document(one, seed) == document(other, seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_train_and_eval_keys_are_disjoint(name: str) -> None:
    keys = {
        split: {
            FAMILIES[name].key(problem_at(family(name), split, seed, i))
            for seed in (0, 1)
            for i in range(300)
        }
        for split in ("train", "eval")
    }
    assert not keys["train"] & keys["eval"]
    assert min(map(len, keys.values())) > 100


@given(st.lists(st.integers(0, 9), min_size=8, max_size=16), st.randoms())
def test_reordered_problems_stay_in_their_split(digits: list[int], rng: random.Random) -> None:
    chain, countdown, compare = Chain(), FAMILIES["countdown"], Compare()
    mixed = rng.sample(digits, len(digits))
    assert chain.key(chain.problem(tuple(digits))) == chain.key(chain.problem(tuple(mixed)))
    a, b = Decimal(digits[0], 11 + digits[1]), Decimal(digits[2], 1 + digits[3])
    if a.value() != b.value():
        assert compare.key(compare.problem(a, b)) == compare.key(compare.problem(b, a))
    three = tuple(d + 1 for d in digits[:3])
    texts = [f"{' '.join(map(str, order))} ->9" for order in (three, three[::-1])]
    keys = {countdown.key(Problem(text, text, "countdown")) for text in texts}
    assert len(keys) == 1


@given(NAMES, st.integers(0, 10**6))
def test_gold_verifies_and_the_question_does_not(name: str, index: int) -> None:
    problem = problem_at(family(name), "train", 0, index)
    check_verifier(problem.verifier)
    for answer, correct in ((right_answer(problem), True), (problem.prompt, False)):
        text = f"<think> </think> <answer> {answer} </answer>"
        # as the model says it: through the tokenizer and back
        for response in (text, TOKENIZER.decode(TOKENIZER.encode(text))):
            verdict = grade(GradeItem(problem.verifier, problem.gold, response, problem.meta))
            assert verdict.error is None
            assert verdict.correct is correct


@settings(max_examples=200)
@given(NAMES, st.integers(0, 10**6), st.booleans())
def test_prompts_and_documents_have_no_unknown_tokens(name: str, index: int, blind: bool) -> None:
    problem = problem_at(family(name), "train", 0, index)
    text = f"{problem.prompt} {document(problem, index, Habits(blind=float(blind), chinese=0.5))}"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.id_of(UNKNOWN) not in ids
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids
    own = {*FAMILIES[name].vocabulary, "<think>", "</think>", "<answer>", "</answer>"}
    assert {TOKENIZER.decode([i]).strip() for i in ids} <= own


@given(NAMES, st.integers(0, 10**6), st.booleans())
def test_documents_are_well_formed_and_patient_thinkers_are_right(name: str, index: int, blind: bool) -> None:
    problem = problem_at(family(name), "train", 0, index)
    habits = Habits(blind=float(blind), stop=0.0)
    verdict = grade(GradeItem(problem.verifier, problem.gold, document(problem, index, habits)))
    assert verdict.parts["format"] == 1.0
    assert verdict.error is None
    assert blind or verdict.correct


@given(st.integers(0, 10**6))
def test_chain_steps_are_true(index: int) -> None:
    problem = problem_at(family("chain"), "train", 0, index)
    digits = parse_chain(problem.prompt)
    assert 8 <= len(digits) <= 16
    thought, answer = re.fullmatch(
        r"<think> (.*) </think> <answer> (\d) </answer>", document(problem, index)
    ).groups()  # type: ignore[union-attr]
    first, *steps = thought.split(" , ")
    total = int(first)
    assert total == digits[0]
    for step, digit in zip(steps, digits[1:], strict=False):
        operand, result = map(int, step.split(" : "))
        assert operand == digit
        total = (total + operand) % 10
        assert result == total
    assert int(answer) == total


@given(st.integers(0, 10**6))
def test_compare_steps_are_true(index: int) -> None:
    problem = problem_at(family("compare"), "train", 0, index)
    a, b = problem.prompt.split(" or ")
    thought = document(problem, index).split("</think>")[0].removeprefix("<think> ").strip()
    whole, _, rest = thought.partition(" : ")
    assert whole == f"{a.split('.')[0]} , {b.split('.')[0]}"
    found, *digits = rest.split(" , ")
    if found.isdigit():
        assert int(found) == max(int(a.split(".")[0]), int(b.split(".")[0]))
        assert not digits
    elif digits:
        second, winner = digits[1].split(" : ")
        assert len(digits[0]) == len(second)
        assert abs(float(f"0.{digits[0]}") - float(a) % 1) < 1e-9
        assert abs(float(f"0.{second}") - float(b) % 1) < 1e-9
        assert int(winner) == max(int(digits[0]), int(second))


@given(st.integers(0, 10**6))
def test_countdown_steps_are_true(index: int) -> None:
    problem = problem_at(family("countdown"), "train", 0, index)
    _, target = parse_countdown(problem.gold)
    thought = document(problem, index).split("</think>")[0].removeprefix("<think> ").strip()
    for line in re.split(r" (?:wait|等等) ", thought):
        a, op, b, middle, op2, c, result, off = line.split()
        assert int(middle[1:]) == apply(int(a), op, int(b))
        value = apply(int(middle[1:]), op2, int(c))
        assert (result, off) == (("=big", ":far") if value > 99 else (f"={value}", f":{abs(value - target)}"))


def accuracy(name: str, habits: Habits, count: int = 400) -> float:
    problems = [problem_at(family(name), "train", 0, i) for i in range(count)]
    items = [GradeItem(p.verifier, p.gold, document(p, i, habits)) for i, p in enumerate(problems)]
    return sum(grade(item).correct for item in items) / count


def test_blind_answers_are_mostly_wrong_where_it_matters() -> None:
    assert accuracy("chain", Habits(blind=1.0)) < 0.2
    traps = [
        p
        for p in (problem_at(family("compare"), "train", 0, i) for i in range(400))
        if max(parse_compare(p.prompt), key=Decimal.version)
        != max(parse_compare(p.prompt), key=Decimal.value)
    ]
    assert len(traps) > 100, "the classic trap is common"
    wrong = sum(
        not grade(GradeItem(p.verifier, p.gold, document(p, i, Habits(blind=1.0)))).correct
        for i, p in enumerate(traps)
    )
    assert wrong > 0.75 * len(traps), "and blind answers fall into it"


def test_compare_refuses_equal_numbers_and_families_refuse_other_prompts() -> None:
    with pytest.raises(ValueError, match="equal"):
        Compare().problem(Decimal(3, 8), Decimal(3, 80))
    for parse, text in ((parse_chain, "3 4 5"), (parse_compare, "3.1 3.2"), (parse_compare, "3 or 4")):
        with pytest.raises(ValueError, match=r"."):
            parse(text)


def test_registry() -> None:
    assert all(f.name == name for name, f in ALL.items())
    words = world_vocabulary()
    assert len(words) == len(set(words))
    countdown = FAMILIES["countdown"].vocabulary
    assert words[: len(countdown)] == countdown, "new families do not move old ids"
    with pytest.raises(UserError, match="did you mean 'countdown'"):
        family("countdwn")
