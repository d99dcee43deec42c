"""Shakespearean sonnets: a sound one, rhymes and syllables one by one, each fault alone, and cheats."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from poems import SONNET as POEM

from liubai.errors import UserError
from liubai.grade import GradeItem, check_verifier, english, grade
from liubai.grade.english import pronunciations
from liubai.grade.explain import explain
from liubai.grade.options import check_options
from liubai.grade.sonnet import OLD, PAIRS, WEIGHTS, Hearing, hear_sonnet, rhyme, sonnet

LINES = POEM.splitlines()
WORDS = [*POEM.split(), "\n", "'", "-", "zz", "9"]
SEEDS = st.integers(0, 10**6)

SHAKESPEARE_18 = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd,
And every fair from fair sometime declines,
By chance, or nature's changing course untrimm'd:
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st,
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st,
So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee."""


def hear(*lines: str, **meta: str) -> Hearing:
    return hear_sonnet("shakespeare", "\n".join(lines), meta)


def changed(change: dict[int, str]) -> list[str]:
    """The sound sonnet with other lines, from 1."""
    return [change.get(i, line) for i, line in enumerate(LINES, 1)]


def codes(hearing: Hearing) -> list[tuple[int, str]]:
    return [(fault.line + 1, fault.code) for fault in hearing.faults]


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "like"),
    [
        *(("o'er", "core"), ("ne'er", "air"), ("'tis", "fizz"), ("'gainst", "against"), ("e'en", "seen")),
        *(
            ("lov'd", "shoved"),
            ("us'd", "fused"),
            ("miss'd", "mist"),
            ("dimm'd", "trimmed"),
            ("tir'd", "fired"),
        ),
        *(("know'st", "ghost"), ("hast", "last"), ("thee", "sea"), ("thine", "mine")),
        *(
            ("honour", "goner"),
            ("colour", "duller"),
            ("offence", "fence"),
            ("centre", "enter"),
            ("grey", "day"),
        ),
        *(("realise", "eyes"), ("travelled", "gravelled"), ("ploughs", "cows"), ("tyre", "fire")),
        *(("unloved", "shoved"), ("o'erthrown", "alone"), ("night's", "lights"), ("churches", "lurches")),
        *(("well-known", "alone"), ("flowers", "hours")),
    ],
)
def test_words_that_the_dictionary_lacks_sound_as_they_should(word: str, like: str) -> None:
    word = word.split("-")[-1]
    assert rhyme(word, like) == ("rich" if pronunciations(word) == pronunciations(like) else "full")


@pytest.mark.parametrize("word", ["blorn", "zight", "flomber", "thringle", "", "qx", "a" * 31, "'"])
def test_nonsense_has_no_sound(word: str) -> None:
    assert pronunciations(word) == ()
    assert rhyme(word, "night") == "unknown"


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        *(("day", "may", "full"), ("light", "delight", "full"), ("ending", "bending", "full")),
        *(("delighted", "invited", "full"), ("wind", "kind", "full"), ("thee", "memory", "full")),
        *(("day", "day", "same"), ("'day", "day", "same"), ("sun", "son", "rich"), ("fair", "fare", "rich")),
        *(("day", "night", "none"), ("bending", "bent", "none"), ("cat", "cats", "none")),
        ("had", "hat", "none"),
        *(("love", "prove", "old"), ("die", "memory", "old"), ("past", "waste", "old")),
        ("are", "care", "old"),
        *(("word", "afford", "old"), ("one", "alone", "old"), ("good", "blood", "old")),
        ("great", "heat", "old"),
        *(("convert", "art", "old"), ("argument", "spent", "old"), ("is", "amiss", "old")),
        *(("memory", "eternity", "weak"), ("zight", "night", "unknown"), ("love", "have", "none")),
        *(("stone", "gone", "old"), ("map", "cape", "old"), ("near", "war", "none"), ("sea", "day", "old")),
    ],
)  # fmt: skip
def test_how_words_rhyme(one: str, other: str, kind: str) -> None:
    assert rhyme(one, other) == rhyme(other, one) == kind


# --- sonnets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["early", "modern"])
def test_a_sound_sonnet_has_the_full_score(how: str) -> None:
    hearing = hear(*LINES, rhyme=how)
    assert (hearing.score, hearing.faults) == (1.0, [])
    stanzas = "\n\n".join("\n".join(LINES[a:b]) for a, b in ((0, 4), (4, 8), (8, 12), (12, 14)))
    indented = "\n".join(f"   {line}" if i > 11 else line for i, line in enumerate(LINES))
    for version in (stanzas, indented, POEM.upper(), POEM.replace("\n", "\r\n"), POEM.replace("\n", " / ")):
        assert sonnet("", version, {"rhyme": how}) == 1.0


def test_contractions_hyphens_curly_quotes_and_archaic_words() -> None:
    lines = changed({
        1: "The evening lays its shade o’er yonder hill",
        6: "A mother sings beside a well-worn bed",
        9: "I walk th' enchanted road I’ve ever known",
        12: "Who hears the distant waters thou lov'st fall",
        13: "So let the dark'ning heaven now descend:",
    })  # fmt: skip
    assert hear(*lines).score > 0.97
    assert not {"unknown", "rhyme unknown"} & {code for _, code in codes(hear(*lines))}


def test_shakespeare() -> None:
    early, modern = hear(*SHAKESPEARE_18.splitlines()), hear(*SHAKESPEARE_18.splitlines(), rhyme="modern")
    assert early.score > 0.95
    # temperate – date is a rhyme of his time alone
    assert [r for r, pair in zip(early.rhymes, PAIRS, strict=True) if pair == (1, 3)] == [OLD]
    assert [r for r, pair in zip(modern.rhymes, PAIRS, strict=True) if pair == (1, 3)] == [0.0]
    assert modern.score == pytest.approx(early.score - WEIGHTS["rhyme"] * OLD / 7, abs=1e-3)


# --- each fault alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part", "share", "fault"),
    [
        ({4: "Goes down to meet the ocean and the sun."}, "rhyme", 6 / 7, (4, "rhyme none")),
        ({4: "Goes down to meet the ocean and the light."}, "rhyme", 6 / 7, (4, "rhyme same")),
        ({4: "Goes down to meet the ocean and the zight."}, "rhyme", 6 / 7, (4, "rhyme unknown")),
        ({6: "A mother sings a song that nobody had fled,"}, "metre", 1 - 2 / 70, (6, "syllables")),
        ({1: "Evening lays its shadow on the hill"}, "metre", 1 - 1 / 70, (1, "syllables")),
        ({14: "The longest road is a shorter one with a friend."}, "metre", None, (14, "syllables")),
        ({12: "Who hears across the water gentle fall."}, None, 1.0, None),
        ({8: "The scent upon the summer of rising bread."}, "metre", None, None),
        ({2: "And windows every keep a little light;"}, "metre", 1.0, None),
        ({2: "And a window forever keeping light;"}, "metre", None, None),
    ],
)  # fmt: skip
def test_a_fault_alone(
    change: dict[int, str], part: str | None, share: float | None, fault: tuple[int, str] | None
) -> None:
    hearing = hear(*changed(change))
    if fault:
        assert fault in codes(hearing)
    if part and share is not None:
        assert hearing.parts[part] == pytest.approx(share, abs=0.02)
    if fault or (part and share != 1.0):
        assert 0.8 < hearing.score <= 1.0
    else:
        assert hearing.score == 1.0


def test_a_stress_in_a_weak_place() -> None:
    hearing = hear(*changed({10: "And count above the stars the wall chapel;"}))
    assert (10, "strays") in codes(hearing)
    # but a line may begin with it
    assert hear(*changed({10: "Counting the stars above the chapel wall;"})).score == 1.0


def test_a_weak_eleventh_syllable_is_no_fault() -> None:
    lines = changed(
        {
            13: "So let the darkness gather and be ending:",
            14: "The longest road is one that friends are tending.",
        }
    )
    hearing = hear(*lines)
    assert (hearing.score, [line.syllables for line in hearing.lines[12:] if line]) == (1.0, [11, 11])


def test_quatrains_have_two_rhymes() -> None:
    one = changed(
        {2: "And every window keeps a little still,", 4: "And all the village waters have their fill."}
    )
    hearing = hear(*one)
    assert (4, "rhyme one rhyme") in codes(hearing)
    assert hearing.parts["rhyme"] == pytest.approx(6 / 7)


def test_words_that_have_rhymed_rhyme_less() -> None:
    again = changed(
        {6: "A mother sings beside a little light,", 8: "The scent of summer and of rising night."}
    )
    assert (8, "rhyme used") in codes(hear(*again))
    assert hear(*again).parts["rhyme"] == pytest.approx(6 / 7)
    once = changed(
        {6: "A mother sings beside a little light,", 8: "The scent of summer and of something white."}
    )
    assert (8, "rhyme again") in codes(hear(*once))
    assert hear(*once).parts["rhyme"] == pytest.approx((6 + OLD) / 7)


# --- cheats ---------------------------------------------------------------------------------------

ENDS = ["hill", "light", "mill", "night", "field", "bed", "yield", "bread", "known", "wall", "alone", "fall",
        "descend", "friend"]  # fmt: skip
ONE_RHYME = [
    "day",
    "way",
    "say",
    "may",
    "ray",
    "pay",
    "lay",
    "bay",
    "gay",
    "hay",
    "jay",
    "play",
    "clay",
    "stay",
]
NONSENSE = ["blorning", "snorfing", "vlorning", "znorfing", "plizzed", "frimmo", "zlizzed", "drimmo", "clunx",
            "flompt", "glunx", "zlompt", "vradge", "wradge"]  # fmt: skip


def ending(ends: list[str]) -> str:
    """The sound sonnet with other words at the ends of its lines."""
    return "\n".join(f"{line.rsplit(' ', 1)[0]} {end}" for line, end in zip(LINES, ends, strict=True))


CHEATS = {  # what, and what it may earn at most
    "nothing": ("", 0),
    "blank lines": ("\n" * 40, 0),
    "the rhymes alone": ("\n".join(ENDS), 0.05),
    "a title": (f"The Evening\n{POEM}", 0.7),
    "words before": (f"Here is a sonnet for you, my friend:\n\n{POEM}", 0.7),
    "words behind": (f"{POEM}\nI hope that you like it!", 0.95),
    "a line more": (f"{POEM}\nThe longest road is never at an end.", 0.95),
    "twice": (f"{POEM}\n{POEM}", 0.55),
    "thirteen lines": ("\n".join(LINES[:-1]), 0.9),
    "one line": (POEM.replace("\n", " "), 0.1),
    "a line fourteen times": ("\n".join([LINES[0]] * 14), 0.1),
    "two lines seven times": ("\n".join(LINES[:2] * 7), 0.12),
    "one word": ("\n".join(["day " * 10] * 14), 0.1),
    "one word a line": ("\n".join(f"{end} " * 10 for end in ENDS), 0.3),
    "one end word": (ending(["day"] * 14), 0.55),
    "two end words": (ending(["day", "day", "way", "way"] * 3 + ["day", "way"]), 0.65),
    "one rhyme": (ending(ONE_RHYME), 0.8),
    "nonsense that looks like rhyme": (ending(NONSENSE), 0.5),
    "nonsense alone": (
        "\n".join(f"zlim vroth plimmer quazzel brothock dwim{i * 'm'}" for i in range(14)), 0,
    ),
    "numbers": ("\n".join(f"{i} " * 10 for i in range(14)), 0),
    "Chinese": ("\n".join(f"白日依山尽{i}" for i in range(14)), 0),
    "a zero-width space": (f"\u200b{POEM}", 0.999),
    "a NUL": (f"{POEM}\0", 0.999),
    "marks": (POEM.replace("\n", "!!!!!!!!!!!!!!!!!!!!\n"), 0.75),
    "prose": ("\n".join(["A very long line of prose that goes on without any care at all."] * 14), 0.1),
    "very long lines": ("\n".join(f"{line} " * 3 + line for line in LINES), 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pay(name: str) -> None:
    answer, most = CHEATS[name]
    assert sonnet("", answer, {}) <= most


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.text(min_size=1, max_size=40))
def test_text_behind_the_poem_never_pays(seed: int, more: str) -> None:
    lines = random.Random(seed).sample(LINES, 14)
    assert hear(*lines, more).score <= hear(*lines).score


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(14)))
def test_a_repeated_line_is_worth_no_more_than_none(order: list[int]) -> None:
    i, j = sorted(order[:2])
    repeated = [LINES[i] if k == j else line for k, line in enumerate(LINES)]
    hearing = hear(*repeated)
    assert hearing.lines[j] is None
    assert hearing.score <= 1 - WEIGHTS["rhyme"] / 7 - (WEIGHTS["lines"] + WEIGHTS["metre"]) / 14 + 1e-3


def test_any_answer_is_judged_quickly() -> None:
    sonnet("", POEM, {})
    rng = random.Random(0)
    started = time.perf_counter()
    for piece in ("a", "a'", "'", "a ", "\n", " / ", "a\n", "un", "un ", "-", "é", "\u0301", "ness ", "明"):
        assert 0 <= sonnet("", piece * 2000, {}) <= 0.2
    endings = ("ness", "ing", "est", "fulness", "ed", "'d", "eous", "'st")
    unknown = [
        "".join(rng.choice("qzxvkj") + rng.choice("aeiou") for _ in range(4)) + rng.choice(endings)
        for _ in range(280)
    ]
    assert sonnet("", "\n".join(" ".join(unknown[i : i + 20]) for i in range(0, 280, 20)), {}) == 0
    assert time.perf_counter() - started < 2


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.lists(st.sampled_from(WORDS), max_size=150).map(" ".join))
def test_no_answer_crashes_it(answer: str) -> None:
    assert 0 <= sonnet("", answer, {}) <= 1


# --- how it is asked ------------------------------------------------------------------------------


def test_a_verdict_has_the_score_under_its_name() -> None:
    good = grade(GradeItem("sonnet", "", f"<think> </think> <answer>{POEM}</answer>"))
    assert (good.correct, good.parts) == (True, {"correct": 1.0, "format": 1.0, "sonnet": 1.0})
    assert grade(GradeItem("sonnet", "", POEM)).parts["sonnet"] == 0
    for gold in ("shakespeare", " Shakespearean "):
        assert sonnet(gold, POEM, {}) == 1.0


@pytest.mark.parametrize(
    ("gold", "meta", "message"),
    [
        ("petrarch", {}, "a sonnet is 'shakespeare' or nothing"),
        ("", {"rhyme": "pingshui"}, "meta 'rhyme' is early or modern"),
        ("", {"rhyme": True}, "meta 'rhyme' is early or modern"),
    ],
)
def test_what_cannot_be_asked_is_an_error(gold: str, meta: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sonnet(gold, POEM, meta)
    assert message in (grade(GradeItem("sonnet", gold, f"<answer>{POEM}</answer>", meta)).error or "")


def test_options() -> None:
    check_options("sonnet", "shakespeare", {"rhyme": "modern"})
    for meta in ({"rhyme": "no"}, {"metre": 3}):
        with pytest.raises(ValueError, match="meta '"):
            check_options("sonnet", "shakespeare", meta)


def test_without_the_dictionary_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_verifier("sonnet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'liubai\[verse\]'"):
        check_verifier("sonnet")
    monkeypatch.setattr(english, "find_spec", lambda name: None)
    english._dictionary.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'liubai\[verse\]'"):
        english._dictionary()


def told(answer: str) -> tuple[str, str]:
    item = GradeItem("sonnet", "", f"<answer>{answer or '.'}</answer>")
    words = explain(item, grade(item))
    assert all(one and other for one, other in words)
    return "\n".join(e for e, _ in words), "\n".join(c for _, c in words)


def test_a_poem_without_english_words_has_none_that_repeat() -> None:
    item = GradeItem("sonnet", "", "<answer>白日依山盡，黃河入海流</answer>")
    english = [one for one, _ in explain(item, grade(item))]
    assert "has no words" in english
    assert not any("different" in one for one in english)


def test_a_score_is_explained_in_two_languages() -> None:
    one, other = told(SHAKESPEARE_18)
    assert "line 3 (A, 10 syllables): may rhymes with day" in one
    assert "date – temperate: a rhyme of Shakespeare's time (0.75)" in one
    assert "date – temperate：早期现代英语的韵（0.75）" in other.replace(" (0.75)", "（0.75）")
    assert "rhyme 0.482 of 0.5: of 7 pairs 6 rhyme in full and 1 in part" in one
    assert "押韵 0.482/0.5：7 对韵脚中 6 对全押，1 对部分押" in other
    assert "metre 0.296 of 0.3: 13 of 14 lines scan without a fault" in one
    one, other = told("\n".join(changed({4: "Goes down to meet the ocean and the zight."})))
    assert "an unknown word rhymes with nothing" in one
    assert "not in the dictionary: zight" in one
    assert "词典不收：zight" in other


@pytest.mark.parametrize("name", CHEATS)
def test_every_fault_has_words(name: str) -> None:
    one, other = told(CHEATS[name][0][:1900])
    assert one.count("\n") == other.count("\n") >= 1


# --- Shakespeare's ----------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "sonnets.jsonl"


@pytest.mark.skipif(not DATA.exists(), reason="the reference data is not beside the checkout")
def test_shakespeares_sonnets_and_the_same_shuffled() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    poems = [row["lines"] for row in rows if row["regular"]]
    real = [hear(*lines) for lines in poems]
    assert sum(h.score >= 0.9 for h in real) >= 0.9 * len(real)
    rng = random.Random(0)
    for unit in ("lines", "words"):
        mixed = []
        for lines in poems:
            if unit == "lines":
                mixed.append(hear(*rng.sample(lines, 14)))
            else:
                mixed.append(
                    hear(*(" ".join(rng.sample(words, len(words))) for words in map(str.split, lines)))
                )
        for part in ("score", "rhyme"):
            a = [h.score if part == "score" else h.parts["rhyme"] for h in real]
            b = [h.score if part == "score" else h.parts["rhyme"] for h in mixed]
            above = sum((x > y) + (x == y) / 2 for x in a for y in b) / len(a) / len(b)
            assert above >= 0.99, (unit, part)
