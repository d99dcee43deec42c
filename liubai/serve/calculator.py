"""An exact calculator that reads questions in English and Chinese, and refuses what is not plainly one.

    calculate("what is 123456789 * 987654321")   -> answer "121932631112635269"
    calculate("3.11 和 3.8 哪个大")                -> answer "3.8"
    calculate("Tom has 3 apples and buys 4")     -> None

Every word of a question has to be one that stands here, and the words have to make one of the :data:`SHAPES`;
so a word problem, a version, a date, a telephone number is never half-read. Two decimals with nothing but
"or" between them are taken for a comparison. Bounded for any text: its length, and what
:mod:`liubai.serve.exact` computes. Deliberately missing: units, money, clocks, implied multiplication, two
questions at once, anything that is only rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from liubai.serve import exact
from liubai.serve.exact import Refused, Result, Token, about, plain
from liubai.serve.wording import spelled, tokens_of

MAX_LENGTH = 4000  #: characters of a question
HAN = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Calculation:
    """``understood`` is the question in one spelling, ``answer`` what is asked for and nothing else, ``text``
    a line for a reader. ``value`` is ``None`` where the answer is a word (yes, equal)."""

    understood: str
    answer: str
    text: str
    steps: tuple[str, ...]
    value: Fraction | None


def calculate(question: str, *, asked: bool = False) -> Calculation | None:
    """``None`` for what is not plainly arithmetic or out of bounds. Never raises for any text."""
    try:
        return understand(question, asked=asked)
    except Refused:
        return None


def understand(question: str, *, asked: bool = False) -> Calculation:
    """As :func:`calculate`; raises :class:`Refused`, which says why. ``asked``: the text is known to be for a
    calculator, so that ``12/25`` is no date and ``555-1234`` no telephone number."""
    if len(question) > MAX_LENGTH:
        raise Refused(f"longer than {MAX_LENGTH} characters")
    text = spelled(question)
    tokens = tokens_of(text)
    language = "zh" if HAN.search(question) else "en"
    kinds = [token.kind for token in tokens]
    curious = bool({"?", "I", "Y"} & set(kinds))
    framed = "Z" in kinds
    if not asked and not any(t.kind in "=ABUVSPDC" or (t.kind == "Z" and t.text != "weak") for t in tokens):
        _doubt(text, framed)
    if re.search(r"[-+*/^×÷−].*\d!$", text) and "!" not in text[:-1]:
        raise Refused("the exclamation mark at the end may be a factorial or not")
    tokens = _trimmed([token for token in tokens if token.kind not in "?Y"])
    outline, runs = _outline(tokens)
    for pattern, shape in SHAPES:
        match = pattern.fullmatch(outline)
        if match is not None:
            return _ANSWERS[shape](runs, tokens, outline, language, curious)
    raise Refused("the words make no calculation")


def _trimmed(tokens: list[Token]) -> list[Token]:
    """Without what asks, and the signs around that."""
    first, last = 0, len(tokens)
    while first < last and tokens[first].kind in "Z,:.;":
        first += 1
    while first < last and tokens[last - 1].kind in "Z,:.;":
        last -= 1
    kept = tokens[first:last]
    # 3.8 和 3.11 相比, 请问哪个大: politeness may stand behind a comma
    return [
        token
        for i, token in enumerate(kept)
        if token.kind != "Z" or not (kept[i + 1].kind in "WZGK" or kept[i - 1].kind == "W")
    ]


#: What is seldom meant as arithmetic.
_NAMES = re.compile(r"24/7|50/50|20/20|80/20|7[-/]11|9[-/]11")
_LOOKS_LIKE = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d{2})", "a date"),
        (r"(?:[1-9]|1[0-2])/(?:[12]\d|3[01])", "a date"),
        (r"\+?(?=(?:-*+\d){7})\d++(?:-\d++){2,}+|\d{3}-\d{4}|\(\d+\) ?\d+(?:-\d+)?", "a telephone number"),
        (_NAMES.pattern, "a name"),
    )
)


def _doubt(text: str, framed: bool) -> None:
    """What nobody has asked to compute may be something else than it looks: also behind "what is"."""
    bare = re.sub(r"^what(?: is|'s|s| are)? ", "", text.rstrip("?!. "))
    for pattern, what in _LOOKS_LIKE:
        if pattern.fullmatch(bare):
            raise Refused(f"'{bare[:30]}' may be {what}: end it with '=' if it is a calculation")
    span = re.fullmatch(r"(\d{1,9})-(\d{1,9})", bare)
    if span is not None and not framed and int(span[1]) < int(span[2]):
        raise Refused(f"'{bare[:30]}' may be a range: end it with '=' if it is a calculation")


# ---- shapes ----

_LIST = r"x(?:(?:,?[&v]|,)x)+"
_COMPARED = rf"W?,?G[,:K]*{_LIST}|[IKW]{_LIST},?I?G|{_LIST},?[CT]?,?[WI]*W,?T?G|K?{_LIST},?HW?|xGvxG"
#: Of a question's outline, in which ``x`` stands for an expression; tried in order.
SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), shape)
    for pattern, shape in (
        (r"x[=EI]?", "value"),
        (_COMPARED, "extreme"),
        (rf"C[,:]?{_LIST}|{_LIST},?C|xvx", "order"),
        (r"I?x[R=]x|Ix,?GTx|xIGTx|xTxG|I?xEx|I?x&xE", "relation"),
        (rf"S{_LIST}|A{_LIST}|Axtx|{_LIST}s", "sum"),
        (rf"P{_LIST}|Ux(?:[y&])x|{_LIST}p", "product"),
        (r"Dx&x", "difference"),
        (r"BxFx", "less"),
        (r"Vxyx", "quotient"),
    )
)


def _outline(tokens: Sequence[Token]) -> tuple[str, list[list[Token]]]:
    """Every run of what an expression is made of becomes an ``x``; commas in brackets belong to it."""
    outline, runs, depth = "", list[list[Token]](), 0
    for token in tokens:
        inside = token.kind in "n+-*/^m()!%qQrfod" or (depth > 0 and token.kind in ",;")
        depth += (token.kind == "(") - (token.kind == ")")
        if inside and outline.endswith("x"):
            runs[-1].append(token)
        elif inside:
            outline += "x"
            runs.append([token])
        else:
            outline += token.kind
    return outline, runs


Runs = list[list[Token]]
#: (runs, tokens, outline, language, curious) -> what is answered; raises Refused
_Answer = Callable[[Runs, list[Token], str, str, bool], Calculation]


def _value(runs: Runs, tokens: list[Token], outline: str, language: str, curious: bool) -> Calculation:
    result = exact.evaluate(runs[0])
    if not result.operations:
        raise Refused("there is nothing to compute")
    return _told(result.written, result.value, result.steps)


def _told(written: str, value: Fraction, steps: tuple[str, ...]) -> Calculation:
    answer = plain(value)
    text = f"{written} = {answer}"
    if "/" in answer:
        text += f" ≈ {about(value)}"
        if written == answer:
            text = f"{answer} ≈ {about(value)}"
    elif value.denominator > 1 and "/" in written and "." not in written and len(answer) <= 20:
        text = f"{written} = {value.numerator}/{value.denominator} = {answer}"
        text = text.replace(f"{written} = {written} =", f"{written} =")
    return Calculation(written, answer, text, steps, value)


def _computed(runs: Runs) -> list[Result]:
    return [exact.evaluate(run) for run in runs]


def _chain(results: Sequence[Result]) -> str:
    """The greatest first: ``3.8 > 3.11``, ``2^10 = 1024 > 1000``."""
    if len({result.value for result in results}) == 1:
        return " = ".join(result.written for result in results)
    ordered = sorted(results, key=lambda result: result.value, reverse=True)
    said = [r.written if not r.operations else f"{r.written} = {plain(r.value)}" for r in ordered]
    signs = ["=" if a.value == b.value else ">" for a, b in pairwise(ordered)] + [""]
    return " ".join(f"{text} {sign}" for text, sign in zip(said, signs, strict=True)).strip()


def _aligned(results: Sequence[Result]) -> tuple[str, ...]:
    """Decimals with as many places each: ``3.8 = 3.80``."""
    behind = [
        len(r.written.partition(".")[2]) if r.written.replace(".", "").isdigit() else None for r in results
    ]
    most = max((n or 0 for n in behind), default=0)
    if None in behind or len(set(behind)) == 1 or most > exact.DECIMAL_PLACES:
        return ()
    padded = [
        f"{r.written} = {r.written}{'' if n else '.'}{'0' * (most - (n or 0))}"
        for r, n in zip(results, behind, strict=True)
        if n != most
    ]
    return tuple(padded)


_WORDS_FOR = {
    "en": {">": "is greater", "<": "is less", ">>": "is the greatest", "<<": "is the least", "=": "equal",
           "yes": "yes", "no": "no"},
    "zh": {">": "更大", "<": "更小", ">>": "最大", "<<": "最小", "=": "相等", "yes": "是", "no": "不是"},
}  # fmt: skip


def _extreme(runs: Runs, tokens: list[Token], outline: str, language: str, curious: bool) -> Calculation:
    wanted = {token.text for token in tokens if token.kind in "GH"}
    if len(wanted) != 1:
        raise Refused("it asks for the greater and for the less")
    return _best(_computed(runs), wanted.pop(), language)


def _best(results: list[Result], wanted: str, language: str) -> Calculation:
    words = _WORDS_FOR[language]
    steps = (*_aligned(results), _chain(results))
    understood = f"{'max' if wanted == '>' else 'min'}({', '.join(r.written for r in results)})"
    values = [r.value for r in results]
    if len(set(values)) == 1:
        return Calculation(understood, words["="], f"{words['=']}: {_chain(results)}", steps, None)
    best = (max if wanted == ">" else min)(results, key=lambda result: result.value)
    verdict = words[wanted * (2 if len(results) > 2 else 1)]
    gap = "" if language == "zh" else " "
    text = f"{best.written}{gap}{verdict}: {_chain(results)}"
    return Calculation(understood, best.written, text, steps, best.value)


def _order(runs: Runs, tokens: list[Token], outline: str, language: str, curious: bool) -> Calculation:
    if outline == "xvx" and any(len(run) > 2 for run in runs):
        raise Refused("it does not say what to do with the two")
    return _best(_computed(runs), ">", language)


def _relation(runs: Runs, tokens: list[Token], outline: str, language: str, curious: bool) -> Calculation:
    if not curious:
        raise Refused("it is a statement and no question")
    a, b = _computed(runs)
    sign = next((token.text for token in tokens if token.kind in "RG="), "=")
    sign = "=" if "E" in outline else sign
    holds = {
        ">": a.value > b.value, "<": a.value < b.value, "=": a.value == b.value,
        ">=": a.value >= b.value, "<=": a.value <= b.value, "!=": a.value != b.value,
    }[sign]  # fmt: skip
    answer = _WORDS_FOR[language]["yes" if holds else "no"]
    chain = _chain([a, b])
    if sign == "=" and not holds and a.operations and not b.operations:
        chain = f"{a.written} = {plain(a.value)}"
    steps = (*a.steps, *b.steps, *_aligned([a, b]), chain)
    return Calculation(f"{a.written} {sign} {b.written}", answer, f"{answer}: {chain}", steps, None)


def _folded(sign: str, turned: bool = False) -> _Answer:
    """The runs with an operator between them, each in brackets where it is more than a number."""

    def answer(runs: Runs, tokens: list[Token], outline: str, language: str, curious: bool) -> Calculation:
        together: list[Token] = []
        for run in reversed(runs) if turned else runs:
            if together:
                together.append(Token(sign, sign))
            together += run if len(run) == 1 else [Token("(", "("), *run, Token(")", ")")]
        if tokens[-1].kind in "qQ":  # of the last number, or of the whole list
            raise Refused("it is not plain what belongs together")
        result = exact.evaluate(together)
        return _told(result.written, result.value, result.steps)

    return answer


def _difference(runs: Runs, tokens: list[Token], outline: str, language: str, curious: bool) -> Calculation:
    a, b = _computed(runs)
    if a.value < b.value:
        raise Refused("a difference is of the greater and the less, in this order")
    return _folded("-")(runs, tokens, outline, language, curious)


_ANSWERS: dict[str, _Answer] = {
    "value": _value,
    "extreme": _extreme,
    "order": _order,
    "relation": _relation,
    "sum": _folded("+"),
    "product": _folded("*"),
    "difference": _difference,
    "less": _folded("-", turned=True),
    "quotient": _folded("/"),
}
