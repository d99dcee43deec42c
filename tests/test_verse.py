"""近体诗: known poems, poems written to rule, each fault alone, an oracle written another way, and cheats."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai import cli
from liubai.grade import GradeItem, check_verifier, grade
from liubai.grade.explain import explain
from liubai.grade.options import check_options
from liubai.grade.tones import EITHER, LEVEL, OBLIQUE, book, plain_forms
from liubai.grade.verse import FORMS, WEIGHTS, Reading, read_verse, verse
from liubai.measure.soundness import soundness
from liubai.problems.questions import Question
from liubai.types import Problem

POEMS = {  # all of the Tang
    "登鸛雀樓": ("五绝", "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"),
    "夜雨寄北": ("七绝", "君問歸期未有期，巴山夜雨漲秋池。何當共剪西窗燭，却話巴山夜雨時。"),
    "早發白帝城": ("七绝", "朝辭白帝彩雲間，千里江陵一日還。兩岸猿聲啼不住，輕舟已過萬重山。"),
    "春望": (
        "五律", "國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。"
        "烽火連三月，家書抵萬金。白頭搔更短，渾欲不勝簪。",
    ),
    "賦得古原草送別": (
        "五律", "離離原上草，一歲一枯榮。野火燒不盡，春風吹又生。"
        "遠芳侵古道，晴翠接荒城。又送王孫去，萋萋滿別情。",
    ),
    "登高": (
        "七律", "風急天高猿嘯哀，渚清沙白鳥飛迴。無邊落木蕭蕭下，不盡長江滾滾來。"
        "萬里悲秋常作客，百年多病獨登臺。艱難苦恨繁霜鬢，潦倒新停濁酒杯。",
    ),
}  # fmt: skip
LEVEL_SIGN = {"平": LEVEL, "仄": OBLIQUE}
BOOK = book("pingshui")
SEEDS = st.integers(0, 10**6)


def read(form: str, *lines: str, rhyme: str = "pingshui") -> Reading:
    return read_verse(form, "\n".join(lines), {"rhyme": rhyme})


# --- the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("character", "tone", "rhymes"),
    [
        *(("東", LEVEL, ["上平一東"]), ("樓", LEVEL, ["下平十一尤"]), ("月", OBLIQUE, [])),
        ("國", OBLIQUE, []),
        *(("看", EITHER, ["上平十四寒"]), ("思", EITHER, ["上平四支"]), ("中", EITHER, ["上平一東"])),
        # simplified; of two traditional ones, the readings of both
        *(("楼", LEVEL, ["下平十一尤"]), ("国", OBLIQUE, []), ("东", LEVEL, ["上平一東"])),
        ("干", EITHER, ["上平十四寒", "下平一先"]),
        # variants, and what the smaller book lacks
        *(("却", OBLIQUE, []), ("爲", EITHER, ["上平四支"]), ("隣", LEVEL, ["上平十一真"])),
        ("啼", LEVEL, ["上平八齊"]),
        *(("龘", 0, []), ("a", 0, []), ("口", OBLIQUE, [])),
    ],
)  # fmt: skip
def test_tones_and_rhymes_of_pingshui(character: str, tone: int, rhymes: list[str]) -> None:
    assert BOOK.tones.get(character, 0) == tone
    assert BOOK.names(BOOK.rhymes.get(character, 0)) == rhymes


def test_xinyun_is_mandarin() -> None:
    modern = book("xinyun")
    assert [modern.tones[c] for c in "国白竹月楼看"] == [LEVEL, LEVEL, LEVEL, OBLIQUE, LEVEL, EITHER]
    assert modern.names(modern.rhymes["诗"]) == ["十三支平"]
    assert modern.names(modern.rhymes["期"]) == modern.names(modern.rhymes["驴"]) == ["十二齊平"]
    assert modern.names(modern.rhymes["穷"]) == modern.names(modern.rhymes["城"]) == ["十一庚平"]
    assert not modern.rhymes["城"] & modern.near[modern.groups.index("十唐平")]


def test_the_books_are_whole() -> None:
    assert (len(BOOK.groups), len(book("xinyun").groups)) == (30, 14)
    for each in (BOOK, book("xinyun")):
        assert len(each.tones) > 14_000
        assert all(bool(each.rhymes.get(c)) == bool(tone & LEVEL) for c, tone in each.tones.items())
        assert sum(tone == EITHER for tone in each.tones.values()) < 0.12 * len(each.tones)
    # what is simplified reads like what it stands for, but for a few that stand for another reading of it
    pairs = [(BOOK.tones.get(chr(a), 0), BOOK.tones.get(chr(b), 0)) for a, b in plain_forms().items()]
    assert sum(a & b == a for a, b in pairs) > 0.95 * len(pairs)


# --- poems to rule --------------------------------------------------------------------------------

LINES = {  # type -> five, seven
    "a": ("仄仄平平仄", "平平仄仄平平仄"), "A": ("仄仄仄平平", "平平仄仄仄平平"),
    "b": ("平平平仄仄", "仄仄平平平仄仄"), "B": ("平平仄仄平", "仄仄平平仄仄平"),
}  # fmt: skip
SEQUENCES = ("aBbAaBbA", "bAaBbAaB", "ABbAaBbA", "BAaBbAaB")
#: characters of one tone, whose simplified form has it, too
ONE_TONE = {
    sign: [
        c for c, t in BOOK.tones.items() if t == bit and BOOK.tones.get(c.translate(plain_forms()), 0) & bit
    ]
    for sign, bit in LEVEL_SIGN.items()
}


def rhyming(group: str) -> list[str]:
    bit = 1 << BOOK.groups.index(group)
    plain = {c: BOOK.rhymes.get(c.translate(plain_forms()), 0) for c in ONE_TONE["平"]}
    return [c for c, bits in plain.items() if BOOK.rhymes[c] == bit and bits & bit]


def written(patterns: list[str], rng: random.Random, group: str = "下平七陽", **ends: str) -> list[str]:
    """Lines whose characters, all different, have just these tones; level ends rhyme in ``group``, or line
    ``l3`` in another one."""
    used: set[str] = set()

    def one(among: list[str]) -> str:
        while True:
            character = rng.choice(among)
            plain = character.translate(plain_forms())
            if plain not in used:
                used.add(plain)
                return character

    lines = []
    for number, pattern in enumerate(patterns, 1):
        line = "".join(one(ONE_TONE[sign]) for sign in pattern[:-1])
        among = rhyming(ends.get(f"l{number}", group)) if pattern[-1] == "平" else ONE_TONE["仄"]
        lines.append(line + one(among))
    return lines


def patterns_of(form: str, sequence: str) -> list[str]:
    count, length = FORMS[form]
    return [LINES[t][length == 7] for t in sequence[:count]]


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_a_poem_to_rule_has_the_full_score(form: str, sequence: str, seed: int) -> None:
    rng = random.Random(seed)
    lines = written(patterns_of(form, sequence), rng)
    reading = read(form, *lines)
    assert reading.score == 1.0
    assert reading.types == sequence[: len(lines)]
    assert (reading.rhyme, reading.first) == ("下平七陽", "same" if sequence[0].isupper() else "")
    assert reading.faults == []
    # free positions are free, where nothing becomes ill
    simplified = [line.translate(plain_forms()) for line in lines]
    assert read(form, *simplified).score == 1.0


@pytest.mark.parametrize("name", POEMS)
def test_known_poems(name: str) -> None:
    form, text = POEMS[name]
    simplified = text.translate(plain_forms())
    mixed = "".join(c if i % 3 else d for i, (c, d) in enumerate(zip(text, simplified, strict=True)))
    bare = text.replace("，", "\n").replace("。", "\n")
    for version in (text, simplified, mixed, bare, bare.replace("\n", " "), " ".join(text), f"\n{text}\n\n"):
        assert verse(form, version, {}) >= 0.95
    other = next(f for f, shape in FORMS.items() if shape[1] != FORMS[form][1])
    assert verse(other, text, {}) == 0


def test_an_old_style_quatrain_is_no_regulated_one() -> None:
    assert verse("五绝", "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。", {}) < 0.75


def oracle(lines: list[str], first_rhymes: bool) -> float:
    """The share of key positions, written as strings: every line against its pattern in each sequence."""
    length, best = len(lines[0]), 0
    keys = [*range(1, length - 1, 2), length - 1]
    signs = {LEVEL: "平", OBLIQUE: "仄", EITHER: "平仄", 0: ""}
    said = [[signs[BOOK.tones.get(c, 0)] for c in line] for line in lines]
    for sequence in SEQUENCES:
        if sequence[0].isupper() and not first_rhymes:
            continue
        right = 0
        for i, t in enumerate(sequence[: len(lines)]):
            can = said[i]
            pattern = LINES[t][length == 7]
            for k in keys:
                fits = pattern[k] in can[k]
                if k == length - 2 and can[k] and t == "b" and "平" in can[-5] and "仄" in can[-3]:
                    fits = True
                if k == length - 2 and can[k] and t == "a" and "平" in said[i + 1][-3]:
                    fits = True
                right += fits
        best = max(best, right)
    return best / (len(keys) * len(lines))


COMMON = "".join(text for _, text in POEMS.values()).replace("，", "").replace("。", "") + "龘靐"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FORMS)), SEEDS)
def test_tones_agree_with_an_oracle(form: str, seed: int) -> None:
    rng = random.Random(seed)
    count, length = FORMS[form]
    lines = ["".join(rng.choice(COMMON) for _ in range(length)) for _ in range(count)]
    if len({line.translate(plain_forms()) for line in lines}) == count:
        reading = read(form, *lines)
        assert reading.parts["tones"] == pytest.approx(oracle(lines, bool(reading.first)))
        assert 0 <= reading.score <= 1


# --- each fault alone -----------------------------------------------------------------------------


def faulty(change: dict[int, str], sequence: str = "aBbAaBbA", form: str = "五律", **ends: str) -> Reading:
    """A poem to rule in which line ``i`` (from 1) has other tones."""
    patterns = patterns_of(form, sequence)
    for i, pattern in change.items():
        assert len(pattern) == len(patterns[i - 1])
        patterns[i - 1] = pattern
    return read(form, *written(patterns, random.Random(0), **ends))


def codes(reading: Reading) -> list[str]:
    return [fault.code for fault in reading.faults]


@pytest.mark.parametrize(
    ("change", "sequence", "form"),
    [
        ({3: "平平仄平仄"}, "aBbAaBbA", "五律"),  # 平平仄平仄 for b
        ({3: "平仄平平仄平仄"}, "aBbAaBbA", "七律"),
        ({1: "仄仄平仄仄", 2: "平平平仄平"}, "aBbAaBbA", "五律"),  # rescued by the next line
        ({1: "仄仄仄仄仄", 2: "仄平平仄平"}, "aBbAaBbA", "五律"),  # both rescues in one
        ({2: "仄平平仄平"}, "aBbAaBbA", "五律"),  # no 孤平: it has a second level tone
        ({1: "平仄平平仄", 4: "平仄仄平平"}, "aBbAaBbA", "五律"),  # free positions
        ({1: "仄仄仄平仄", 3: "仄平平仄仄"}, "aBbAaBbA", "五律"),
    ],
)
def test_rescues_and_free_positions_cost_nothing(change: dict[int, str], sequence: str, form: str) -> None:
    reading = faulty(change, sequence, form)
    assert reading.score == 1.0, reading.faults


@pytest.mark.parametrize(
    ("change", "part", "share", "code"),
    [
        ({3: "仄平仄平仄"}, "tones", 23 / 24, "tones"),  # it must begin level
        ({1: "仄仄平仄仄"}, "tones", 23 / 24, "tones"),  # nothing rescues it
        ({4: "仄仄仄仄平"}, "tones", 23 / 24, "tones"),
        ({7: "平平平仄平"}, "tones", 23 / 24, "tones"),  # an odd line that ends level
        ({2: "仄平仄仄平"}, "ills", 6 / 8, "lonely"),  # seven sound lines, less one ill
        ({4: "仄仄平平平"}, "ills", 6 / 8, "three level"),
    ],
)
def test_a_fault_alone(change: dict[int, str], part: str, share: float, code: str) -> None:
    reading = faulty(change)
    assert codes(reading) == [code]
    assert reading.parts[part] == pytest.approx(share)
    others = {p: s for p, s in reading.parts.items() if p != part}
    assert others == dict.fromkeys(others, 1.0)
    assert reading.score == pytest.approx(1 - WEIGHTS[part] * (1 - share), abs=1e-3)


def test_couplets_that_do_not_stick_together() -> None:
    # the second half of another sequence: 失粘 between lines 4 and 5 alone
    reading = faulty({5: "平平平仄仄", 6: "仄仄仄平平", 7: "仄仄平平仄", 8: "平平仄仄平"})
    assert reading.parts["links"] == pytest.approx(6 / 7)
    assert [(f.line, f.code) for f in reading.faults if f.code == "joined"] == [(4, "joined")]
    assert 0.6 < reading.parts["tones"] < 0.7
    against = faulty({2: "仄仄仄平平"}, "aBbA", "五绝")
    assert [(f.line, f.code) for f in against.faults if f.code in ("against", "joined")] == [
        (1, "against"), (2, "joined"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "share", "first"),
    [
        ({}, 1.0, "same"),
        ({"l1": "上平三江"}, 1.0, "near"),  # 借邻韵
        ({"l1": "上平一東"}, 1.0, ""),
        ({"l4": "上平一東"}, 2 / 3, "same"),
        ({"l4": "上平三江"}, 2.5 / 3, "same"),
        ({"l2": "上平一東", "l4": "上平一東"}, 1 / 3, None),
        ({"l2": "上平一東", "l4": "下平十二侵", "l6": "下平八庚"}, 0.0, None),
    ],
)
def test_rhyme(ends: dict[str, str], share: float, first: str | None) -> None:
    reading = faulty({}, "ABbAaBbA", **ends)
    assert reading.parts["rhyme"] == pytest.approx(share)
    if first is not None:
        assert (reading.first, reading.rhyme) == (first, "下平七陽")
        # a first line that ends level without rhyming is a fault of tone
        assert reading.parts["tones"] == pytest.approx(1.0 if first else 23 / 24)


def test_an_oblique_rhyme_is_half_as_good() -> None:
    old = read("五绝", "春眠不覺曉", "處處聞啼鳥", "夜來風雨聲", "花落知多少")
    assert (old.parts["rhyme"], old.rhyme) == (0.5, "上聲十七篠")
    assert "oblique rhyme" in codes(old)
    assert read("五绝", "春眠不覺曉", "處處聞啼鳥", "夜來風雨聲", "花落知多鳥").parts["rhyme"] == 0


def test_a_character_rhymes_with_others_alone() -> None:
    base = "白日依山盡，黃河入海流。欲窮千里目，更上一層{}。"
    assert read_verse("五绝", base.format("樓"), {}).parts["rhyme"] == 1
    for same in ("流",):
        reading = read_verse("五绝", base.format(same), {})
        assert (reading.parts["rhyme"], codes(reading)) == (0, ["same rhyme"])
    # nor with itself in another script
    both = "白日依山盡，黃河入海樓。欲窮千里目，更上一層楼。"
    assert read_verse("五绝", both, {}).parts["rhyme"] == 0


def test_modern_rhymes_are_asked_for() -> None:
    # 國 is oblique of old and level today; 中 and 龍 have two groups of old and one today
    modern = book("xinyun")
    lines = ["好雨知時節", "當春乃發生", "隨風潛入夜", "潤物細無聲"]
    assert read("五绝", *lines).parts["rhyme"] == read("五绝", *lines, rhyme="xinyun").parts["rhyme"] == 1
    apart = ["白日依山盡", "黃河入海中", "欲窮千里目", "更上一層龍"]
    assert read("五绝", *apart).parts["rhyme"] == 0.5
    assert read("五绝", *apart, rhyme="xinyun").parts["rhyme"] == 1
    assert modern.tones["節"] == LEVEL != BOOK.tones["節"]


# --- cheats ---------------------------------------------------------------------------------------

FORM, POEM = POEMS["登鸛雀樓"]
FOUR = POEM.replace("。", "，").strip("，").split("，")
EITHERS = [c for c, t in BOOK.tones.items() if t == EITHER]
CHEATS = {  # what, and what it may earn at most
    "nothing": ("", 0),
    "a title": (f"登鸛雀樓\n{POEM}", 0.5),
    "a title and an author": (f"《登鸛雀樓》 王之渙\n{POEM}", 0.5),
    "Latin before": (f"Here is a poem:\n{POEM}", 0.6),
    "Latin after": (f"{POEM} Enjoy!", 0.7),
    "Chinese after": (f"{POEM}好詩", 0.85),
    "pinyin after": (f"{POEM} bái rì yī shān jìn", 0.7),
    "pinyin alone": ("bái rì yī shān jìn, huáng hé rù hǎi liú, yù qióng qiān lǐ mù, gèng shàng", 0),
    "letters in a line": (POEM.replace("河", "he"), 0.5),
    "letters in the lines": (POEM.replace("，", "ab，").replace("。", "cd。"), 0.1),
    "a zero-width space": (POEM.replace("河", "河\u200b"), 0.5),
    "kana": (POEM.replace("入", "の"), 0.5),
    "full stops": (POEM.replace("，", "，" * 9), 0.6),
    "commas for characters": ("，，，，，。，，，，，。，，，，，。，，，，，。", 0),
    "commas in a line": (POEM.replace("白", "白，"), 0.5),
    "a line four times": ("，".join([FOUR[1]] * 4), 0.2),
    "a couplet twice": ("，".join(FOUR[:2] * 2), 0.4),
    "a couplet twice, but for two characters": ("，".join([*FOUR[:2], "白日倚山盡", "黃河入海樓"]), 0.5),
    "a line in both scripts": ("，".join([FOUR[1], "黄河入海流", FOUR[3], "更上一层楼"]), 0.4),
    "the poem twice": (POEM * 2, 0.5),
    "one character": ("，".join(["明" * 5] * 4), 0.1),
    "one character a line": ("，".join(c * 5 for c in "明月流樓"), 0.1),
    "two characters": ("，".join(["月明明月月", "明月月明明", "明明明月月", "月月月明明"]), 0.1),
    "unknown characters": ("，".join("龘靐齉爩麤"[i:] + "龘靐齉爩麤"[:i] for i in range(4)), 0.15),
    "private characters": ("，".join(chr(0xE000 + i) * 5 for i in range(4)), 0),
    "emoji": ("，".join(["😀😃😄😁😆"] * 4), 0),
    "one long line": ("".join(FOUR), 0),
    "polyphones alone": ("，".join("".join(EITHERS[i * 5 : i * 5 + 5]) for i in range(4)), 0.5),
    "one rhyme twice": (POEM.replace("樓", "流"), 0.75),
    "rhymes in two scripts": (POEM.replace("流", "楼"), 0.75),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pay(name: str) -> None:
    answer, most = CHEATS[name]
    assert verse(FORM, POEM, {}) == 1.0
    for book_name in ("pingshui", "xinyun") if name != "polyphones alone" else ("pingshui",):
        assert verse(FORM, answer, {"rhyme": book_name}) <= most


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.text(min_size=1, max_size=20), st.booleans())
def test_text_beside_the_poem_never_pays(seed: int, more: str, behind: bool) -> None:
    rng = random.Random(seed)
    lines = ["".join(rng.choice(COMMON) for _ in range(5)) for _ in range(4)]
    alone = "\n".join(lines)
    if behind:
        assert verse("五绝", f"{alone}\n{more}", {}) <= verse("五绝", alone, {})
    else:
        assert verse(FORM, f"{more}\n{POEM}", {}) <= 1.0


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.permutations(range(4)))
def test_a_repeated_line_is_worth_no_more_than_none(seed: int, order: list[int]) -> None:
    rng = random.Random(seed)
    lines = ["".join(rng.sample(COMMON, 5)) for _ in range(4)]
    i, j = sorted(order[:2])
    repeated = [lines[i] if k == j else line for k, line in enumerate(lines)]
    reading = read("五绝", *repeated)
    assert reading.lines[j] is None
    assert reading.score == read("五绝", *lines[:j], "某", *lines[j + 1 :]).score


def test_a_pile_of_polyphones_earns_less_than_careful_writing() -> None:
    rng = random.Random(0)
    rhymes = [c for c in EITHERS if BOOK.rhymes[c] == BOOK.rhymes["看"]]
    best = 0.0
    for _ in range(200):
        lines = ["".join(rng.sample(EITHERS, 5)) for _ in range(4)]
        lines[1], lines[3] = lines[1][:4] + rhymes[0], lines[3][:4] + rhymes[1]
        best = max(best, read("五绝", *lines).score)
    assert best < 0.4
    few = written(patterns_of("五绝", "aBbA"), rng, group="上平十四寒")
    few[1] = few[1][:4] + rhymes[0]
    assert read("五绝", *few).score == 1.0


def test_doubled_characters_are_spared_and_idle_repetition_is_not() -> None:
    form, text = POEMS["登高"]  # 蕭蕭, 滾滾
    assert read_verse(form, text, {}).factors["repeats"] == 1
    assert read_verse(*POEMS["夜雨寄北"], {}).factors["repeats"] > 0.95
    doubled = ["天天明明月", "地地山山林", "人人家家國", "花花草草深"]
    assert read("五绝", *doubled).factors["repeats"] < 0.9


def test_any_answer_is_judged_quickly() -> None:
    verse(FORM, POEM, {})
    started = time.perf_counter()
    for piece in ("明", "，", "明，", " ", "\n", "a", "明 ", "“", "\u0301", "𪚥", "看"):
        assert 0 <= verse("七律", piece * 2000, {}) <= 0.2
    assert time.perf_counter() - started < 2


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(FORMS)), st.text(max_size=200) | st.text(alphabet=COMMON + "，。\n a", max_size=90)
)
def test_no_answer_crashes_it(form: str, answer: str) -> None:
    assert 0 <= verse(form, answer, {}) <= 1


# --- how it is asked ------------------------------------------------------------------------------


def test_a_verdict_has_the_score_under_its_name() -> None:
    good = grade(GradeItem("verse", "五絕", f"<think> </think> <answer>{POEM}</answer>"))
    assert (good.correct, good.parts) == (True, {"correct": 1.0, "format": 1.0, "verse": 1.0})
    half = grade(GradeItem("verse", "五绝", f"<answer>{POEM * 2}</answer>"))
    assert not half.correct
    assert half.parts["verse"] == half.parts["correct"] == verse("五绝", POEM * 2, {})
    assert grade(GradeItem("verse", "五绝", POEM)).parts == {"correct": 0.0, "format": 0.0, "verse": 0.0}
    check_verifier("verse")


@pytest.mark.parametrize(
    ("gold", "form"),
    [("五绝", "五绝"), ("七絕", "七绝"), (" 五言律詩 ", "五律"), ("七言绝句", "七绝"), ("七律", "七律")],
)
def test_names_of_forms(gold: str, form: str) -> None:
    assert read_verse(gold, "", {}).form == form


@pytest.mark.parametrize(
    ("gold", "meta", "message"),
    [
        ("", {}, "the form of a poem is one of"),
        ("詞", {}, "the form of a poem is one of"),
        ("五绝七绝", {}, "the form of a poem is one of"),
        ("五绝", {"rhyme": "guangyun"}, "meta 'rhyme' is pingshui or xinyun"),
        ("五绝", {"rhyme": 3}, "meta 'rhyme' is pingshui or xinyun"),
    ],
)
def test_what_cannot_be_asked_is_an_error(gold: str, meta: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verse(gold, POEM, meta)
    assert message in (grade(GradeItem("verse", gold, f"<answer>{POEM}</answer>", meta)).error or "")


def test_options() -> None:
    check_options("verse", "五绝", {"rhyme": "xinyun"})
    for meta in ({"rhyme": "no"}, {"book": "xinyun"}):
        with pytest.raises(ValueError, match="meta '"):
            check_options("verse", "五绝", meta)


def told(form: str, answer: str) -> tuple[str, str]:
    item = GradeItem("verse", form, f"<answer>{answer}</answer>")
    words = explain(item, grade(item))
    assert all(english and chinese for english, chinese in words)
    return "\n".join(e for e, _ in words), "\n".join(c for _, c in words)


def test_a_score_is_explained_in_two_languages() -> None:
    english, chinese = told("五绝", "白日依山盡，黃河入海流。欲窮千里目，更上一層山。")
    assert "line 4 更上一層山 中仄仄平平, type A 仄仄仄平平: 山 does not rhyme (上平十五刪)" in english
    assert "第4句 更上一層山 中仄仄平平，句型 A 仄仄仄平平：山 出韵（上平十五刪）" in chinese
    assert "rhyme 0 of 0.3: 0% of the even lines rhyme with another" in english
    assert "押韵 0/0.3：偶句相押者 0%" in chinese
    assert "tones 0.3 of 0.3: 12 of 12 key positions" in english
    assert "links 0.15 of 0.15: 3 of 3 neighbouring lines" in english
    assert "孤平、三平尾） 0.1/0.1：所存各句无孤平、无三平尾" in chinese
    english, chinese = told("五绝", "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。")
    assert "rhyme group 下平十一尤; the first line does not rhyme" in english
    assert english.count(": in order") == chinese.count("：合律") == 4
    english, chinese = told("五绝", "黃河入海流。更上一層樓。")
    assert "shape 0.075 of 0.15: 2 of 4 lines have 5 characters" in english
    assert "line 3: missing" in english
    assert "第4句：缺" in chinese
    english, chinese = told(
        "七绝", "少小离家老大回，乡音无改鬓毛衰。儿童相见不相识，笑问客从何处来。",
    )  # fmt: skip
    assert "衰 is of a neighbouring group (上平四支)" in english
    assert "衰 属邻韵（上平四支）" in chinese


@pytest.mark.parametrize(
    ("verifier", "gold", "response", "english", "chinese"),
    [
        ("number", "5", "<answer> </answer>", "the answer is empty (answer tag)", "答案为空（答案标签）"),
        ("number", "5", "<answer>5", "the answer is never closed", "答案出处：答案标签没有结束"),
        ("verse", "sonnet", f"<answer>{POEM}</answer>", "not judged: verse: ", "未评：verse: "),
        ("verse", "五绝", f"<answer>{POEM}</answer>", "中 either", "A 仄仄仄平平"),
        ("verse", "五绝", "<answer>春眠不覺曉，花</answer>", "1 character instead", "1 字，应为"),
        (
            "faithful", "anna has 3 red cups . ben has 5 blue hats . summarise",
            "<answer>anna 4 red cups</answer>", "not in the passage: a number: ", "原文所无：数目：",
        ),
    ],
)  # fmt: skip
def test_what_other_answers_are_told(
    verifier: str, gold: str, response: str, english: str, chinese: str
) -> None:
    """Reasons in whole sentences of one language each, and no class of an exception."""
    item = GradeItem(verifier, gold, response)
    words = explain(item, grade(item))
    assert any(english in one for one, _ in words)
    assert any(chinese in other for _, other in words)
    assert "ValueError" not in str(words)


@pytest.mark.parametrize("name", CHEATS)
def test_every_fault_has_words(name: str) -> None:
    english, chinese = told(FORM, CHEATS[name][0] or "?")
    assert english.count("\n") == chinese.count("\n") >= 1


def test_the_command_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"verifier": "verse", "gold": "五绝", "response": f"<answer>{POEM}</answer>"},
        {"verifier": "number", "gold": "5", "response": "five"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["liubai", "grade", str(path), *options])
        with contextlib.suppress(SystemExit):
            assert cli.main() == 0
        return capsys.readouterr().out

    assert [json.loads(line).keys() for line in run().splitlines()] == [{"correct", "answer", "parts"}] * 2
    first, second = map(json.loads, run("--explain").splitlines())
    assert first["parts"]["verse"] == 1.0
    assert first["explanation"]["en"][1:3] == [
        "五绝 by 平水韵: 1 of 1",
        "shape 0.15 of 0.15: 4 of 4 lines have 5 characters, each line once",
    ]
    assert len(first["explanation"]["en"]) == len(first["explanation"]["zh"])
    assert second["explanation"]["en"][0] == "the answer: no answer tag and no box after the thought"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    lines = run("--explain").splitlines()
    assert json.loads(lines[0]).keys() == {"correct", "answer", "parts"}
    assert any(line.startswith("    line 1 白日依山盡 仄仄平平仄") for line in lines)
    assert any(line.startswith("    第1句 白日依山盡 仄仄平平仄") for line in lines)


def test_check_takes_a_poem_for_proof_and_no_trick() -> None:
    def question(solution: str) -> Question:
        return Question(1, Problem("写一首五绝。", "五绝", "verse"), False, solution=solution)

    def kinds(solution: str) -> set[str]:
        return {finding.kind for finding in soundness([question(solution)]).findings} - {"split"}

    assert kinds(POEM) == set()
    assert kinds("") == {"unproven"}
    assert kinds(POEM * 2) == {"gold"}


# --- the Tang poems -------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "tang300_regulated.jsonl"


@pytest.mark.skipif(not DATA.exists(), reason="the reference data is not beside the checkout")
def test_regulated_poems_of_the_tang_and_the_same_shuffled() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["form_source"] == "label" and row["form"] != "五绝"]
    scores = [verse(row["form"], row["text"], {}) for row in rows]
    assert sum(score >= 0.9 for score in scores) >= 0.95 * len(rows)
    rng = random.Random(0)
    for unit in ("lines", "characters"):
        mixed = []
        for row in rows * 3:
            lines = row["lines"]
            if unit == "lines":
                lines = rng.sample(lines, len(lines))
            else:
                loose = rng.sample("".join(lines), len("".join(lines)))
                cuts = range(0, len(loose) + 1, len(lines[0]))
                lines = ["".join(loose[a:b]) for a, b in pairwise(cuts)]
            mixed.append(verse(row["form"], "\n".join(lines), {}))
        above = sum((a > b) + (a == b) / 2 for a in scores for b in mixed)
        assert above / len(scores) / len(mixed) >= 0.97, unit
