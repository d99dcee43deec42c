r"""In which language is a text? R1's language consistency (arXiv 2501.12948v2, first RL stage) counts words.

- A **Latin word** counts as English: a run of Latin letters, accents included, with apostrophes inside it
  ("we'll"). French does so, too: words tell scripts apart, not languages.
- **Chinese words**: Chinese is written without spaces, so up to four Han characters between anything else
  (blanks, punctuation, digits) are one word, and a longer run of n has ⌈n/2⌉, which is about what a
  dictionary would find. Han characters in Japanese are among them.
- A run of two or more letters of any **other** script is a word of neither.

Everything else is neutral, for it is the same in every language: digits, operators, punctuation; single
letters (x, n, and with them "a" and "I"); two or three capitals (AB, LHS); a Latin word that a ``=`` or ``:``
touches from the left (=big, :far), which is a value; the think and answer tags; LaTeX's commands and what
stands in ``$…$``, ``$$…$$``, ``\(…\)`` and ``\[…\]``, but a dollar before a sum of money opens nothing; code
between backticks. Left out on purpose: what is said inside formulas and code, any dictionary, and a list of
the units and functions (cm, log) that outside of formulas are words here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from liubai.errors import UserError
from liubai.grade.extract import TAGS

LANGUAGES = ("en", "zh")

HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff々〇"  #: for a class of characters
LATIN = "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿＡ-Ｚａ-ｚ"
SHORT_RUN = 4  #: Han characters, at most, that are one word

# Every alternative ends at the next sign that could begin it again, so that a thousand openings that
# are never closed do not cost a thousand scans.
_NEUTRAL = re.compile(
    "|".join(
        (
            *map(re.escape, TAGS),
            r"```.*?```",
            r"`[^`\n]++`",
            r"\\\((?:[^\\]|\\[^()])*+\\\)",
            r"\\\[(?:[^\\]|\\[^\[\]])*+\\\]",
            r"\$\$[^$]++\$\$",
            # as Markdown has it: nothing blank inside the dollars, no digit after them
            r"\$(?![\s$])(?:[^$\\\n]|\\[^\n])*+(?<!\s)\$(?!\d)",
            r"\\(?:[A-Za-z]+|[^\w\s])",
        )
    ),
    re.DOTALL,
)
_WORD = re.compile(
    rf"[=:][{LATIN}]+|(?P<zh>[{HAN}]+)|(?P<en>[{LATIN}]+(?:['’][{LATIN}]+)*)|(?P<other>[^\W\d_{HAN}{LATIN}]+)"
)
_LABEL = re.compile(r"[A-Z]{2,3}")


class Words(NamedTuple):
    """How many words of each language; ``other`` are of neither."""

    en: int
    zh: int
    other: int


def require_known(languages: Iterable[str]) -> None:
    """Raises ``UserError`` where one is neither English nor Chinese: its words cannot be told apart."""
    if unknown := sorted(set(languages) - set(LANGUAGES)):
        raise UserError(
            f"the language '{unknown[0][:40]}' of some questions cannot be recognised, only en and zh can; "
            "leave the language reward out (rewards.language = 0) and the filter (readable.consistency = 0)"
        )


def prose(text: str) -> str:
    """``text`` with blanks for tags, formulas, LaTeX's commands and code."""
    return _NEUTRAL.sub(" ", text)


def words(text: str) -> Words:
    """The words of ``text`` by language, neutral ones left out. Linear in its length; never raises."""
    en = zh = other = 0
    for run in _WORD.finditer(prose(text)):
        length = len(run[0])
        if run.lastgroup == "zh":
            zh += 1 if length <= SHORT_RUN else -(-length // 2)
        elif run.lastgroup == "en":
            en += length > 1 and not _LABEL.fullmatch(run[0])
        elif run.lastgroup == "other":  # numerals like ② and ½ are no letters
            other += sum(map(str.isalpha, run[0])) > 1
    return Words(en, zh, other)


def consistency(text: str, language: str, empty: float = 0.0) -> float:
    """The share of the words of ``text`` that are of ``language``, "en" or "zh", from 0 to 1.

    ``empty`` for a text without words: 0/0, and a reward must not pay for silence. Raises ``ValueError`` for
    any other language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"words are told apart in {' and '.join(LANGUAGES)}, not in {language!r}")
    counted = words(text)
    count = sum(counted)
    if not count:
        return empty
    return (counted.en if language == "en" else counted.zh) / count
