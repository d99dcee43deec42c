"""When are two questions the same? Their words and operators say it, not their spelling.

White space, capitals, punctuation, Markdown's emphasis, Unicode's and LaTeX's ways to write the same thing
do not count. Operators do: ``3 + 4`` and ``3 * 4`` are two questions.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

GRAM = 10  #: words in a row that two questions may not share across the line to an evaluation set
SHINGLE = 3  #: words or operators, for telling near duplicates
SIMILAR = (4, 5)  #: share of shingles that near duplicates have in common (Jaccard): whole numbers are exact
#: questions longer than this are cut for telling duplicates
MAX_QUESTION = 100_000

HAN = re.compile(r"[\u3400-\u9fff]")

#: before NFKC, which would make "22" of "2²" and "31/2" of "3½"
_SMALL = [
    (re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), r"^\g<0>"),
    (re.compile(r"[¼-¾⅐-⅞]"), r" \g<0>"),
]
#: what has more than one sign or name
_SPELLINGS = [
    (re.compile(r"[−–‐‑]"), "-"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·⋅∙]"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|[÷\u2044]"), "/"),
    (re.compile(r"\\leq?(?![A-Za-z])|<="), "≤"),
    (re.compile(r"\\geq?(?![A-Za-z])|>="), "≥"),
    (re.compile(r"\\neq?(?![A-Za-z])|!="), "≠"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    # what only moves LaTeX's ink; thousands; lines, bullets and emphasis of Markdown
    (re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\(?:left|right|q?quad|displaystyle)(?![A-Za-z])|\\[,;:! ]"), " "),
    (re.compile(r"([-=*+~])\1{2,}"), " "),
    (re.compile(r"^[ \t]*[-*+>][ \t]+(?=[^\W\d_]{2})", re.MULTILINE), ""),
    (re.compile(r"(?<![\w)*])(\*{1,2})(?=[^\s*])([^*\n]+)(?<=\S)\1(?![\w(*])"), r"\2"),
    (re.compile(r"\*\*"), "^"),
]
#: of a text's kinds of characters: a number, a word, an operator (no hyphen of "well-known" or "and/or")
_TOKEN = re.compile(r"0+(?:\.0+)?|a+|h|\+|(?<!aa)[-/]|[-/](?!aa)")
#: what may tell questions apart whose words are the same: (2 + 3) * 4, 5!, f'(x)
_MARK = re.compile(r"([()\[\]!'′])")


def words(text: str) -> list[str]:
    """Words in small letters, numbers, and operators; of Chinese, every character is a word."""
    plain = text[:MAX_QUESTION]
    for pattern, instead in _SMALL:
        plain = pattern.sub(instead, plain)
    plain = unicodedata.normalize("NFKC", plain)
    for pattern, instead in _SPELLINGS:
        plain = pattern.sub(instead, plain)
    plain = unicodedata.normalize("NFKC", plain.casefold())  # small letters may be spelled anew
    kinds = {c: _kind(c) for c in set(plain)}
    plain = plain.translate({ord(c): None for c, kind in kinds.items() if not kind})
    shape = plain.translate({ord(c): kind for c, kind in kinds.items() if kind})
    found = [plain[m.start() : m.end()] for m in _TOKEN.finditer(shape)]
    while found and found[-1] == "=":  # "3 + 4 = ?"
        found.pop()
    return found


def _kind(c: str) -> str:
    """What stands for a character in :data:`_TOKEN`; "" for one that nobody sees."""
    category = unicodedata.category(c)
    if category == "Cf" or "\ufe00" <= c <= "\ufe0f":  # zero-width spaces, soft hyphens, emoji's selectors
        return ""
    if c in "-/.":
        return c
    if HAN.match(c):
        return "h"
    if category == "Nd":
        return "0"
    if category[0] in "LMN":  # with marks: the vowels of Hindi are some
        return "a"
    return "+" if c in "*^%" or (category in ("Sm", "So", "Sc") and c != "$") else " "


def identity(text: str) -> tuple[str, ...]:
    """Equal for questions that ask the same in the same words, so that their answers have to be equal."""
    pieces = _MARK.split(text[:MAX_QUESTION])  # every second one is a mark
    return tuple(part for i, piece in enumerate(pieces) for part in ([piece] if i % 2 else words(piece)))


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the words and operators of a question alone."""
    digest = blake2b(" ".join(words(text)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def grams(text: str) -> set[int]:
    """The ten-word runs of a text with the operators among them, as hashes; of a shorter text, all of it
    (if three words or operators, or more)."""
    listed = words(text)
    if len(listed) < SHINGLE:
        return set()
    runs: list[str] = []  # an operator is no word of the ten: it goes with the word that follows
    waiting = ""
    for word in listed:
        waiting += word
        if _is_word(word):
            runs.append(waiting)
            waiting = ""
    if waiting:
        runs.append(waiting)
    return set(_runs(runs, min(GRAM, len(runs))))


def _is_word(token: str) -> bool:
    return unicodedata.category(token[0])[0] in "LMN"


def _runs(listed: Sequence[str], n: int) -> Iterator[int]:
    for i in range(len(listed) - n + 1):
        yield int.from_bytes(blake2b(" ".join(listed[i : i + n]).encode(), digest_size=8).digest(), "big")


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """A group's number for each text; texts of a group have the same numbers and :data:`SIMILAR` of their
    three-word runs in common, directly or by way of others. With other numbers it is another question.

    Only texts that share one of their rarest runs are compared: two sets with a Jaccard index J must share
    one among the ``n − ⌈J·n⌉ + 1`` rarest of either (prefix filtering, Chaudhuri et al. 2006).
    """
    listed = [words(t) for t in texts]
    runs = [frozenset(_runs(own, min(SHINGLE, len(own)))) for own in listed]
    numbers = [[word for word in own if unicodedata.category(word[0]) == "Nd"] for own in listed]
    part, whole = SIMILAR
    count: dict[int, int] = defaultdict(int)
    for own in runs:
        for run in own:
            count[run] += 1
    group = list(range(len(texts)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    seen: dict[int, list[int]] = defaultdict(list)
    for i, own in enumerate(runs):
        rare = sorted(own, key=lambda run: (count[run], run))
        prefix = rare[: len(rare) - (len(rare) * part + whole - 1) // whole + 1]
        for j in dict.fromkeys(j for run in prefix for j in seen[run]):
            if root(i) == root(j) or numbers[i] != numbers[j]:
                continue
            if whole * len(own & runs[j]) >= part * len(own | runs[j]):
                a, b = sorted((root(i), root(j)))
                group[b] = a  # the first stands for all
        for run in prefix:
            seen[run].append(i)
    return [root(i) for i in range(len(texts))]
