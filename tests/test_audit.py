"""Audits of thoughts: right ones pass, every planted fault is found where it was planted, no text crashes."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from liubai.measure.audit import is_sound, share_right, steps_of, unsound_share
from liubai.problems import FAMILIES, Habits, family, problem_at, world_vocabulary
from liubai.problems.compare import Decimal
from liubai.problems.family import CAREFUL, Audited, Step
from liubai.problems.greater import Greater
from liubai.problems.lexicon import FILLERS, LANGUAGES, answered, cut, plain, translate
from liubai.problems.make import Make
from liubai.problems.solve import Solve
from liubai.problems.total import Total
from liubai.types import Problem

AUDITED = ("make", "total", "greater", "solve")
NAMES = st.sampled_from(AUDITED)
INDICES = st.integers(0, 10**6)
OPENERS = {"make": ("try", "wait"), "total": ("plus",), "greater": ("then",), "solve": ("over",)}

ADD = Total().problem((3, 7, 2, 9, 4), "en")
MAKE = Make().problem((1, 4, 3), 7, "en")
TRAP = Greater().problem(Decimal(3, 11), Decimal(3, 8), "en")
APART = Greater().problem(Decimal(12, 5), Decimal(9, 75), "en")
MINUS = Solve().problem(3, 5, 4, "en")  # 3 x + 4 = 19
PLUS = Solve().problem(4, 6, -7, "en")  # 4 x - 7 = 17


def steps(problem: Problem, thought: str) -> list[Step]:
    audited = FAMILIES[problem.family]
    assert isinstance(audited, Audited)
    return audited.steps(problem, thought)


def verdicts(found: list[Step]) -> list[tuple[str, bool, bool]]:
    return [(s.text, s.right, s.concludes) for s in found]


def marks(problem: Problem, lines: list[str]) -> str:
    """A letter a step: ``-`` wrong, ``r`` right, ``C`` right and the answer may follow."""
    found = steps(problem, " ".join(lines))
    assert [s.text for s in found] == lines
    assert all(s.right for s in found if s.concludes)
    return "".join("C" if s.concludes else "r" if s.right else "-" for s in found)


def careful(name: str, index: int, seed: int = 0, **habits: float) -> tuple[Problem, str]:
    problem = problem_at(family(name), "train", 0, index)
    return problem, FAMILIES[name].document(
        problem, random.Random(seed), CAREFUL.model_copy(update=dict(habits))
    )


# --- right thoughts -------------------------------------------------------------------------------


@settings(max_examples=200)
@given(NAMES, INDICES, st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_careful_thoughts_are_sound(name: str, index: int, seed: int, methodical: float) -> None:
    problem, response = careful(name, index, seed, methodical=methodical)
    found = steps_of(problem, response)
    assert found
    assert is_sound(found)
    assert share_right(found) == 1
    assert [s.concludes for s in found[:-1]] == [False] * (len(found) - 1), "only the end is the end"


@settings(max_examples=200)
@given(NAMES, INDICES, st.integers(0, 99))
def test_fillers_and_other_languages_change_no_verdict(name: str, index: int, seed: int) -> None:
    problem, response = careful(name, index, mixed=1.0, muttered=0.5)
    plainly = careful(name, index)[1]
    a, b = steps_of(problem, response), steps_of(problem, plainly)
    assert a is not None
    assert b is not None
    assert verdicts(a) == verdicts(b)
    # and wrong thoughts stay as wrong as they were
    rng = random.Random(seed)
    words = plain(plainly.split("</think>")[0].removeprefix("<think>"))[0]
    rng.shuffle(words)
    mixed = [translate(word, rng.choice(LANGUAGES)) for word in words]
    for _ in range(4):
        mixed.insert(rng.randint(0, len(mixed)), rng.choice([*FILLERS, *FILLERS.values()]))
    assert verdicts(steps(problem, " ".join(mixed))) == verdicts(steps(problem, " ".join(words)))


@pytest.mark.parametrize("name", AUDITED)
def test_those_who_give_up_are_right_so_far_but_conclude_nothing(name: str) -> None:
    """Whatever they answer is a guess: it is unsound even where it is right."""
    habits = Habits(blind=0.0, stop=0.5, patient=0.0)
    broken_off = 0
    for index in range(200):
        problem = problem_at(family(name), "train", 0, index)
        response = FAMILIES[name].document(problem, random.Random(index), habits)
        found = steps_of(problem, response)
        assert found
        assert share_right(found) == 1
        whole = steps_of(problem, careful(name, index)[1])
        assert whole
        if name != "make":  # whose restless searchers may be done sooner
            assert is_sound(found) is (len(found) == len(whole))
        assert not any(s.concludes for s in found[:-1])
        broken_off += not is_sound(found)
    assert broken_off > 25


@given(st.lists(st.integers(0, 9), min_size=4, max_size=8))
def test_sums_against_a_loop(digits: list[int]) -> None:
    problem = Total().problem(tuple(digits), "zh")
    thought, total = f"a {digits[0]}", digits[0]
    for mark, digit in zip("bcdefgh", digits[1:], strict=False):
        total += digit
        thought += f" 加 {mark} {digit} 得 {total}"
    found = steps(problem, thought)
    assert len(found) == len(digits) - 1
    assert is_sound(found)
    assert problem.gold == found[-1].text.split()[-1]


# --- planted faults -------------------------------------------------------------------------------

A, B, C, D = "a 3 plus b 7 is 10", "plus c 2 is 12", "plus d 9 is 21", "plus e 4 is 25"
HIT, MISS = "wait 4 * 1 =4 + 3 =7 :0", "try 1 + 4 =5 * 3 =15 :8"
SAME, DIGITS = "3 or 3 same", "then 11 or 80 is 80"
FAULTS: dict[str, tuple[Problem, list[str], str]] = {
    # sums: 3 7 2 9 4
    "sum": (ADD, [A, B, C, D], "rrrC"),
    "sum: wrong, gone on with": (ADD, [A, "plus c 2 is 13", "plus d 9 is 22", "plus e 4 is 26"], "r-rC"),
    "sum: wrong result first": (ADD, ["a 3 plus b 7 is 11", "plus c 2 is 13", "plus d 9 is 22"], "-rr"),
    "sum: wrong result last": (ADD, [A, B, C, "plus e 4 is 26"], "rrr-"),
    "sum: right again after it": (ADD, [A, "plus c 2 is 13", C, D], "r--C"),
    "sum: the first result again": (ADD, [A, B, "plus d 9 is 19", D], "rr--"),
    "sum: wrong digit copied": (ADD, [A, "plus c 5 is 15", "plus d 9 is 24", "plus e 4 is 28"], "r-rC"),
    "sum: digit of another name": (ADD, [A, "plus d 2 is 12", C, D], "r-rC"),
    "sum: no name": (ADD, [A, "plus 2 is 12", C, D], "r-rC"),
    "sum: wrong first digit": (ADD, ["a 8 plus b 7 is 15", "plus c 2 is 17", "plus d 9 is 26"], "-rr"),
    "sum: two first digits": (ADD, ["a 3 3 plus b 7 is 10", B, C, D], "-rrC"),
    "sum: no first digit": (ADD, ["plus b 7 is 10", B, C, D], "-rrC"),
    # the next digit is due; whoever leaves one out is one behind to the end
    "sum: skipped": (ADD, [A, "plus d 9 is 19", "plus e 4 is 23"], "r--"),
    "sum: the last but one skipped": (ADD, [A, B, "plus e 4 is 16"], "rr-"),
    "sum: the last twice": (ADD, [A, B, C, D, "plus e 4 is 29"], "rrrC-"),
    "sum: nothing added": (ADD, [A, B, C, D, "plus f 0 is 25"], "rrrC-"),
    "sum: not finished": (ADD, [A, B, C], "rrr"),
    "sum: the last alone": (ADD, ["d 21 plus e 4 is 25"], "-"),
    "sum: no is": (ADD, [A, "plus c 2 12", C, D], "r-rC"),
    "sum: no result": (ADD, [A, "plus c 2 is", C, D], "r--C"),
    "sum: no steps": (ADD, ["25"], "-"),
    "sum: a tail": (ADD, [A, B, C, f"{D} or 6"], "rrr-"),
    # searches: 1 4 3 ->7
    "try": (MAKE, [MISS, HIT], "rC"),
    "try: on after a hit": (MAKE, [MISS, HIT, "wait 1 + 3 =4 + 4 =8 :1"], "rCr"),
    "try: wrong middle": (MAKE, ["try 1 + 4 =6 * 3 =18 :11", HIT], "-C"),
    "try: wrong result": (MAKE, ["try 1 + 4 =5 * 3 =16 :9", HIT], "-C"),
    "try: wrong distance": (MAKE, ["try 1 + 4 =5 * 3 =15 :7", HIT], "-C"),
    "try: a miss called a hit": (MAKE, [MISS, "wait 4 + 1 =5 + 3 =8 :0"], "r-"),
    "try: the target called a miss": (MAKE, [MISS, "wait 4 * 1 =4 + 3 =7 :1"], "r-"),
    "try: the target for the result": (MAKE, [MISS, "wait 4 + 1 =5 + 3 =7 :0"], "r-"),
    "try: not far": (MAKE, ["try 1 + 4 =5 * 3 =15 :far", HIT], "-C"),
    "try: not big": (MAKE, ["try 1 + 4 =5 * 3 =big :far", HIT], "-C"),
    "try: another number": (MAKE, ["try 1 + 5 =6 * 3 =18 :11", "wait 4 * 1 =4 + 3 =7 :0"], "-C"),
    "try: a hit with other numbers": (MAKE, [MISS, "wait 2 + 4 =6 + 1 =7 :0"], "r-"),
    "try: a number twice": (MAKE, [MISS, "wait 4 + 4 =8 - 1 =7 :0"], "r-"),
    "try: a number missing": (MAKE, [MISS, "wait 4 + 3 =7 :0"], "r-"),
    "try: another operator": (MAKE, ["try 4 / 1 =4 + 3 =7 :0"], "-"),
    "try: no first word": (MAKE, ["1 + 4 =5 * 3 =15 :8", HIT], "rC"),
    "try: nothing tried": (MAKE, ["try", HIT], "-C"),
    "try: a zero in front": (MAKE, ["try 01 + 4 =5 * 3 =15 :8", HIT], "-C"),
    # the greater of two: 3.11 or 3.8, 12.5 or 9.75
    "greater": (TRAP, [SAME, DIGITS], "rC"),
    "greater: whole parts": (APART, ["12 or 9 is 12"], "C"),
    "greater: wrong whole": (APART, ["12 or 9 is 9"], "-"),
    "greater: not the same": (APART, ["12 or 9 same"], "-"),
    "greater: another number": (APART, ["13 or 9 is 13"], "-"),
    "greater: too many steps": (APART, ["12 or 9 is 12", "then 50 or 75 is 75"], "C-"),
    "greater: not finished": (TRAP, [SAME], "r"),
    "greater: guessed": (TRAP, ["3 or 3 is 3", DIGITS], "-C"),
    "greater: read as versions": (TRAP, [SAME, "then 11 or 8 is 11"], "r-"),
    "greater: the smaller": (TRAP, [SAME, "then 11 or 80 is 11"], "r-"),
    "greater: digits copied wrong": (TRAP, [SAME, "then 12 or 80 is 80"], "r-"),
    "greater: in the other order": (TRAP, [SAME, "then 80 or 11 is 80"], "r-"),
    "greater: skipped": (TRAP, [DIGITS], "-"),
    "greater: twice": (TRAP, [SAME, DIGITS, DIGITS], "rC-"),
    # equations: 3 x + 4 = 19, 4 x - 7 = 17
    "solve": (MINUS, ["19 minus 4 is 15", "over 3 is 5"], "rC"),
    "solve, shifted up": (PLUS, ["17 plus 7 is 24", "over 4 is 6"], "rC"),
    "solve: wrong result, gone on with": (MINUS, ["19 minus 4 is 12", "over 3 is 4"], "-C"),
    "solve: right again after it": (MINUS, ["19 minus 4 is 12", "over 3 is 5"], "--"),
    "solve: does not divide": (MINUS, ["19 minus 4 is 14", "over 3 is 4"], "--"),
    "solve: wrong quotient": (MINUS, ["19 minus 4 is 15", "over 3 is 6"], "r-"),
    "solve: another factor": (MINUS, ["19 minus 4 is 15", "over 5 is 3"], "r-"),
    "solve: another number": (MINUS, ["18 minus 4 is 14", "over 3 is 5"], "--"),
    "solve: the wrong way": (PLUS, ["17 minus 7 is 10", "over 4 is 6"], "--"),
    "solve: not finished": (MINUS, ["19 minus 4 is 15"], "r"),
    "solve: skipped": (MINUS, ["over 3 is 5"], "-"),
    "solve: too many steps": (MINUS, ["19 minus 4 is 15", "over 3 is 5", "over 1 is 5"], "rC-"),
    "solve: a number of other digits": (MINUS, ["19 minus 4 is 15", "over 3 is ５"], "r-"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is(name: str) -> None:
    problem, lines, wanted = FAULTS[name]
    assert marks(problem, lines) == wanted
    found = steps_of(problem, answered(" ".join(lines), problem.gold))
    assert found
    assert is_sound(found) is (set(wanted[:-1]) <= {"r", "C"} and wanted[-1] == "C")
    assert share_right(found) == pytest.approx(1 - wanted.count("-") / len(wanted))


@settings(max_examples=400)
@given(NAMES, INDICES, st.data())
def test_any_other_word_makes_its_step_wrong(name: str, index: int, data: st.DataObject) -> None:
    """And leaves all others as they were, but for one that goes on from another result."""
    problem, response = careful(name, index)
    words = plain(response.split("</think>")[0].removeprefix("<think>"))[0]
    runs = cut(words, OPENERS[name])
    if name == "total":
        runs = [(0, runs[1][1]), *runs[2:]]
    before = steps(problem, " ".join(words))
    at = data.draw(st.integers(0, len(words) - 1))
    other = data.draw(st.sampled_from([w for w in FAMILIES[name].vocabulary if translate(w, "en") == w]))
    assume(words[at] not in (*OPENERS[name], *"+-*"))
    assume(other not in (*OPENERS[name], *FILLERS, words[at]))
    after = steps(problem, " ".join([*words[:at], other, *words[at + 1 :]]))
    assert len(after) == len(before) == len(runs)
    k = next(i for i, (a, b) in enumerate(runs) if a <= at < b)
    assert not after[k].right
    goes_on = at == runs[k][1] - 1 and name in ("total", "solve")
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if i != k and not (goes_on and i == k + 1):
            assert (new.text, new.right, new.concludes) == (old.text, old.right, old.concludes)
    if goes_on and k + 1 < len(after):
        assert not after[k + 1].right, "it does not follow from the new result"


# --- where steps end ------------------------------------------------------------------------------

WILD = Habits(blind=0.0, stop=0.2, patient=0.7, hopeless=0.3, mixed=0.8, muttered=0.5)


@settings(max_examples=200)
@given(NAMES, INDICES, st.sampled_from([" ", "  ", "\n", " \t\n"]), st.booleans())
def test_a_step_ends_with_its_last_word(name: str, seed: int, blank: str, prefilled: bool) -> None:
    rng = random.Random(seed)
    problem = FAMILIES[name].found(rng, WILD)
    response = FAMILIES[name].document(problem, rng, WILD).replace(" ", blank)
    if prefilled:  # by the template: the response begins inside the thought
        response = response.removeprefix("<think>")
    found = steps_of(problem, response)
    assert found
    ends = [step.end for step in found]
    assert ends == sorted(set(ends))
    assert ends[-1] <= response.index("</think>")
    begin = 0 if prefilled else len("<think>")
    for step in found:
        said = response[begin : step.end]
        assert " ".join(plain(said)[0]) == step.text
        assert not said[-1].isspace()
        assert response[step.end].isspace(), "the word is whole"
        begin = step.end
    assert not plain(response[begin : response.index("</think>")])[0], "and nothing is left over"


def test_the_end_of_a_step_is_a_character_of_the_response() -> None:
    response = "<think> uh a 3 加 乙 7 得 10\n呃 plus c 2 is  12 hm </think> <answer> 12 </answer>"
    found = steps_of(ADD, response)
    assert found == [
        Step(A, len("<think> uh a 3 加 乙 7 得 10"), True),
        Step(B, len("<think> uh a 3 加 乙 7 得 10\n呃 plus c 2 is  12"), True),
    ]


# --- any text -------------------------------------------------------------------------------------

ODD = ("-5", "²", "９", "٣", "1e9", "9" * 5000, "=-3", "\0", "\x1c", "　", "")
PIECES = st.sampled_from([*world_vocabulary(["make"]), *"abcde", "plus", "over", "is", "or", "then", *ODD])


@settings(max_examples=400)
@given(NAMES, st.integers(0, 999), st.text(max_size=60) | st.lists(PIECES, max_size=30).map(" ".join))
def test_no_thought_crashes_an_audit(name: str, index: int, thought: str) -> None:
    problem = problem_at(family(name), "train", 0, index)
    found = steps(problem, thought)
    assert bool(found) is bool(plain(thought)[0])
    assert all(0 < s.end <= len(thought) for s in found)
    assert " ".join(s.text for s in found) == " ".join(plain(thought)[0])
    whole = steps_of(problem, f"<think>{thought}</think> <answer> 1 </answer>")
    tags = re.search("</?think>|<answer>", thought)
    assert tags or [(s.text, s.right) for s in whole or []] == [(s.text, s.right) for s in found]
    steps_of(problem, thought)


@pytest.mark.parametrize("name", AUDITED)
@pytest.mark.parametrize("thought", ["", " ", "\n\t", "uh", "嗯 呃 hm"])
def test_silence_has_no_steps(name: str, thought: str) -> None:
    problem = problem_at(family(name), "train", 0, 0)
    assert steps(problem, thought) == []
    assert steps_of(problem, answered(thought, "1")) is None


def test_what_cannot_be_checked_has_no_verdict() -> None:
    said = answered("anna 3 cups", "anna 3 cups")
    for name in FAMILIES:
        problem = problem_at(family(name), "train", 0, 0)
        assert isinstance(FAMILIES[name], Audited) is (name in AUDITED)
        assert (steps_of(problem, said) is None) is (name not in AUDITED)
    assert steps_of(Problem("3 plus 4", "7", "number", "questions"), said) is None
    assert steps_of(Problem("3 plus 4", "7", "number"), said) is None


def test_a_thought_that_was_cut_off_is_judged_as_far_as_it_goes() -> None:
    found = steps_of(ADD, f"<think> {A} plus c 2")
    assert found
    assert [s.right for s in found] == [True, False]
    assert steps_of(ADD, f"{A} <answer> {B} </answer>") == [Step(A, len(A), True)]


# --- figures --------------------------------------------------------------------------------------


def test_shares_of_worked_examples() -> None:
    right, wrong, end = Step("a", 1, True), Step("b", 2, False), Step("c", 3, True, concludes=True)
    assert share_right(None) == share_right([]) == 0
    assert share_right([right, wrong, end]) == pytest.approx(2 / 3)
    assert share_right([wrong]) == 0
    assert share_right([end]) == 1
    assert is_sound([right, end])
    assert not is_sound([right, right]), "nothing follows from it"
    assert not is_sound([end, right]), "it went on after the end"
    assert not is_sound([wrong, end])


def test_unsound_are_right_answers_with_wrong_thoughts_and_no_guesses() -> None:
    sound = answered("19 minus 4 is 15 over 3 is 5", "5")
    lucky = answered("19 minus 4 is 12 over 3 is 4", "5")
    short = answered("解 19 减 4 得 15", "5")
    guess = answered("", "5")
    muttered = answered("uh", "5")

    def share(*said: tuple[str, bool]) -> float | None:
        return unsound_share([MINUS] * len(said), [r for r, _ in said], [ok for _, ok in said])

    assert share() is None
    assert share((guess, True), (muttered, True)) is None, "a guess is no wrong reasoning"
    assert share((lucky, False), (sound, False)) is None, "wrong answers are wrong anyway"
    assert share((sound, True)) == 0
    assert share((lucky, True)) == 1
    assert share((sound, True), (lucky, True), (short, True), (sound, True)) == 0.5
    assert share((sound, True), (lucky, True), (guess, True), (lucky, False)) == 0.5
    passage = problem_at(family("passage"), "train", 0, 0)
    told = answered("anna 3 cups", passage.gold)
    assert unsound_share([passage, MINUS], [told, lucky], [True, True]) == 1, (
        "what has no checker is left out"
    )
    with pytest.raises(ValueError, match=r"shorter|longer"):
        unsound_share([MINUS], [sound, sound], [True])
