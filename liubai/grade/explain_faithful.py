"""What the verifier ``faithful`` found, in English and Chinese, for ``liubai grade --explain``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liubai.grade.faithful import SHORTER, judge, word_count

_KINDS = {
    "number": ("a number", "数目"), "date": ("a date", "日期"), "name": ("a name", "名称"),
    "relation": ("a value with the wrong thing", "数值与事物不符"), "count": ("a count", "个数"),
    "negation": ("denied", "误作否定"), "affirmed": ("affirmed", "误作肯定"),
    "limit": ("limited", "误加限定"), "opposite": ("the contrary", "相反"), "word": ("words", "用词"),
}  # fmt: skip


def faithful_words(gold: str, answer: str, meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the summary ``answer`` says and the passage ``gold`` does not, how much of the passage it has, and
    whether it is too long for a summary."""
    found = judge(gold, answer)
    said = [("says nothing that the passage does not", "所言皆见于原文")]
    if found.findings:
        kinds = [(*_KINDS.get(f.kind, (f.kind, f.kind)), f.text) for f in found.findings]
        said = [
            (
                f"not in the passage: {'; '.join(f'{english}: {text}' for english, _, text in kinds)}",
                f"原文所无：{'；'.join(f'{chinese}：{text}' for _, chinese, text in kinds)}",
            )
        ]
    elif not found.score:
        said = [("says nothing that could be checked", "没有可核对的内容")]
    covers = meta.get("covers", 0)
    asked = (f", and {covers:.0%} is asked", f"，应有 {covers:.0%}") if covers else ("", "")
    said.append(
        (f"has {found.told:.0%} of the passage{asked[0]}", f"述及原文内容的 {found.told:.0%}{asked[1]}")
    )
    words, most = word_count(answer), meta.get("words", 0) or SHORTER * word_count(gold)
    if words > most:
        said.append(
            (
                f"{words} words are too many for a summary: {most:.0f} at most",
                f"过长：{words} 词，至多 {most:.0f} 词",
            )
        )
    return said
