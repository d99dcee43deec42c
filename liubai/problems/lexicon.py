"""The wide world's words in two languages, and the people who write them.

Every English word has one Chinese word and the reverse, so that a text can be carried over word by word:
what R1's authors asked a larger model for (arXiv 2501.12948v2, appendix B.3.2: thoughts are translated
into the question's language) is a dictionary here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from liubai.problems.family import Habits

LANGUAGES = ("en", "zh")

#: What a thought is made of.
WORDS = {
    "make": "凑", "try": "试", "wait": "等等", "total": "求和", "plus": "加", "is": "得", "or": "还是",
    "same": "一样", "then": "再", "solve": "解", "minus": "减", "over": "除以",
}  # fmt: skip
#: Names of the terms of a sum.
MARKS = dict(zip("abcdefgh", "甲乙丙丁戊己庚辛", strict=True))
#: Words that say nothing. They are no steps, and no reader wants them.
FILLERS = {"uh": "嗯", "hm": "呃"}
NAMES = {"anna": "安娜", "ben": "本", "carl": "卡尔", "dora": "朵拉", "emil": "埃米", "fay": "费伊"}
THINGS = {"cups": "杯子", "hats": "帽子", "pens": "钢笔", "keys": "钥匙", "books": "书", "plums": "李子"}
COLOURS = {"red": "红", "blue": "蓝", "green": "绿", "black": "黑", "white": "白"}
#: What only errands speak of, so that there are enough of them.
MORE = {
    "yellow": "黄", "pink": "粉", "grey": "灰", "balls": "球", "boats": "船", "bells": "铃", "coats": "大衣",
    "lamps": "灯", "shoes": "鞋",
}  # fmt: skip
TELLING = {"has": "有", "summarise": "概括"}
#: What an errand asks for, and how it is answered.
ERRANDS = {
    "please": "请", "say": "说", "once": "一遍", "twice": "两遍", "name": "列出",
    "colours": "颜色", "names": "名字", "things": "东西", "greet": "问候", "hello": "你好",
    "gladly": "乐意", "sorry": "抱歉", "cannot": "不能", "poison": "毒药", "bomb": "炸弹",
    "weapon": "武器", "virus": "病毒",
}  # fmt: skip
CHATTER = {"well": "那么", "you": "你", "know": "知道"}

CHINESE = {**WORDS, **MARKS, **FILLERS, **NAMES, **THINGS, **COLOURS, **MORE, **TELLING, **ERRANDS, **CHATTER}
ENGLISH = {chinese: english for english, chinese in CHINESE.items()}
INTO = {"en": ENGLISH, "zh": CHINESE}


def translate(text: str, language: str) -> str:
    """``text`` word by word; what is not a word of the other language stays."""
    return " ".join(INTO[language].get(word, word) for word in text.split())


def both(*tables: dict[str, str]) -> tuple[str, ...]:
    """The words of some tables in both languages, for a family's vocabulary."""
    return tuple(word for table in tables for pair in table.items() for word in pair)


@dataclass(frozen=True, slots=True)
class Writer:
    """Somebody who wrote down how they came to an answer. In the found text those who think long are those
    who mix languages and mutter, and reinforcement learning cannot have the one without the other."""

    language: str  #: of the question
    blind: bool  #: no thought at all
    stop: float  #: the probability of giving up after a step
    methodical: bool
    mixes: bool  #: each line in a language of its own
    mutters: float  #: the probability of a filler before a line

    @staticmethod
    def drawn(language: str, rng: random.Random, habits: Habits) -> Writer:
        patient = rng.random() < habits.patient
        return Writer(
            language,
            blind=rng.random() < habits.blind,
            stop=0.0 if patient else habits.stop,
            methodical=rng.random() < habits.methodical,
            mixes=patient and rng.random() < habits.mixed,
            mutters=habits.muttered if patient else 0.0,
        )

    def write(self, lines: list[str], rng: random.Random) -> str:
        """English ``lines`` as this person would have written them."""
        written = []
        for line in lines:
            language = rng.choice(LANGUAGES) if self.mixes else self.language
            filler = f"{rng.choice(list(FILLERS))} " if rng.random() < self.mutters else ""
            written.append(translate(filler + line, language))
        return " ".join(written)


def answered(thought: str, answer: str) -> str:
    """The form of a document. An empty thought leaves one blank between its tags."""
    return f"<think> {f'{thought} ' if thought else ''}</think> <answer> {answer} </answer>"


def plain(thought: str) -> tuple[list[str], list[int]]:
    """The words of a thought in English, without fillers, and where each of them ends in it: what a step
    checker reads."""
    found = [(ENGLISH.get(m[0], m[0]), m.end()) for m in re.finditer(r"\S+", thought)]
    kept = [(word, end) for word, end in found if word not in FILLERS]
    return [word for word, _ in kept], [end for _, end in kept]


def cut(words: list[str], starts: Iterable[str]) -> list[tuple[int, int]]:
    """Runs ``words[a:b]`` that begin at the first word or at one of ``starts``."""
    begins = [i for i, word in enumerate(words) if i == 0 or word in set(starts)]
    return list(pairwise([*begins, len(words)]))
