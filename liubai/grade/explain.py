"""A verdict in words, in English and Chinese: what each part of a score is for, and line by line what is
wrong.

For ``liubai grade --explain``. What is found is found in :mod:`liubai.grade.verse` and
:mod:`liubai.grade.sonnet`; here it is only said. What :mod:`liubai.grade.faithful` finds is said in
:mod:`liubai.grade.explain_faithful`. Other verifiers have one sentence: where the answer was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from liubai.grade import sonnet as english_verse
from liubai.grade import verse as chinese_verse
from liubai.grade.explain_faithful import faithful_words
from liubai.grade.extract import MAX_ANSWER, MAX_PROGRAM, extract, extract_code
from liubai.grade.judge import LONG, PROGRAMS, GradeItem, Verdict
from liubai.grade.sonnet import LINES, NEAR, PAIRS, SCHEME, Hearing, Line, hear_sonnet
from liubai.grade.tones import BOOKS, EITHER, LEVEL, OBLIQUE
from liubai.grade.verse import FORMS, TYPES, Fault, Reading, read_verse

#: English, Chinese
Sentence = tuple[str, str]

_TONE = {0: "?", LEVEL: "平", OBLIQUE: "仄", EITHER: "中"}
_WORD = {LEVEL: "level (平)", OBLIQUE: "oblique (仄)"}
_PART = {
    "shape": ("shape", "体式"), "tones": ("tones", "平仄"), "rhyme": ("rhyme", "押韵"), "links": ("links",
    "粘对"), "ills": ("ills (孤平, 三平尾)", "病（孤平、三平尾）"), "lines": ("lines",
    "行数"), "metre": ("metre", "格律"), }  # fmt: skip


def explain(item: GradeItem, verdict: Verdict) -> list[Sentence]:
    """The sentences about ``item``, whose verdict is ``verdict``."""
    said = [_where(item)]
    if verdict.error:
        said.append((f"not judged: {verdict.error}", f"未评：{verdict.error}"))
    elif verdict.answer is None:
        said.append(("there is no answer to judge", "没有可评的答案"))
    elif item.verifier == "verse":
        said += verse_words(read_verse(item.gold, verdict.answer, item.meta))
    elif item.verifier == "sonnet":
        said += sonnet_words(hear_sonnet(item.gold, verdict.answer, item.meta))
    else:
        score = verdict.parts["correct"]
        said.append((f"{item.verifier}: {score:g} of 1", f"{item.verifier}：{score:g}（满分 1）"))
        if item.verifier == "faithful":
            said += faithful_words(item.gold, verdict.answer, item.meta)
    if not verdict.parts.get("format"):
        said.append(
            (
                "the format is not one thought and one answer, each in its tags",
                "格式不合：应为一段思考、一个答案，各在标签之内",
            )
        )
    return said


def _where(item: GradeItem) -> Sentence:
    prefilled = item.prefilled()
    if item.verifier in PROGRAMS:
        why = extract_code(item.response, prefilled).why
    else:
        why = extract(item.response, prefilled, MAX_PROGRAM if item.verifier in LONG else MAX_ANSWER).why
    return f"the answer: {why}", f"答案出处：{_in_chinese(why)}"


def _in_chinese(why: str) -> str:
    if empty := re.fullmatch(r"the answer is empty \((.*)\)", why):
        return f"答案为空（{_in_chinese(empty[1])}）"
    if longer := re.fullmatch(r"the (answer|response|program) is longer than (\d+) characters", why):
        what = {"answer": "答案", "response": "回复", "program": "程序"}[longer[1]]
        return f"{what}超过 {longer[2]} 个字符"
    return _WHERE_ZH[why]


_WHERE_ZH = {
    "answer tag": "答案标签",
    "last box": "最后一个 \\boxed",
    "box in the answer tag": "答案标签内的 \\boxed",
    "last fence": "最后一个代码块",
    "no answer tag and no box after the thought": "思考之后没有答案标签，也没有 \\boxed",
    "the thought is never closed": "思考没有结束",
    "an answer tag inside an answer": "答案标签之内又有答案标签",
    "an answer is closed that was never opened": "答案标签有结束而无开始",
    "the answer is never closed": "答案标签没有结束",
    "a box in the answer is never closed": "答案内的 \\boxed 没有结束",
    "different boxes in one answer": "答案内有几个不同的 \\boxed",
    "the last box is never closed": "最后一个 \\boxed 没有结束",
    "no closed fence after the thought, or the last one is never closed": "思考之后没有完整的代码块",
    "the last fence is empty": "最后一个代码块为空",
}


def _sum(
    parts: Mapping[str, float],
    weights: Mapping[str, float],
    score: float,
    what: Sentence,
    why: Mapping[str, Sentence],
) -> list[Sentence]:
    """The score, and what each part adds to it, for which reason."""
    said = [(f"{what[0]}: {score:g} of 1", f"{what[1]}：{score:g}（满分 1）")]
    for part, weight in weights.items():
        (english, chinese), worth = _PART[part], f"{weight * parts[part]:.3g}"
        said.append(
            (
                f"{english} {worth} of {weight:g}: {why[part][0]}",
                f"{chinese} {worth}/{weight:g}：{why[part][1]}",
            )
        )
    return said


# --- 近体诗 ---------------------------------------------------------------------------------------


def verse_words(reading: Reading) -> list[Sentence]:
    """The score and its parts, each line, and what makes the whole smaller."""
    name = BOOKS[reading.book]
    what = (f"{reading.form} by {name}", f"{reading.form}，{name}")
    said = _sum(reading.parts, chinese_verse.WEIGHTS, reading.score, what, _verse_parts(reading))
    said += _factors(reading.factors)
    by_line: dict[int, list[Sentence]] = {}
    for fault in reading.faults:
        by_line.setdefault(fault.line, []).append(_verse_fault(fault, reading))
    for i, line in enumerate(reading.lines):
        tones = "".join(_TONE[tone] for tone in reading.tones[i])
        faults = by_line.get(i, [])
        if line is None:
            faults = faults or [("missing", "缺")]
            said.append(_joined(f"line {i + 1}", f"第{i + 1}句", faults))
        else:
            kind = reading.types[i]
            wanted = _pattern(kind, len(line))
            said.append(
                _joined(
                    f"line {i + 1} {line} {tones}, type {kind} {wanted}",
                    f"第{i + 1}句 {line} {tones}，句型 {kind} {wanted}",
                    faults or [("in order", "合律")],
                )
            )
    return [*said, *by_line.get(-1, []), _SIGNS]


#: what a reader of the lines has to know
_SIGNS = (
    "signs: 平 level, 仄 oblique, 中 either (the character has both readings); types: a 仄仄平平仄, "
    "A 仄仄仄平平, b 平平平仄仄, B 平平仄仄平, in seven characters with two more of the other tone in front",
    "符号：中，可平可仄（多音字）；句型：a 仄仄平平仄，A 仄仄仄平平，b 平平平仄仄，B 平平仄仄平；"
    "七言前加相反的两字",
)


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _joined(english: str, chinese: str, sentences: list[Sentence]) -> Sentence:
    return (
        f"{english}: {'; '.join(s[0] for s in sentences)}",
        f"{chinese}：{'；'.join(s[1] for s in sentences)}",
    )


def _pattern(kind: str, length: int) -> str:
    five = TYPES[kind]
    # two more in front, of the other tone than the first two of the five have
    front = (EITHER - five[0],) * 2 if length == 7 else ()
    return "".join(_TONE[tone] for tone in (*front, *five))


def _verse_parts(reading: Reading) -> dict[str, Sentence]:
    count, length = FORMS[reading.form]
    there = sum(line is not None for line in reading.lines)
    keys = count * (length // 2 + 1)
    fit, linked = round(reading.parts["tones"] * keys), round(reading.parts["links"] * (count - 1))
    codes = [fault.code for fault in reading.faults]
    ills = codes.count("lonely") + codes.count("three level")
    first = {
        "": ("the first line does not rhyme", "首句不入韵"),
        "same": ("the first line rhymes", "首句入韵"),
        "near": ("the first line borrows a neighbouring rhyme", "首句借邻韵"),
    }[reading.first]
    group, rhymed = reading.rhyme or "–", f"{reading.parts['rhyme']:.0%}"
    return {
        "shape": (
            f"{there} of {count} lines have {length} characters, each line once",
            f"{count} 句中 {there} 句合 {length} 字，且不重复",
        ),
        "tones": (
            f"{fit} of {keys} key positions (the even ones and the last of each line) fit",
            f"{keys} 个关键位置（偶数字与句末字）中 {fit} 个合律",
        ),
        "rhyme": (
            f"{rhymed} of the even lines rhyme with another; rhyme group {group}; {first[0]}",
            f"偶句相押者 {rhymed}；韵部：{group}；{first[1]}",
        ),
        "links": (
            f"{linked} of {count - 1} neighbouring lines are opposed (对) or joined (粘) as they should be",
            f"{count - 1} 处粘对中 {linked} 处合律",
        ),
        "ills": (
            f"{_many(ills, 'line')} with 孤平 or 三平尾"
            if ills
            else "no 孤平 and no 三平尾 among the lines that are there",
            f"{ills} 句有孤平或三平尾" if ills else "所存各句无孤平、无三平尾",
        ),
    }


def _verse_fault(fault: Fault, reading: Reading) -> Sentence:
    d = fault.detail
    if fault.code == "tones":
        return _tone_words(fault, reading)
    simple: dict[str, Callable[[], Sentence]] = {
        "foreign": lambda: ("has signs that are no Chinese characters", "夹有汉字以外的字符"),
        "length": lambda: (f"{_many(d[0], 'character')} instead of {d[1]}", f"{d[0]} 字，应为 {d[1]} 字"),
        "again": lambda: ("was there before", "与前句相同"),
        "missing": lambda: (f"{d[0]} of {d[1]} lines are there", f"只有 {d[0]} 句，应为 {d[1]} 句"),
        "beyond": lambda: (
            f"more than {d[0]} lines: only the first {d[0]} count",
            f"多于 {d[0]} 句，只计前 {d[0]} 句",
        ),
        "strange": lambda: (
            f"{_many(d[0], 'sign')} beside the Chinese characters",
            f"有 {d[0]} 个汉字以外的字符",
        ),
        "marks": lambda: (f"{_many(d[0], 'punctuation mark')} too many", f"标点多出 {d[0]} 个"),
        "no rhyme": lambda: ("no line that must rhyme ends in a level tone", "韵脚没有平声字"),
        "oblique rhyme": lambda: (
            f"it rhymes in an oblique tone ({d[0]}): half as good",
            f"押仄韵（{d[0]}），折半",
        ),
        "off rhyme": lambda: (
            f"{d[0]} does not rhyme ({', '.join(d[1]) or 'no level reading'})",
            f"{d[0]} 出韵（{'、'.join(d[1]) or '无平声'}）",
        ),
        "near rhyme": lambda: (
            f"{d[0]} is of a neighbouring group ({', '.join(d[1])}), which only the first line may borrow",
            f"{d[0]} 属邻韵（{'、'.join(d[1])}），只有首句可借",
        ),
        "same rhyme": lambda: (f"{d[0]} rhymes with itself", f"韵字 {d[0]} 重复"),
        "against": lambda: (
            "its second character should have the other tone than that of the line above",
            "失对",
        ),
        "joined": lambda: ("its second character should have the tone of that of the line above", "失粘"),
        "lonely": lambda: ("one level tone alone beside the rhyme", "孤平"),
        "three level": lambda: ("three level tones at the end", "三平尾"),
        "unknown": lambda: (f"the rhyme book does not know {d[0]}", f"韵书不收：{d[0]}"),
        "repeats": lambda: (f"repeated too often: {d[0]}", f"重字过多：{d[0]}"),
        "polyphones": lambda: (
            f"{d[0]} key characters have both tones: too many to count as right",
            f"关键位置有 {d[0]} 个平仄两读字，过多",
        ),
    }
    return simple[fault.code]()


def _tone_words(fault: Fault, reading: Reading) -> Sentence:
    kind, positions = fault.detail
    line = reading.lines[fault.line] or ""
    wanted = _pattern(kind, len(line))
    english, chinese = [], []
    for position in positions:
        tone = LEVEL if wanted[position - 1] == "平" else OBLIQUE
        sign = line[position - 1]
        if reading.tones[fault.line][position - 1] & tone:  # the first line's end fits only with a rhyme
            english.append(f"{sign} ends it level without rhyming")
            chinese.append(f"{sign} 平收而不入韵")
        else:
            english.append(f"{sign} (position {position}) should be {_WORD[tone]}")
            chinese.append(f"第{position}字 {sign} 应为{_TONE[tone]}")
    return "; ".join(english), "，".join(chinese)


def _factors(factors: Mapping[str, float]) -> list[Sentence]:
    names = {
        "extra": ("text beside the poem", "诗外文字"),
        "unknown": ("unknown characters", "韵书不收的字"),
        "repeats": ("repetition", "重字"),
        "polyphones": ("too many polyphones", "多音字过多"),
    }
    return [
        (f"times {factor:.3g} for {names[name][0]}", f"因{names[name][1]}乘以 {factor:.3g}")
        for name, factor in factors.items()
        if factor < 1
    ]


# --- sonnets --------------------------------------------------------------------------------------


def sonnet_words(hearing: Hearing) -> list[Sentence]:
    """The score and its parts, each line with its rhyme and metre, and what makes the whole smaller."""
    what = ("Shakespearean sonnet", "莎士比亚体十四行诗")
    said = _sum(hearing.parts, english_verse.WEIGHTS, hearing.score, what, _sonnet_parts(hearing))
    said += _factors(hearing.factors)
    by_line: dict[int, list[Sentence]] = {}
    for fault in hearing.faults:
        by_line.setdefault(fault.line, []).append(_sonnet_fault(fault))
    paired = {j: i for i, j in PAIRS}
    for i, line in enumerate(hearing.lines):
        faults = by_line.get(i, [])
        if line is None:
            said.append(
                _joined(
                    f"line {i + 1} ({SCHEME[i]})",
                    f"第{i + 1}行（{SCHEME[i]}）",
                    faults or [("missing", "缺")],
                )
            )
            continue
        partner = hearing.lines[paired[i]] if i in paired else None
        if partner and not any("rhyme" in f.code for f in hearing.faults if f.line == i):
            faults = [_rhymes_with(partner, line), *faults]
        said.append(
            _joined(
                f"line {i + 1} ({SCHEME[i]}, {line.syllables} syllables)",
                f"第{i + 1}行（{SCHEME[i]}，{line.syllables} 音节）",
                faults or [("in order", "合律")],
            )
        )
    return said + by_line.get(-1, [])


def _sonnet_parts(hearing: Hearing) -> dict[str, Sentence]:
    there = sum(line is not None for line in hearing.lines)
    full = sum(worth == 1 for worth in hearing.rhymes)
    near = sum(0 < worth < 1 for worth in hearing.rhymes)
    off = {fault.line for fault in hearing.faults if fault.code in ("syllables", "strays", "unknown")}
    scan = sum(line is not None and i not in off for i, line in enumerate(hearing.lines))
    pairs = len(PAIRS)
    return {
        "lines": (
            f"{there} of {LINES} lines are there, each once; short, long and unknown ones count in part",
            f"应有 {LINES} 行，有 {there} 行且不重复；过短、过长或生词多的行只计部分",
        ),
        "rhyme": (
            f"of {pairs} pairs {full} rhyme in full and {near} in part",
            f"{pairs} 对韵脚中 {full} 对全押，{near} 对部分押",
        ),
        "metre": (f"{scan} of {LINES} lines scan without a fault", f"{LINES} 行中 {scan} 行格律无误"),
    }


def _rhymes_with(partner: Line, line: Line) -> Sentence:
    one, other = partner.words[-1], line.words[-1]
    return f"{other} rhymes with {one}", f"{other} 与 {one} 押韵"


def _sonnet_fault(fault: Fault) -> Sentence:
    d: tuple[Any, ...] = fault.detail
    if fault.code.startswith("rhyme "):
        kind = fault.code.removeprefix("rhyme ")
        english, chinese = _RHYMES[kind]
        worth = f" ({english_verse.OLD:g})" if kind in (*NEAR, "again") else ""
        return f"{d[1]} – {d[0]}: {english}{worth}", f"{d[1]} – {d[0]}：{chinese}{worth}"
    simple: dict[str, Callable[[], Sentence]] = {
        "again": lambda: ("was there before", "与前行相同"),
        "no words": lambda: ("has no words", "没有单词"),
        "lines": lambda: (f"{_many(d[0], 'line')} instead of {LINES}", f"{d[0]} 行，应为 {LINES} 行"),
        "syllables": lambda: (
            "not ten syllables, nor eleven with a weak end",
            "不是十音节，也不是弱收的十一音节",
        ),
        "strays": lambda: (
            f"{_many(d[0], 'stress', 'stresses')} in weak positions",
            f"{d[0]} 个重音落在弱位",
        ),
        "unknown": lambda: (f"not in the dictionary: {d[0]}", f"词典不收：{d[0]}"),
        "marks": lambda: (f"{_many(d[0], 'punctuation mark')} too many", f"标点多出 {d[0]} 个"),
        "repeats": lambda: (f"only {d[0]} % of the words are different", f"不同的词只占 {d[0]} %"),
    }
    return simple[fault.code]()


_RHYMES = {
    "rich": ("the same sound", "同音"),
    "weak": ("a rhyme of weak syllables", "弱音节押韵"),
    "old": ("a rhyme of Shakespeare's time", "早期现代英语的韵"),
    "again": ("one of them ended a line before", "其一已作过韵脚"),
    "same": ("a word does not rhyme with itself", "同词不算押韵"),
    "used": ("both ended lines before", "两词都已作过韵脚"),
    "one rhyme": ("the quatrain has one rhyme where two are asked", "四行只有一韵，应有两韵"),
    "none": ("no rhyme", "不押韵"),
    "unknown": ("an unknown word rhymes with nothing", "词典不收的词不算押韵"),
}
