"""The words of a calculation, in English and Chinese, as tokens for :mod:`liubai.serve.exact`.

A text of which any part is no word, number or sign of these tables is refused as a whole. Times: one regular
expression without nested repetition, tried once at every token.
"""

from __future__ import annotations

import re
from fractions import Fraction

from liubai.serve import exact, numerals
from liubai.serve.exact import Refused, Token, plain

MAX_EXPONENT = 1000  #: of ten, in a number such as 1e9


_BIGGER = "bigger|larger|greater|higher|more|biggest|largest|greatest|highest|maximum"
_SMALLER = "smaller|less|lower|fewer|smallest|least|lowest|minimum"
_AMONG = (
    "",
    " of",
    " among",
    " between",
    " in",
    " from",
    " out of",
    " number",
    " number of",
    " number among",
)
_THE = ("", " of", " one", " number", " value", " of these", " of them", " of the two", " of the following")


def _superlatives(words: str) -> str:
    found = [f"{lead}{word}{tail}" for word in words.split("|") for lead in ("", "the ") for tail in _AMONG]
    return "|".join(found)


#: (kind, text, phrases). Kinds are those of :class:`Token` and: Z asks ("weak": for whatever), W which,
#: G greater or less, T than, I is, E equal, R a relation's sign, C compare, H the greatest of a list before;
#: & and, v or; s and p sum and product of the list before it, S P D sum, product and difference of the next;
#: A U V B the imperatives, y by, t to, F from, K between, Y a question mark in words, _ nothing.
PHRASES: tuple[tuple[str, str, str], ...] = (
    ("+", "+", "plus|added to|加上|加"),
    ("-", "-", "minus|减去|减"),
    ("*", "*", "times|multiplied by|乘以|乘上|乘"),
    ("/", "/", "divided by|over|除以"),
    ("^", "^", "to the power of|to the power|raised to the power of|raised to the power|raised to"),
    ("d", "×", "的"),
    ("m", "mod", "mod|modulo"),
    ("q", "²", "squared|的平方|平方"),
    ("q", "³", "cubed|的立方|立方"),
    ("Q", "^(1/2)", "的平方根|的算术平方根"),
    ("Q", "^(1/3)", "的立方根"),
    ("r", "√", "sqrt|square root of|the square root of|square root|the square root|根号"),
    ("r", "∛", "cbrt|cube root of|the cube root of|cube root"),
    ("!", "!", "factorial|的阶乘|阶乘"), ("r", "factorial of ", "factorial of|the factorial of"),
    ("%", "%", "percent|per cent"),
    ("o", "of", "of"),
    ("f", "gcd", "gcd"), ("f", "lcm", "lcm"), ("f", "abs", "abs"), ("f", "max", "max"), ("f", "min", "min"),
    ("-", "-", "negative|负"),
    ("n", "1/2", "half|a half|one half|half a|一半"),
    ("n", "1/3", "a third|one third"), ("n", "2/3", "two thirds"),
    ("n", "1/4", "a quarter|one quarter|a fourth|one fourth"),
    ("n", "3/4", "three quarters|three fourths"), ("n", "1/10", "a tenth|one tenth"),
    ("W", "", "|".join(f"which{a}{b}" for a in _THE for b in ("", " is", " are", " is the"))),
    ("W", "", "哪个|哪一个|哪个数|哪一个数|哪个数字|哪一个数字|哪个数值|谁|哪个更|哪"),
    ("G", ">", _superlatives(_BIGGER)), ("G", ">", "max of|the max of"),
    ("G", "<", _superlatives(_SMALLER)), ("G", "<", "min of|the min of"),
    ("G", ">", "大|更大|较大|比较大|大一些|大一点|大些|最大|更大一些|更大一点|的大"),
    ("G", "<", "小|更小|较小|比较小|小一些|小一点|小些|最小|更小一些|更小一点"),
    ("H", ">", "中最大的|中最大的是|中最大的数|中最大的数是|里最大的|里最大的是|当中最大的|之中最大的"),
    ("H", ">", "中的最大值"),
    ("H", "<", "中最小的|中最小的是|中最小的数|中最小的数是|里最小的|里最小的是|当中最小的|之中最小的"),
    ("H", "<", "中的最小值"),
    ("G", ">", "最大的是|最大的数是|最大的一个是|最大值"),
    ("G", "<", "最小的是|最小的数是|最小的一个是|最小值"),
    ("T", "", "than|比"),
    ("I", "", "is|are|does|do|是不是"),
    ("E", "", "equal to|equals|equal|the same as|the same|same|相等|一样大|等不等"),
    ("R", ">", "大于|is greater than|is larger than|is bigger than"),
    ("R", "<", "小于|is less than|is smaller than"),
    ("=", "=", "等于"),
    ("C", "", "compare|比较|比较一下|比较大小|哪个大哪个小|谁大谁小|的大小关系"),
    ("&", "", "and|和|与|跟|同"),
    ("v", "", "or|versus|vs|还是|或"),
    ("s", "", "的和|之和"), ("p", "", "的积|之积|的乘积"),
    ("S", "", "sum of|the sum of"), ("P", "", "product of|the product of"),
    ("D", "", "difference between|the difference between|difference of|the difference of"),
    ("A", "", "add|add up|sum"), ("U", "", "multiply"), ("V", "", "divide"), ("B", "", "subtract"),
    ("y", "", "by"), ("t", "", "to"), ("F", "", "from"), ("K", "", "between|among|of the numbers|在"),
    ("Y", "", "吗|嘛|对吗|对不对|正确吗|true or false|right|correct"),
    ("Z", "weak", "what is|what's|whats|what are|what"),
    ("Z", "", "what does|what do you get for|what will be|what would be|how much is"),
    ("Z", "", "how much are|calculate|compute|evaluate|work out|simplify|solve|find|the value of|value of"),
    ("Z", "", "the result of|result of|the answer to|the answer of|equals what|is what|is equal to what"),
    ("Z", "", "exactly"),
    ("Z", "", "as a decimal|as a fraction|in decimal|in decimal form|as a number|the exact value of"),
    ("Z", "", "the total of"),
    ("Z", "", "请问|请|帮我|帮忙|帮我算|帮我算一下|计算|计算一下|算|算一下|算算|算算看|求|试求|口算"),
    ("Z", "", "等于多少|等于几"),
    ("Z", "", "等于什么|是多少|是几|得多少|得几|为多少|多少|结果|结果是|结果是多少|的结果|的结果是"),
    ("Z", "", "的结果是多少"),
    ("Z", "", "的值|的值是多少|的大小|一下|是|这两个数|这两个数字|两个数|数字|哪个数字|下列数|下面的数"),
    ("_", "", "please|pls|can you|could you|would you|tell me|give me|do you know|i want to know|for me"),
    ("_", "", "hello"),
    ("_", "", "hi|hey|hello there|thanks|thank you|ok|okay|now|so|the|numbers|the numbers|you|me|呢|呀"),
    ("_", "", "啊|你好|谢谢|请你"),
    ("_", "", "告诉我|那么|中|里|更|相比|相比较|比起来"),
)  # fmt: skip

#: Signs, by regular expression.
_SIGNS: tuple[tuple[str, str, str], ...] = (
    ("^", "^", r"\*\*|\^"),
    ("+", "+", r"\+"), ("-", "-", r"-"), ("*", "*", r"\*|×|\\times|\\cdot"), ("/", "/", r"/|÷|\\div"),
    ("*", "*", r"(?:(?<=[\d)!%])|(?<=[\d)!%] ))x(?= ?[\d(√.-])"),
    ("(", "(", r"[(\[]"), (")", ")", r"[)\]]"), ("!", "!", "!"), ("%", "%", "%"),
    ("r", "√", "√"), ("r", "∛", "∛"), ("q", "²", "²"), ("q", "³", "³"),
    ("R", "<=", "<=|≤|⩽"), ("R", ">=", ">=|≥|⩾"), ("R", "!=", "!=|≠"), ("R", "<", "<"), ("R", ">", ">"),
    ("=", "=", "==?"), ("?", "?", r"\?"), (",", ",", r", |、|,$"), (";", ",", ","), (":", ":", ":"),
    (".", ".", r"\.$|\.(?= |$)|。"),
)  # fmt: skip


def _phrase(phrase: str) -> str:
    """A word of letters does not begin or end inside another one."""
    return rf"(?<![a-z]){re.escape(phrase)}(?![a-z])" if phrase[0].isascii() else re.escape(phrase)


_MEANING = {phrase: (kind, text) for kind, text, all_of in PHRASES for phrase in all_of.split("|")}
_WORDS = "|".join(_phrase(phrase) for phrase in sorted(_MEANING, key=len, reverse=True))
_NUMBER = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?:e[-+]?[0-9]{1,4}(?![0-9]))?+"
)
_LEXER = re.compile(
    rf"(?P<power>(?:的 ?)?(?P<index>[0-9]+|{numerals.CHINESE}) ?次[方幂])"
    rf"|(?P<ordinal>(?:raised )?to the (?P<nth>[0-9]+)(?:st|nd|rd|th) power)"
    rf"|(?P<share>(?P<down>[0-9]+|{numerals.CHINESE}) ?分之 ?(?P<up>[0-9]+(?:\.[0-9]+)?|{numerals.CHINESE}))"
    rf"|(?P<word>{_WORDS})"
    rf"|(?P<number>(?<![0-9.])(?:{_NUMBER}))(?![0-9.]*\.[0-9])"
    rf"(?: ?(?P<scale>万|亿|(?:{'|'.join(numerals.SCALES)})\b))?"
    rf"|(?P<english>(?<![a-z]){numerals.ENGLISH})|(?P<chinese>{numerals.CHINESE})"
    + "".join(f"|(?P<s{i}>{pattern})" for i, (_, _, pattern) in enumerate(_SIGNS))
)
_LOOSE = re.compile(r"[a-z\u3400-\u9fff]")
_SPELLING = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full width
    **{code: code + 32 for code in range(ord("A"), ord("Z") + 1)},
    **{code + 0xFEE0: code + 32 for code in range(ord("A"), ord("Z") + 1)},
    **{ord(sign): "×" for sign in "·⋅∙✕✖"},
    **{ord(sign): "-" for sign in "−–﹣"},
    **{ord(sign): "/" for sign in "∕⁄"},
    0xFF0C: ", ", 0x3000: " ", 0x2019: "'", 0x22: " ", 0x201C: " ", 0x201D: " ",
}  # fmt: skip


def spelled(question: str) -> str:
    """One spelling of signs and blanks. "3 . 8" is how a tokenizer of words writes 3.8."""
    text = " ".join(question.translate(_SPELLING).replace("½", " 1/2 ").split())
    return re.sub(r"(?<=\d) \. (?=\d)", ".", text)


def tokens_of(text: str) -> list[Token]:
    found: list[Token] = []
    at = 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        match = _LEXER.match(text, at)
        if match is None or match.end() == at:
            raise Refused(f"'{text[at : at + 20]}' is no part of a calculation")
        at = match.end()
        found += [token for token in _read(match) if token.kind != "_"]
        if len(found) > 2 * exact.MAX_TOKENS:
            raise Refused("too many numbers and signs")
    return found


def _read(match: re.Match[str]) -> list[Token]:
    loose = bool(_LOOSE.search(match[0]))
    if match["word"] is not None:
        kind, text = _MEANING[match["word"]]
        if match["word"] == "factorial" and match.string.startswith("(", match.end()):
            return [Token("f", "factorial")]
        if kind == "n":
            return [Token("n", text, Fraction(text))]
        index = 0 if kind == "r" and text.startswith("fac") else 3 if "3" in text or text in ("³", "∛") else 2
        # "3 plus 4 squared" is plain in English, where the power belongs to the number before it
        loose = loose and kind in "rqQ!" and not (kind in "q!" and match["word"].isascii())
        return [Token(kind, text, Fraction(index), loose)]
    if match["power"] is not None or match["ordinal"] is not None:
        power = _plain_number(match["index"] or match["nth"])
        return [Token("^", "^"), Token("n", str(power), Fraction(power))]
    if match["share"] is not None:
        return _share(match["down"], match["up"])
    if match["number"] is not None:
        return [_number(match)]
    if match["english"] is not None or match["chinese"] is not None:
        value = numerals.english(match[0]) if match["english"] else numerals.chinese(match[0])
        if value is None:
            raise Refused(f"'{match[0][:40]}' is no number in words")
        return [Token("n", str(value), Fraction(value))]
    sign = int((match.lastgroup or "s0")[1:])
    kind, text, _ = _SIGNS[sign]
    return [Token(kind, text, Fraction(3 if text in ("³", "∛") else 2))]


def _number(match: re.Match[str]) -> Token:
    digits = match["number"].replace(",", "")
    mantissa, _, exponent = digits.partition("e")
    if len(mantissa) > exact.MAX_DIGITS or (exponent and abs(int(exponent)) > MAX_EXPONENT):
        raise Refused("a number is too long")
    if re.match(r"0[0-9]", mantissa):
        raise Refused("a number begins with 0, as those do that nobody reckons with")
    if re.match(r"[a-z]", match.string[match.end() : match.end() + 1]) and not re.match(
        r"x ?[\d(√.-]", match.string[match.end() :]
    ):
        raise Refused(f"'{match.string[match.start() : match.end() + 1][-20:]}…' is no number")
    if digits == "0" and match.string.startswith("x", match.end()):
        raise Refused("'0x' begins a number in another base")
    value = Fraction(digits)
    scale = {**numerals.SCALES, **numerals.HAN_SCALES}.get(match["scale"] or "", 1)
    if scale > 1:
        return Token("n", plain(value * scale), value * scale)
    return Token("n", digits, value, loose="," in match["number"])


def _plain_number(text: str) -> int:
    value = int(text) if text.isascii() and len(text) <= 9 else numerals.chinese(text)
    if value is None or len(text) > 9:
        raise Refused(f"'{text[:40]}' is no number in words")
    return value


def _share(down: str, up: str) -> list[Token]:
    """三分之一 is 1/3, 百分之十七 is 17%."""
    above = Fraction(up) if "." in up and len(up) < 20 else Fraction(_plain_number(up))
    if down == "百":
        return [Token("n", plain(above), above), Token("%", "%")]
    below = _plain_number(down)
    if below == 0:
        raise Refused("division by zero is not defined")
    return [Token("n", f"{plain(above)}/{below}", above / below)]
