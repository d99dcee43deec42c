"""The calculator against Python's fractions, in many spellings; and what it must not read."""

import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.grade.verifiers import number
from liubai.serve import exact, numerals
from liubai.serve.calculator import MAX_LENGTH, Calculation, calculate, understand
from liubai.serve.exact import MAX_BITS, MAX_DIGITS, Refused, about, plain
from liubai.serve.wording import PHRASES


def value(question: str) -> Fraction:
    found = calculate(question)
    assert found is not None, question
    assert found.value is not None
    return found.value


# --- against an oracle -------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(0, 10**30).map(str),
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(lambda p: f"{p[0]}.{p[1]}"),
)
flat = st.lists(st.tuples(st.sampled_from("+-*/"), numbers), min_size=1, max_size=6)


def by_hand(first: str, rest: list[tuple[str, str]]) -> Fraction | None:
    """Products first, then sums, left to right; ``None`` where something is divided by 0."""
    terms = [Fraction(first)]
    for sign, text in rest:
        if sign == "*":
            terms[-1] *= Fraction(text)
        elif sign == "/":
            if Fraction(text) == 0:
                return None
            terms[-1] /= Fraction(text)
        else:
            terms.append(Fraction(text) if sign == "+" else -Fraction(text))
    return sum(terms, Fraction(0))


#: digits of full width
WIDE = {48 + i: 0xFF10 + i for i in range(10)}
SPELLINGS = [
    ({"+": "+", "-": "-", "*": "*", "/": "/"}, "{} =", str),
    ({"+": " + ", "-": " − ", "*": " × ", "/": " ÷ "}, "what is {}?", str),
    ({"+": " plus ", "-": " minus ", "*": " times ", "/": " divided by "}, "How much is {}?", str),
    ({"+": "加", "-": "减", "*": "乘以", "/": "除以"}, "请问{}等于多少？", str),
    ({"+": "＋", "-": "－", "*": "×", "/": "／"}, "计算：{}", lambda t: t.translate(WIDE)),
    ({"+": "+", "-": "-", "*": "*", "/": "/"}, "compute {}", lambda t: f"{int(t):,}" if t.isdigit() else t),
]  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(numbers, flat, st.sampled_from(SPELLINGS))
def test_sums_and_products_in_every_spelling(
    first: str, rest: list[tuple[str, str]], spelling: tuple
) -> None:
    signs, frame, spelled = spelling
    expression = spelled(first) + "".join(f"{signs[sign]}{spelled(text)}" for sign, text in rest)
    found = calculate(frame.format(expression))
    right = by_hand(first, rest)
    assert (found.value if found else None) == right
    if found is not None:
        assert found.answer == plain(right)
        assert Fraction(found.answer) == right


trees = st.recursive(
    st.integers(0, 999).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(st.sampled_from("+-*"), inner, inner).map(
        lambda t: (
            f"({t[1][0]} {t[0]} {t[2][0]})",
            {"+": t[1][1] + t[2][1], "-": t[1][1] - t[2][1], "*": t[1][1] * t[2][1]}[t[0]],
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(trees)
def test_brackets(tree: tuple[str, Fraction]) -> None:
    text, right = tree
    assert value(f"0 + {text}") == right
    assert value(f"-{text} + 1") == 1 - right


@settings(deadline=None)
@given(st.integers(-12, 12), st.integers(-30, 30), st.integers(1, 9))
def test_powers(base: int, power: int, down: int) -> None:
    found = calculate(f"({base}/{down})^{power} =" if power >= 0 else f"({base}/{down})^({power}) =")
    if base == 0 and power <= 0:
        assert found is None
    else:
        assert found is not None
        assert found.value == Fraction(base, down) ** power


@settings(deadline=None)
@given(st.integers(0, 10**40), st.integers(1, 10**20), st.sampled_from([2, 3]))
def test_roots_are_exact_or_refused(up: int, down: int, index: int) -> None:
    name = "√" if index == 2 else "∛"
    assert value(f"{name}({up**index}/{down**index})") == Fraction(up, down)
    found = calculate(f"{name}{up}")
    root = (
        next(r for r in range(round(up ** (1 / index)) + 2, -1, -1) if r**index <= up) if up < 10**6 else None
    )
    if root is not None:
        assert (found is not None) == (root**index == up)
    if found is not None:
        assert found.value**index == up


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=5), st.booleans())
def test_comparisons(texts: list[str], greater: bool) -> None:
    values = [Fraction(text) for text in texts]
    best = max(values) if greater else min(values)
    word, han = ("largest", "大") if greater else ("smallest", "小")
    questions = [
        f"Which is the {word}: {', '.join(texts[:-1])} or {texts[-1]}?",
        f"what is the {word} of {', '.join(texts[:-1])} and {texts[-1]}",
        f"{'、'.join(texts)}中最{han}的是哪个？",
    ]
    if len(texts) == 2:
        comparative = "bigger" if greater else "less"
        questions += [
            f"which is {comparative}, {texts[0]} or {texts[1]}?",
            f"{texts[0]} and {texts[1]}, which one is {comparative}?",
            f"{texts[0]} 和 {texts[1]} 哪个{han}",
            f"{texts[0]}{han}还是{texts[1]}{han}",
        ]
    for question in questions:
        found = calculate(question)
        assert found is not None, question
        if len(set(values)) == 1:
            assert found.answer in ("equal", "相等")
        else:
            assert found.value == best
            assert found.answer in texts  # as it was written
    a, b = values[:2]
    for question, holds in [
        (f"is {texts[0]} greater than {texts[1]}?", a > b),
        (f"is {texts[0]} less than {texts[1]}?", a < b),
        (f"{texts[0]} <= {texts[1]}?", a <= b),
        (f"is {texts[0]} equal to {texts[1]}?", a == b),
        (f"{texts[0]}比{texts[1]}大吗", a > b),
        (f"{texts[0]}小于{texts[1]}吗", a < b),
        (f"{texts[0]}等于{texts[1]}吗？", a == b),
    ]:
        found = calculate(question)
        assert found is not None, question
        assert found.answer in (("yes", "是") if holds else ("no", "不是")), question


def han(n: int) -> str:
    """``n`` below 10⁸ as it is written in Chinese, another way round than it is read."""
    if n >= 10**4:
        high, low = divmod(n, 10**4)
        return han(high) + "万" + (("零" if low < 1000 else "") + han(low) if low else "")
    digits = "零一二三四五六七八九"
    said, gap = "", False
    for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = n // place % 10
        if digit:
            said += ("零" if gap and said else "") + digits[digit] + name
        gap = digit == 0
    return said or "零"


SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
SMALL_WORDS = f"{SMALL} seventeen eighteen nineteen".split()
TEN_WORDS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def english(n: int) -> str:
    for scale, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= scale:
            rest = f" {english(n % scale)}" if n % scale else ""
            return f"{english(n // scale)} {name}{' and' if rest and scale == 100 else ''}{rest}"
    if n < 20:
        return SMALL_WORDS[n]
    return TEN_WORDS[n // 10 - 2] + (f"-{SMALL_WORDS[n % 10]}" if n % 10 else "")


@settings(deadline=None)
@given(st.integers(0, 10**8 - 1), st.integers(0, 10**12 - 1))
def test_numbers_in_words(a: int, b: int) -> None:
    assert numerals.chinese(han(a)) == a
    assert numerals.english(english(b)) == b
    assert value(f"{han(a)}加一等于几") == a + 1
    assert value(f"what is {english(b)} times two?") == 2 * b


@pytest.mark.parametrize("text", ["百", "三四", "二〇二四", "一百五", "三万五", "零一", "一万万", "十百"])
def test_what_is_no_number_in_chinese(text: str) -> None:
    assert numerals.chinese(text) is None


@pytest.mark.parametrize(
    "text", ["twenty twenty", "one hundred and two hundred", "five twenty", "one thousand million"]
)
def test_what_is_no_number_in_english(text: str) -> None:
    assert numerals.english(text) is None
    assert calculate(f"{text} plus 1") is None


# --- what people ask -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what is 123456789 * 987654321", "121932631112635269"),
        ("123456789乘以987654321", "121932631112635269"),
        ("2^100", "1267650600228229401496703205376"),
        ("2的100次方等于多少", "1267650600228229401496703205376"),
        ("2 to the 10th power", "1024"),
        ("3.11 和 3.8 哪个大", "3.8"),
        ("3.11 or 3.8", "3.8"),
        ("3 . 11 or 3 . 8", "3.8"),
        ("3.11 还是 3.8", "3.8"),
        ("9.9 与 9.11 相比，谁更大？", "9.9"),
        ("比较大小：9.9和9.11", "9.9"),
        ("is 3.11 bigger than 3.8?", "no"),
        ("3.11比3.8大吗？", "不是"),
        ("3.80 or 3.8", "equal"),
        ("2^10 or 1000, which is bigger", "2^10"),
        ("17% of 250", "42.5"),
        ("250的17%是多少", "42.5"),
        ("百分之十七乘以250", "42.5"),
        ("25% of 50% of 80", "10"),
        ("10% + 5%", "0.15"),
        ("1/3 + 1/6", "0.5"),
        ("三分之一加六分之一", "0.5"),
        ("what is 1/7", "1/7"),
        ("a third of 12", "4"),
        ("1/3 of 12", "4"),
        ("half of 390", "195"),
        ("3 squared plus 4 squared", "25"),
        ("3的平方加4的平方", "25"),
        ("3²+4²", "25"),
        ("-3^2", "-9"),
        ("2^3^2 =", "512"),
        ("2^-3", "0.125"),
        ("27^(2/3) =", "9"),
        ("square root of 144", "12"),
        ("sqrt(2.25)", "1.5"),
        ("8的立方根", "2"),
        ("5!", "120"),
        ("5的阶乘", "120"),
        ("factorial(5)", "120"),
        ("factorial of 5", "120"),
        ("17 mod 5", "2"),
        ("gcd(12,18)", "6"),
        ("lcm(4, 6)", "12"),
        ("max(3, 5, 9)", "9"),
        ("the sum of 3, 7 and 2", "12"),
        ("3与4的和", "7"),
        ("the product of 6 and 7", "42"),
        ("add 3 to 4", "7"),
        ("subtract 3 from 10", "7"),
        ("multiply 3 by 4", "12"),
        ("divide 12 by 5", "2.4"),
        ("difference between 8 and 3", "5"),
        ("what does 2+2 equal?", "4"),
        ("Can you tell me what 3 + 4 is", "7"),
        ("hello, please calculate 12 × (3 − 1) ÷ 4.", "6"),
        ("3 x 4", "12"),
        ("1e3 + 1", "1001"),
        ("3.5万加2000", "37000"),
        ("2.5 million plus 1", "2500001"),
        ("2+2=5?", "no"),
        ("12/25 =", "0.48"),
        ("10-3-2", "5"),
        ("what is 3-5?", "-2"),
        ("what is 100 - 20 - 3?", "77"),
        ("1000000 - 1 - 1", "999998"),
        ("0.1 + 0.2", "0.3"),
    ],
)
def test_answers(question: str, answer: str) -> None:
    found = understand(question)
    assert found.answer == answer
    if found.value is not None:
        assert number(str(found.value), found.answer, {}) or found.answer == "2^10"


def test_what_a_reader_sees() -> None:
    found = understand("what is (3 + 4) * 5?")
    assert found == Calculation(
        "(3 + 4) × 5", "35", "(3 + 4) × 5 = 35", ("3 + 4 = 7", "7 × 5 = 35"), Fraction(35)
    )
    assert understand("10/3").text == "10/3 ≈ 3.333333333"
    assert understand("1/3 + 1/6").text == "1/3 + 1/6 = 1/2 = 0.5"
    compared = understand("3.11 and 3.8, which is greater?")
    assert compared.text == "3.8 is greater: 3.8 > 3.11"
    assert compared.steps == ("3.8 = 3.80", "3.8 > 3.11")
    assert understand("3.11 和 3.8 哪个小").text.startswith("3.11更小")


REFUSED = [
    "Tom has 3 apples and 4 pears", "Tom has 3 apples and buys 4 more. How many?",
    "小明有3个苹果，又买了4个，一共几个？",
    "version 3.11 or 3.8, which is newer?", "python 3.11 or 3.8?", "3.11和3.8版本哪个新", "v3.11 > v3.8?",
    "2024-01-15", "2024-1-15", "15/1/2024", "12/25", "what is 9/11?", "what is 24/7?", "2019-2024", "3-5",
    "555-1234", "555-123-4567", "+1 555 123 4567", "138-0013-8000", "(555) 123-4567", "978-3-16-148410-0",
    "192.168.1.1", "10.0.0.1/24", "12:30", "007 + 1", "0x10", "1.2.3 + 4", "3,5 or 3,8",
    "7", "what is 7", "50%", "", " ", "?", "大", "哪个大", "what is", "3 5", "3 and 4", "2(3+4)", "1 1/2 + 2",
    "100 + 10%", "the square root of 9 + 16", "9加16的平方根", "sum of 3 and 4 squared", "5!!", "2+2!",
    "2²³", "2¹⁰",
    "50% of", "17 of 20", "250的17",
    "1/0", "0^0", "sqrt(2)", "√-4", "(-8)^(1/3)", "2^0.5", "5.5!", "17 mod 0", "2.5 mod 2", "2+2=5",
    "total a 3 b 7 c 2", "求和 甲 3 乙 7", "make 1 4 3 ->7", "solve 3 * x + 4 = 19", "解 3 * x + 4 = 19",
    "anna has 3 red cups . ben has 5 blue hats . summarise", "please say red twice", "$5 + $3", "5 kg + 3 kg",
    "what is 3 more than 5", "what is 3 less than 5?", "which is more than 5, 3 or 8",
    "difference between 3 and 8",
    "what is 2+2? what is 3+3?", "2 + 2 and then tell me a joke", "max(1,234)", "How many r in strawberry?",
    "largest and smallest of 3 and 4", "9^9^9^9", "10^100000", "2000!", "1e9999 + 1",
]  # fmt: skip


@pytest.mark.parametrize("question", REFUSED)
def test_refused(question: str) -> None:
    assert calculate(question) is None


@pytest.mark.parametrize("text", ["12/25", "555-1234", "3-5", "2024-1-15", "2+3!"])
def test_a_call_is_no_date_and_no_telephone_number(text: str) -> None:
    assert calculate(text) is None
    assert calculate(text, asked=True) is not None or text == "2+3!"


questions = st.sampled_from(["what is 3 + 4?", "3.11 和 3.8 哪个大", "17% of 250", "5的阶乘"])
strangers = st.sampled_from(
    [
        "apples",
        "Tom",
        "version",
        "苹果",
        "岁",
        "个",
        "km",
        "$",
        "@",
        "y",
        "π",
        "i",
        "each",
        "per",
        "元",
        "版本",
        "ago",
    ]
)


@given(questions, strangers, st.integers(0, 30))
def test_one_strange_word_and_nothing_is_read(question: str, word: str, at: int) -> None:
    at = min(at, len(question))
    assert calculate(f"{question[:at]} {word} {question[at:]}") is None


# --- bounds ----------------------------------------------------------------------------------------------

WORDS = [phrase for _, _, phrases in PHRASES for phrase in phrases.split("|")]
SIGNS = [*"0123456789.,+-*/^!%()[]<>=?√²³·×÷−：，。、 x", "**", "1e9", "万", "百分之", "次方", "分之"]


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from([*WORDS, *SIGNS]), max_size=25).map(" ".join),
                 st.lists(st.sampled_from(SIGNS), max_size=40).map("".join)))  # fmt: skip
def test_no_text_raises_and_no_answer_is_out_of_bounds(text: str) -> None:
    for asked in (False, True):
        found = calculate(text, asked=asked)
        if found is not None and found.value is not None:
            assert found.answer
            assert found.value.numerator.bit_length() <= MAX_BITS


HOSTILE = [
    "9" * MAX_LENGTH, "9" * 3990 + "*9", "1." * 1900 + "1", "(" * 1000 + "1" + ")" * 1000, "√" * 3000 + "4",
    "-" * 3000 + "1", "2^" * 1900 + "2", "2^(" * 60 + "2" + ")" * 60, "!" * 3000, "5" + "!" * 3000,
    "9!" * 900,
    "1+" * 1999 + "1", "1000!*" * 190 + "1", "1/" * 190 + "7", "*".join(["99999999999"] * 190),
    "+".join(f"1/{n}" for n in range(10**9, 10**9 + 130)), "9^9^9^9^9^9", "(9^4000)^4000", "2^13000*2^13000",
    "0.1^4000", "1e1000*1e1000*1e1000*1e1000*1e1000",
    "lcm(" + ",".join(map(str, range(10**8, 10**8 + 190))) + ")",
    "1,234" * 700, "三" * 3000, "百分之" * 1000, "thousand " * 400, "one hundred and " * 250, "is " * 1300,
    "3 or " * 799 + "3", "的平方根" * 900, "1.1." * 900, "x" * 3999, "3x" * 1900 + "3", "." * 3999,
    "1 . " * 900,
    "7-" * 1999 + "7", "(" + "1-" * 1500, "+1" + " 5" * 1900, "= " * 1900, "什么" * 1900,
    "1" + " " * 3990 + "+1",
    "(10^3999-1)/(10^3998+1) mod 7", "max(" * 60 + "1" + ",2)" * 60, "12" + "(" * 3000, "\x00" * 100,
    "\ud800" * 9,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_cost_little(text: str) -> None:
    started = time.process_time()
    for asked in (False, True):
        found = calculate(text, asked=asked)
        if found is not None:
            assert len(found.answer) <= 2 * MAX_DIGITS + 3
    assert time.process_time() - started < 2  # hundreds of times what it takes; a blow-up takes for ever


def test_sizes_are_refused_before_they_are_made() -> None:
    assert value("10^3900 * 10^99") == 10**3999
    with pytest.raises(Refused, match="4000 digits"):
        understand("10^3900 * 10^101")
    with pytest.raises(Refused, match="longer than"):
        understand(" " * (MAX_LENGTH + 1))
    with pytest.raises(Refused, match="1000"):
        understand("1001!")
    assert len(understand("1000!").answer) == 2568


@settings(deadline=None)
@given(st.fractions())
def test_values_are_written_exactly(fraction: Fraction) -> None:
    assert Fraction(plain(fraction)) == fraction
    rounded = Fraction(about(fraction))
    assert abs(rounded - fraction) <= abs(fraction) * Fraction(1, 10 ** (exact.ROUNDED - 1)) / 2


def test_long_decimals_are_rounded_in_steps_only() -> None:
    numbers = random.Random(0).sample(range(10**9, 10**10), 8)
    found = understand(" * ".join(map(str, numbers)))
    product = 1
    for n in numbers:
        product *= n
    assert found.answer == str(product)
    assert found.steps[-1].split("≈")[-1].startswith(str(product)[0])
