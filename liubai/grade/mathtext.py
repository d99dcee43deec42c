r"""What can be decided about a written mathematical answer without a computer algebra system.

LaTeX is brought into one spelling (``tidy``), words are compared as words, and what would be dangerous or
dishonest to hand on is refused (``hazard``). Numbers: :mod:`liubai.grade.quantity`. All of it is bounded:
regular expressions without nested repetition, on texts as short as answers are.
"""

from __future__ import annotations

import math
import re

MAX_LENGTH = 1000  #: characters
MAX_DEPTH = 25  #: nested brackets of all kinds
MAX_DIGITS = 60  #: of one number
MAX_POWER = 4  #: digits of an exponent, or of a number before "!"
MAX_PRODUCT = 100_000  #: of all powers of brackets and the largest other one

_WRAPPERS = [("**", "**"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}")]
_WRAPPERS += [(f"\\{name}{{", "}") for name in ("mathbf", "boldsymbol", "bm")]
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty "}
    | {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "°": "\\degree ", "√": "\\sqrt", "∪": "\\cup "}
)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SUPERSCRIPT = re.compile(f"[{''.join(_RAISED)}]+")
_SPELLINGS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), spelling)
    for pattern, spelling in [
        (r"\\!\s*", ""),
        # as programs write it; a tower is refused by hazard() in this spelling, too
        (r"\s*\*\*\s*(-?[0-9]+(?:\.[0-9]+)?(?![0-9.])|-?[A-Za-z](?![A-Za-z])|\([^()*^]*\))", r"^{\1}"),
        (r"(?<![A-Za-z\\])(pi|ln|log|exp|sin|cos|tan)(?![A-Za-z{])", r"\\\1"),
        (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|textnormal|textbf|textit|textrm|mathrm|mathbf|operatorname)(?![A-Za-z])", r"\\text"),
        (r"\\frac\s*([0-9])\s*(?=[0-9{])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\^\s*\{\s*\\degree\s*\}", r"\\degree "),
        (r"\\leq(?![A-Za-z])", r"\\le"),
        (r"\\geq(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\+%", "%"),
        (r"^([-+]?) ?\$(?=[0-9.])", r"\1\\$"),  # money; any other bare dollar is an environment
        (r"\s+", " "),
        (r" ?, ?", ","),
        # a blank has a meaning between words, numbers and after the name of a command only
        (r"(?<![A-Za-z0-9]) (?=\S)|(?<=\S) (?![A-Za-z0-9])", ""),
    ]
]
_SINGLE = re.compile(r"\{ ?[^{},; ]+ ?\}")  # {5} is printed as 5; {1,2} may be meant as a set


def tidy(text: str) -> str:
    """One spelling of ``text``: the same mathematics, the same or a similar string.

    A comma of a list is followed by a blank where it could be taken for one between thousands.
    """
    text = text.strip()
    stripped = True
    while stripped:
        stripped = False
        for begin, end in _WRAPPERS:
            inner = text[len(begin) : -len(end)] if len(text) > len(begin) + len(end) else ""
            if inner and text.startswith(begin) and text.endswith(end) and _whole(inner, begin):
                text, stripped = inner.strip(), True
    if _SINGLE.fullmatch(text):
        text = text[1:-1].strip()
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{''.join(_RAISED[sign] for sign in found[0])}}}", text)
    text = re.sub(r"\\!\s*|\\,(?=[0-9]{3})", "", text)  # 11,\! 111 is one number, 11, 111 are two
    text = re.sub(r"(?<=[0-9]),\s+(?=[0-9])", ";;", text).translate(_SYMBOLS)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = text.replace(";;", ", ").strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _whole(inner: str, begin: str) -> bool:
    """Do the wrappers around ``inner`` belong together? ``\\boxed{1}+\\boxed{2}`` is not one box."""
    if not begin.endswith("{"):
        return begin not in inner.replace("\\$", "")
    depth = 0
    for brace in re.finditer(r"\\[{}]|[{}]", inner):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            return False
    return depth == 0


# --- what is refused ------------------------------------------------------------------------------

_LONG = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_HUGE = re.compile(
    rf"(?:\^|\*\*)\s*\{{?\s*[-+(]*[0-9]{{{MAX_POWER + 1}}}|\*\*[^*]*\*\*"
    r"|\^\{[^{}\\]*\}\s*(?:\^|\*\*)"
    rf"|[0-9]{{{MAX_POWER + 1}}}\s*!|!\s*[)}}]?\s*!|\([^A-Za-z()]*\)\s*!"
)
_POWER = re.compile(r"(?:\^|\*\*)\s*\{?\s*([0-9]{1,4})")
_BRACKET_POWER = re.compile(r"[)}]\s*(?:\^|\*\*)\s*\{?\s*([0-9]{1,4})")
_SYMBOL = re.compile(r"(?<![A-Za-z\\])[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega)")
_EMBEDDED = re.compile(r"\\[()\[\]]|\\boxed|\\fbox|[<>]\s*/?\s*(?:think|answer)|\x00")
_UNFINISHED = re.compile(
    r"\\(?:sum|prod|int|iint|oint|lim|binom|dbinom|tbinom|bmod|pmod|mod|gcd|lcm|max|min|det|deg|sup|inf)"
    r"(?![A-Za-z])|!(?!=)|\\text\{ ?(?:lcm|gcd|mod) ?\}"
)


def hazard(text: str) -> str | None:
    """Why ``text`` (tidied) is not handed to a computer algebra system, or ``None``.

    Towers such as 2003^{2002^{2001}}, huge exponents and factorials would run until they are killed;
    an environment inside the answer would make the parser choose among several answers.
    """
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    if _LONG.search(text):
        return f"a number of more than {MAX_DIGITS} digits"
    if explodes(text):
        return "a tower of powers, a huge exponent or a huge factorial"
    if _EMBEDDED.search(text) or "$" in text.replace("\\$", ""):
        return "several answers, or markup inside one"
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    return f"brackets nested deeper than {MAX_DEPTH}" if deepest > MAX_DEPTH else None


def explodes(text: str) -> bool:
    """Would its value have too many digits to be computed in a moment?"""
    powers = math.prod(int(power) for power in _BRACKET_POWER.findall(text))
    powers *= max((int(power) for power in _POWER.findall(_BRACKET_POWER.sub("", text))), default=1)
    return powers > MAX_PRODUCT or bool(_HUGE.search(text)) or _tower(text)


def _tower(text: str) -> bool:
    """Is there a power of a number in an exponent? A power of a symbol, as in e^{x^2}, is harmless."""
    begins: list[tuple[int, bool]] = []  # open brackets: where, and whether they are (part of) an exponent
    raised, group = False, ""  # the next token is an exponent; the bracket that was closed last
    for at, sign in enumerate(text):
        inside = bool(begins) and begins[-1][1]
        if sign in "{([":
            begins.append((at, raised or inside))
        elif sign in "})]" and begins:
            group = text[begins.pop()[0] : at]
        elif sign == "^" or text.startswith("**", at):
            before = text[:at].rstrip()[-1:]
            number = before.isdigit() or (before != "" and before in "})]" and not _SYMBOL.search(group))
            if number and (inside or raised or re.search(r"\^ ?[0-9]+ ?$", text[:at])):
                return True
        raised = sign == "^" or (raised and sign == " ") or text.startswith("**", at - 1)
    return False


def unfinished(text: str) -> set[str]:
    """Operators that announce a calculation, not its result: ``\\sum``, ``\\int``, ``!`` …"""
    return {match[0] for match in _UNFINISHED.finditer(text)}


_EITHER = re.compile(r"(?<![A-Za-z])(?:or|and)(?![A-Za-z])|\\(?:pm|mp|lor|vee|land|wedge)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_INNERMOST = re.compile(r"[({\[][^(){}\[\]]*[)}\]]")


def is_list(text: str) -> bool:
    """Does ``text`` name several values: with "or", ±, or a comma that is in no brackets?"""
    if _EITHER.search(text):
        return True
    text = _THOUSANDS.sub("", text)
    for _ in range(MAX_DEPTH):
        text, found = _INNERMOST.subn("", text)
        if not found:
            break
    return "," in text or ";" in text


def is_composite(text: str) -> bool:
    """Does ``text`` have parts that a list could stand for: a list, a set, a tuple, an interval, a matrix?"""
    return is_list(text) or bool(re.search(r",|\\(?:begin|cup|cap|in)(?![A-Za-z])", _THOUSANDS.sub("", text)))


# --- names, words, bases --------------------------------------------------------------------------

_NAME = re.compile(r"\\?[A-Za-z][A-Za-z0-9_{}:/' ]{0,40}(?:\([A-Za-z0-9]\))?")
_RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|approx|equiv|neq)(?![A-Za-z])|[<>]|!=")
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_BASED = re.compile(r"([0-9A-F]+)_ ?\{? ?([0-9]{1,2}) ?\}?")


def is_name(text: str) -> bool:
    """``x``, ``x_{1}``, ``f(2)``, ``AB``, ``A:B`` and the like."""
    return _NAME.fullmatch(text.strip()) is not None


def split_name(text: str) -> tuple[str, str]:
    """``x=5`` → ("x", "5"), ``5`` → ("", "5"); ``x+1=0`` is an equation, and ``5=6`` names nothing."""
    name, equals, value = text.partition("=")
    if not equals or "=" in value or _RELATION.search(text) or not is_name(name):
        return "", text
    return name.replace(" ", "").lower(), value.strip()


def based(text: str) -> tuple[str, str] | None:
    """``52_8``, ``4210_{5}`` → (digits, base)."""
    match = _BASED.fullmatch(text)
    return (match[1].lstrip("0") or "0", match[2]) if match else None


def text_of(text: str) -> str | None:
    """The words of a gold that is one ``\\text{…}``, of any length; ``None`` for what is none."""
    inside = _TEXT.fullmatch(text)
    return _folded(inside[1]) if inside else None


def says(text: str, said: str) -> bool:
    """Is ``text``, with or without ``\\text{…}`` around it, what :func:`text_of` gave?"""
    inside = _TEXT.fullmatch(text)
    return bool(said) and _folded(inside[1] if inside else text) == said


def _folded(text: str) -> str:
    # without the backslash that tidy() put before words such as "tan"
    return " ".join(text.replace("\\", "").casefold().split()).rstrip(".")


_EMPTY = {
    "\\emptyset",
    "\\{\\}",
    "no solution",
    "no solutions",
    "\\text{no solution}",
    "\\text{no solutions}",
}


def is_empty(text: str) -> bool:
    """Does ``text`` say that there is no solution?"""
    return text.lower() in _EMPTY


def words(text: str) -> str | None:
    """What a text answer says, lower case: ``\\text{(C)}`` → ``c``, ``\\text{Evelyn}``, ``even``.

    ``None`` for formulas. Bare letters are words from four on: ``xyz`` is a product.
    """
    inside = _TEXT.fullmatch(text)
    said = (inside[1] if inside else text).strip().rstrip(".")
    letter = re.fullmatch(r"\(? ?([A-Za-z]) ?\)?", said)
    if letter is not None:
        return letter[1].lower()
    if re.fullmatch(r"[^\W\d_](?:[^\W_]|[ '\-,.!?:])*", said) is None:
        return None
    if inside is None and len(re.sub(r"[^A-Za-z]", "", said)) < 4:
        return None
    return " ".join(said.lower().split())
