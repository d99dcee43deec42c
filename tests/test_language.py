"""Words are told apart by script; what is the same in every language counts for neither."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.grade.language import LANGUAGES, Words, consistency, prose, words
from liubai.problems.lexicon import CHINESE

ENGLISH_WORDS = ["wait", "total", "Wait", "WAIT", "we'll", "is", "naïve", "plus", "Résumé", "don’t"]
CHINESE_WORDS = ["等等", "试", "求和", "一样", "亡羊补牢", "重新", "检查"]
OTHER_WORDS = ["значит", "ответ", "그래서", "しかし", "αβγ"]
NEUTRAL = (
    *("3", "3.11", "=", "+", "->35", "=7", ":0", "?", "。", "，", "x", "n", "a", "I", "AB", "LHS", "%", "_"),
    *("=big", ":far", "½", "②", "∑", "θ", "²³", "🙂", "<think>", "</think>", "<answer>", "</answer>"),
    *(r"\frac", r"\boxed{12}", r"\{", "$x$", "$1 < max$", r"$\text{so} = \$5$", "$$\nthen\n$$", "$$ 等 $$"),
    *(r"\(so on\)", r"\(\text{等等}\)", r"\[ a \\ then \]", "`left_index`", "```python\nfor i in it:\n```"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", (0, 0, 0)),
        ("wait check", (2, 0, 0)),
        ("等等 检查", (0, 2, 0)),
        ("3 plus 7 is 0", (2, 0, 0)),
        ("3 加 7 得 0", (0, 2, 0)),
        ("等等wait不对", (1, 2, 0)),  # the one does not glue itself to the other
        ("得3再加4", (0, 2, 0)),
        ("well-known", (2, 0, 0)),
        ("we'll see, won't we?", (4, 0, 0)),
        ("'wait'", (1, 0, 0)),
        ("让我再检查一遍这个结果", (0, 6, 0)),  # 11 characters
        ("让我再检查一遍，这个结果", (0, 5, 0)),  # 7 and 4
        ("亡羊补牢", (0, 1, 0)),
        ("亡羊补牢也", (0, 3, 0)),
        ("人人々々", (0, 1, 0)),
        ("𠀀𠀁", (0, 1, 0)),  # beyond sixteen bits
        ("设 x 为 AB 的长", (0, 3, 0)),
        ("ABCD", (1, 0, 0)),
        ("Ｗａｉｔ", (1, 0, 0)),
        ("Значит, x равно 5", (0, 0, 2)),
        ("try 3 + 4 =big :far 等等", (1, 1, 0)),
        (r"so \frac{1}{2} of $\frac{wait}{等等}$", (2, 0, 0)),
        ("it costs $5 and then $6", (4, 0, 0)),
        ("either $5/$6 or ($7, $8) then", (3, 0, 0)),
        ("$5/each/$6 then", (2, 0, 0)),
        ("$5 and then $ more", (3, 0, 0)),
        ("a $ sign and a cents$ sign", (4, 0, 0)),
        (r"pay \$5 for it and \$6", (4, 0, 0)),
        (r"\$5 or x$ then", (2, 0, 0)),
        (r"so \等", (1, 1, 0)),
        ("a price of $5 and nothing\nelse, $ or so", (7, 0, 0)),  # not over the end of a line
        (r"\(never closed, 等等", (2, 1, 0)),
        ("``` never closed", (2, 0, 0)),
        ("`never\nclosed`", (2, 0, 0)),
        ("so ```\nthen\n``` it is", (3, 0, 0)),
        ("<think>hello</think><answer>bye</answer>", (2, 0, 0)),
        ("<hello>", (1, 0, 0)),  # no tag of ours: nothing hides in brackets
    ],
)
def test_worked_examples(text: str, wanted: tuple[int, int, int]) -> None:
    assert words(text) == Words(*wanted)


@pytest.mark.parametrize("piece", NEUTRAL)
def test_what_belongs_to_no_language(piece: str) -> None:
    assert words(piece) == (0, 0, 0)
    assert words(f"so {piece} 得") == (1, 1, 0)


def test_a_word_of_the_wide_world_is_one_in_both_languages() -> None:
    for english, chinese in CHINESE.items():
        assert words(english) == (int(len(english) > 1), 0, 0)  # a letter is a name in both
        assert words(chinese) == (0, 1, 0)


@pytest.mark.parametrize(
    ("text", "en", "zh"),
    [
        ("3 plus 7 is 0", 1.0, 0.0),
        ("3 加 7 得 0", 0.0, 1.0),
        ("3 plus 7 得 0 等等 检查", 0.25, 0.75),
        ("wait, не 对", 1 / 3, 1 / 3),  # the third is of neither
        ("3 + 7 = 10", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_consistency_is_the_share_of_words(text: str, en: float, zh: float) -> None:
    assert consistency(text, "en") == pytest.approx(en)
    assert consistency(text, "zh") == pytest.approx(zh)


def test_nothing_said_is_worth_what_the_caller_says() -> None:
    for text in ("", "  \n", "3 + 4 = 7", "$wait$"):
        assert consistency(text, "en") == 0.0
        assert consistency(text, "en", empty=1.0) == 1.0
    assert consistency("等等", "en", empty=1.0) == 0.0


@pytest.mark.parametrize("language", ["fr", "", "EN", "zh-CN"])
def test_other_languages_are_refused(language: str) -> None:
    with pytest.raises(ValueError, match="en and zh"):
        consistency("bonjour", language)


PIECES = [(p, (1, 0, 0)) for p in ENGLISH_WORDS]
PIECES += [(p, (0, 1, 0)) for p in CHINESE_WORDS]
PIECES += [(p, (0, 0, 1)) for p in OTHER_WORDS]
PIECES += [(p, (0, 0, 0)) for p in NEUTRAL]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_a_text_has_the_words_of_its_pieces(pieces: list[tuple[str, tuple[int, int, int]]]) -> None:
    text = " ".join(piece for piece, _ in pieces)
    assert words(text) == tuple(sum(counts[i] for _, counts in pieces) for i in range(3))


@settings(deadline=None)
@given(st.lists(st.sampled_from(ENGLISH_WORDS + CHINESE_WORDS), max_size=12), st.data())
def test_digits_and_operators_between_words_change_nothing(said: list[str], data: st.DataObject) -> None:
    signs = st.text("0123456789+-*/=<>().,:;%^ ", max_size=8).map(lambda text: f"{text} ")
    mixed = " ".join(f"{data.draw(signs)}{word}" for word in said)
    for language in LANGUAGES:
        assert consistency(mixed, language) == consistency(" ".join(said), language)


ANY = st.one_of(
    st.text(),
    st.text("ab $\\()[]`'’等检\n<>x3", max_size=60),
    st.lists(st.sampled_from([*(piece for piece, _ in PIECES), "$", "`", "\\", "\\(", "\n"])).map("".join),
)


@settings(deadline=None, max_examples=300)
@given(ANY)
def test_shares_of_any_text(text: str) -> None:
    counted = words(text)
    assert min(counted) >= 0
    en, zh = (consistency(text, language) for language in LANGUAGES)
    assert 0 <= min(en, zh) <= max(en, zh) <= 1
    if any(counted):
        assert en + zh + counted.other / sum(counted) == pytest.approx(1)
    else:
        assert en == zh == 0
    assert sum(counted) <= len(text)


@settings(deadline=None)
@given(ANY)
def test_prose_only_takes_away(text: str) -> None:
    rest = iter(text)
    assert all(sign in rest for sign in prose(text).replace(" ", ""))  # in order


STRANGE = (
    *("a", "等", "ж", "ª", "½", "'", "a'", "$", "$$", "$a ", "$a\n", "`", "```", "```a\n", "`a\n", "\\"),
    *("\\(", "\\[", "\\(\\[", "\\)", "\\a", "\\$", "$\\", "<think>", "<", "=a", ":", "\u0301", "\U0001f642"),
    *(" ", "\n", "A", "AB ", "\ud800", "\x00"),
)  # fmt: skip


@pytest.mark.parametrize("piece", STRANGE)
@pytest.mark.parametrize("end", ["", "等$a`\\)"])
def test_a_hundred_thousand_of_anything(piece: str, end: str) -> None:
    """Were a pattern quadratic, this would take minutes."""
    assert min(words(piece * (100_000 // len(piece)) + end)) >= 0
