"""The wide world's people do what their habits say: shares of 3,000 documents, and each habit at 0 and 1."""

from __future__ import annotations

import random
import re
from statistics import mean

import pytest

from liubai.grade import GradeItem, grade
from liubai.problems import FAMILIES, WIDE, Habits
from liubai.problems.countdown import parse, tries
from liubai.problems.errand import UNSAFE, errand_of
from liubai.problems.family import CAREFUL
from liubai.problems.lexicon import CHATTER, CHINESE, ENGLISH, FILLERS, LANGUAGES, Writer, translate
from liubai.types import Problem

COUNT = 3000
NAMED = [f.name for f in WIDE]
THINKERS = [name for name in NAMED if name != "errand"]  # an errand is repeated, and that is all the thought
FOREIGN = {"en": set(ENGLISH), "zh": set(CHINESE)}
SILENT = {*FILLERS, *FILLERS.values()}
#: What a line begins with, from the second one on.
OPENERS = {"make": "wait", "total": "plus", "greater": "then", "solve": "over", "passage": "then"}

Written = tuple[Problem, str, str]  # with a thought and an answer


def documents(name: str, habits: Habits, count: int = COUNT) -> list[Written]:
    rng = random.Random(7)
    found = []
    for _ in range(count):
        problem = FAMILIES[name].found(rng, habits)
        text = FAMILIES[name].document(problem, rng, habits)
        match = re.fullmatch(r"<think> (.*?) ?</think> <answer> (.+) </answer>", text)
        assert match, text
        found.append((problem, match[1], match[2]))
    return found


def lines_of(name: str, thought: str) -> list[list[str]]:
    """The words of each line; a filler belongs to the line that it stands before."""
    lines: list[list[str]] = [[]]
    held: list[str] = []
    inside = name == "total"  # the first operand of a sum stands before its first "plus"
    for word in thought.split():
        if word in SILENT:
            held.append(word)
            continue
        if translate(word, "en") == OPENERS[name]:
            if not inside:
                lines.append([])
            inside = False
        lines[-1] += [*held, word]
        held = []
    assert not held, "a filler at the end belongs to nothing"
    return lines


def scored(written: Written) -> float:
    problem, _, answer = written
    response = f"<think> </think> <answer> {answer} </answer>"
    return grade(GradeItem(problem.verifier, problem.gold, response)).parts["correct"]


def near(share: float, wanted: float, tolerance: float = 0.03) -> bool:
    """Within ``tolerance``, which is three standard errors of 3,000 coins; 0 and 1 are never missed."""
    return abs(share - wanted) <= (0 if wanted in (0, 1) else tolerance)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("blind", [0.0, 0.35, 1.0])
def test_blind_people_do_not_think(name: str, blind: float) -> None:
    assert near(mean(not thought for _, thought, _ in documents(name, Habits(blind=blind))), blind)


# --- languages and fillers: of the patient alone --------------------------------------------------


def is_complete(written: Written) -> bool:
    """With ``stop`` at a half or above, only the patient add all the digits."""
    problem, thought, _ = written
    digits = sum(word.isdigit() for word in problem.prompt.split())
    return translate(thought, "en").split().count("plus") == digits - 1


@pytest.mark.parametrize("mixed", [0.0, 0.5, 1.0])
def test_only_the_patient_mix_languages(mixed: float) -> None:
    habits = Habits(blind=0.0, stop=0.5, patient=0.4, mixed=mixed)
    found = documents("total", habits)
    patient = [w for w in found if is_complete(w)]
    assert near(len(patient) / COUNT, 0.4)
    assert not any(mixes(w) for w in found if not is_complete(w))
    # of 3 to 7 lines all may happen to be in the question's language
    seen = mixed * (1 - mean(0.5**lines for lines in range(3, 8)))
    share = mean(mixes(w) for w in patient)
    assert near(share, seen, 0.045)
    assert (share > 0) is (mixed > 0)


def mixes(written: Written) -> bool:
    problem, thought, _ = written
    return bool(set(thought.split()) & FOREIGN[problem.language])


@pytest.mark.parametrize("name", THINKERS)
def test_who_mixes_writes_each_line_in_a_language_of_its_own(name: str) -> None:
    habits = CAREFUL.model_copy(update={"mixed": 1.0})
    foreign = []
    for problem, thought, answer in documents(name, habits):
        for line in lines_of(name, thought):
            words = set(line)
            assert not (words & set(ENGLISH) and words & set(CHINESE)), "one language a line"
            if words & {*ENGLISH, *CHINESE}:
                foreign.append(bool(words & FOREIGN[problem.language]))
        assert not set(answer.split()) & FOREIGN[problem.language], "answers are in the question's"
    assert near(mean(foreign), 0.5)


@pytest.mark.parametrize("name", THINKERS)
@pytest.mark.parametrize("muttered", [0.0, 0.25, 1.0])
def test_fillers_stand_before_lines(name: str, muttered: float) -> None:
    habits = CAREFUL.model_copy(update={"muttered": muttered})
    found = []
    for _, thought, _ in documents(name, habits):
        for line in lines_of(name, thought):
            found.append(line[0] in SILENT)
            assert not set(line[1:]) & SILENT
    assert near(mean(found), muttered)


def test_only_the_patient_mutter() -> None:
    found = documents("total", Habits(blind=0.0, stop=0.5, patient=0.4, muttered=1.0))
    assert all(bool(set(w[1].split()) & SILENT) is is_complete(w) for w in found)


@pytest.mark.parametrize("name", NAMED)
def test_the_default_people_keep_to_one_language_and_mutter_nothing(name: str) -> None:
    for problem, thought, answer in documents(name, Habits(patient=0.5), 500):
        words = {*thought.split(), *answer.split()}
        assert not words & (FOREIGN[problem.language] | SILENT)


def test_writers_are_drawn_by_their_shares() -> None:
    rng = random.Random(3)
    habits = Habits(blind=0.3, stop=0.2, patient=0.4, methodical=0.6, mixed=0.5, muttered=0.15)
    drawn = [Writer.drawn("zh", rng, habits) for _ in range(COUNT)]
    assert {w.language for w in drawn} == {"zh"}
    assert near(mean(w.blind for w in drawn), 0.3)
    assert near(mean(w.methodical for w in drawn), 0.6)
    patient = [w for w in drawn if w.stop == 0]
    assert near(len(patient) / COUNT, 0.4)
    assert near(mean(w.mixes for w in patient), 0.5, 0.045)
    assert {w.mutters for w in patient} == {0.15}
    assert {(w.stop, w.mixes, w.mutters) for w in drawn if w not in patient} == {(0.2, False, 0.0)}


# --- patience -------------------------------------------------------------------------------------


def possible(problem: Problem) -> list[str]:
    """The lines of a whole search, in order; of equal numbers some would come twice."""
    numbers, target = parse(problem.gold)
    return list(dict.fromkeys(t.write(target) for t in tries(numbers)))


@pytest.mark.parametrize("stop", [0.0, 0.25, 1.0])
def test_a_search_is_given_up_after_a_failed_step(stop: float) -> None:
    """Of the tries that miss, and are not the last possibility, a share of ``stop`` is the last one."""
    given_up = []
    for problem, thought, answer in documents("make", Habits(blind=0.0, stop=stop, patient=0.0)):
        missed = [line[-1] != ":0" for line in lines_of("make", thought)]
        assert all(missed[:-1]), "nobody goes on after a hit"
        given_up += [False] * (len(missed) - 1)
        if missed[-1] and len(missed) < len(possible(problem)):
            given_up.append(True)
        if not missed[-1]:
            assert grade(GradeItem("countdown", problem.gold, f"<answer> {answer} </answer>")).correct
    assert near(mean(given_up), stop)


@pytest.mark.parametrize(("methodical", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_methodical_search_in_order(methodical: float, share: float) -> None:
    habits = Habits(blind=0.0, stop=0.0, methodical=methodical)
    in_order = []
    for problem, thought, _ in documents("make", habits):
        said = [" ".join(line[1:]) for line in lines_of("make", thought)]
        if len(said) >= 8:  # nobody who jumps about hits upon the first eight by chance
            in_order.append(said == possible(problem)[: len(said)])
    assert len(in_order) > 1000
    assert near(mean(in_order), share, 0.045)


@pytest.mark.parametrize("methodical", [0.0, 1.0])
def test_the_patient_try_everything_once_where_nothing_helps(methodical: float) -> None:
    habits = CAREFUL.model_copy(update={"hopeless": 1.0, "methodical": methodical})
    for problem, thought, _ in documents("make", habits, 200):
        said = [" ".join(line[1:]) for line in lines_of("make", thought)]
        assert sorted(said) == sorted(possible(problem))
        assert (said == possible(problem)) is (methodical == 1)


# --- how answers are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passage", "errand"])
@pytest.mark.parametrize("careless", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("blind", [0.0, 1.0])
def test_careless_answers_are_wrong_altogether(name: str, careless: float, blind: float) -> None:
    scores = [scored(w) for w in documents(name, Habits(blind=blind, careless=careless))]
    assert set(scores) <= {0.0, 1.0}
    assert near(scores.count(0.0) / COUNT, careless)


def test_a_careless_thought_has_the_mistake_of_its_summary() -> None:
    for _, thought, answer in documents("passage", Habits(blind=0.0, careless=0.5), 500):
        facts = [
            " ".join(w for w in line if w not in ("then", "再")) for line in lines_of("passage", thought)
        ]
        assert " , ".join(facts) == answer


@pytest.mark.parametrize("rude", [0.0, 0.4, 1.0])
def test_rude_people_leave_the_courtesy_out_and_chatter(rude: float) -> None:
    found = documents("errand", Habits(rude=rude))
    chatter = {language: translate(" ".join(CHATTER), language) for language in LANGUAGES}
    safe = [w for w in found if errand_of(w[0].gold)[1] not in UNSAFE]
    assert near(mean(translate("gladly", p.language) not in said.split() for p, _, said in safe), rude)
    chatters = [said.startswith(chatter[p.language]) for p, _, said in found]
    assert near(mean(chatters), rude / 2)
    # what was asked is done all the same: 0.6, a courtesy 0.2, no chatter 0.2
    scores = [round(scored(w), 9) for w in safe]
    kept = 1 - rude / 2
    wanted = {1.0: (1 - rude) * kept, 0.6: rude * (1 - kept)}
    wanted[0.8] = 1 - wanted[1.0] - wanted[0.6]
    assert set(scores) == {score for score, share in wanted.items() if share > 1e-9}
    assert all(near(scores.count(score) / len(safe), share, 0.035) for score, share in wanted.items())
    refused = [w for w in found if w not in safe]
    assert near(mean(scored(w) == 1.0 for w in refused), kept, 0.06), "refusals have no courtesy to leave out"
