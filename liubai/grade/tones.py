"""Tones and rhymes of Chinese characters: 平水韵 and 中华新韵, each read once from its table in ``data/``.

A character's tone is a set of two bits: :data:`LEVEL` 平, :data:`OBLIQUE` 仄, both of them for a polyphone, 0
when the book does not know it. Its rhymes are a set of bits too, one a level-tone group. Neither book is
asked what a reading means: a polyphone counts as either (see ``liubai.grade.verse`` for what bounds that).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEVEL, OBLIQUE, EITHER = 1, 2, 3

#: names of the books, as ``meta["rhyme"]`` has them
BOOKS = {"pingshui": "平水韵", "xinyun": "中华新韵"}

#: Level groups that tradition takes for neighbours (通押): the general rhymes of 词林正韵, whose thirteen
#: other classes are what Song poets let a first line borrow from; 江 with 陽 and 佳 with 灰 stand there as
#: well.
_NEIGHBOURS = {
    "pingshui": (
        "上平一東 上平二冬", "上平三江 下平七陽", "上平四支 上平五微 上平八齊", "上平十灰 上平四支",
        "上平九佳 上平十灰", "上平六魚 上平七虞", "上平十一真 上平十二文 上平十三元",
        "上平十三元 上平十四寒 上平十五刪 下平一先", "下平二蕭 下平三肴 下平四豪", "上平九佳 下平六麻",
        "下平八庚 下平九青 下平十蒸", "下平十三覃 下平十四鹽 下平十五咸",
    ),
    "xinyun": ("十二齊平 十三支平", "二波平 三皆平", "九文平 十一庚平"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Book:
    """``tones``: character -> bits of tone; ``rhymes``: character -> bits of its level groups, bit ``i``
    being ``groups[i]``; ``near[i]``: the bits of group ``i`` and its neighbours."""

    name: str
    tones: dict[str, int]
    rhymes: dict[str, int]
    groups: tuple[str, ...]
    near: tuple[int, ...]
    #: character -> the names of its oblique groups
    oblique: dict[str, tuple[str, ...]]

    def names(self, bits: int) -> list[str]:
        """The groups in ``bits``."""
        return [name for i, name in enumerate(self.groups) if bits >> i & 1]


@cache
def book(name: str) -> Book:
    """The rhyme book called ``name``. Raises ``KeyError`` for one that is none of :data:`BOOKS`."""
    text = (Path(__file__).parent / "data" / f"{name}.txt").read_text(encoding="utf-8")
    rows = [line.split(" ") for line in text.splitlines() if not line.startswith("#")]
    groups = tuple(group for group, _ in rows if _is_level(group))
    tones: dict[str, int] = {}
    rhymes: dict[str, int] = {}
    oblique: dict[str, tuple[str, ...]] = {}
    for group, characters in rows:
        level = _is_level(group)
        bit = 1 << groups.index(group) if level else 0
        for character in characters:
            tones[character] = tones.get(character, 0) | (LEVEL if level else OBLIQUE)
            if level:
                rhymes[character] = rhymes.get(character, 0) | bit
            else:
                oblique[character] = (*oblique.get(character, ()), group)
    near = [1 << i for i in range(len(groups))]
    for neighbours in _NEIGHBOURS[name]:
        members = [groups.index(group) for group in neighbours.split()]
        for i in members:
            for j in members:
                near[i] |= 1 << j
    return Book(name, tones, rhymes, groups, tuple(near), oblique)


@cache
def plain_forms() -> dict[int, int]:
    """For ``str.translate``: each character to its plain form, simplified and without variants, so that one
    that is written in two ways is known to be one."""
    text = (Path(__file__).parent / "data" / "plain.txt").read_text(encoding="utf-8")
    rows = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    return str.maketrans(rows["from"], rows["to"])


def _is_level(group: str) -> bool:
    """``上平一東`` and ``一麻平`` are level groups, ``上聲一董`` and ``一麻仄`` are not."""
    return group[1:2] == "平" or group.endswith("平")
