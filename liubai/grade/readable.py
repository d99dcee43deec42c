"""Can a thought be read? R1's filters of sampled answers (arXiv 2501.12948v2, appendices B.3.2 and B.3.3).

Chains of mixed languages, with long paragraphs or code blocks, are dropped; so are those that repeat
themselves. Words that say nothing are our addition: in the wide world those who think long mutter. Left out
on purpose: whether the thought is right, and any model's opinion of its style.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

from liubai.grade.language import HAN, LATIN, consistency, prose, words

GRAM = 6  #: words in a row; whoever says six of them again repeats himself
#: Words that say nothing, in small letters and with no letter doubled (Hmm is hm); Han wherever they stand.
FILLERS = ("uh", "um", "hm", "er", "erm", "ah", "eh", "嗯", "呃", "啊", "唔", "噢")
FENCE = "```"

_UNIT = re.compile(rf"[{HAN}]|[^\s{HAN}]+")
_SPOKEN = re.compile(rf"[{HAN}]|[{LATIN}]+(?:['’][{LATIN}]+)*")
_DOUBLED = re.compile(r"(.)\1+")
# what ends a stretch: not the point of 3.11, nor the colon of :7
_PAUSE = re.compile(r"""\n|[.,;:!?](?![^\s"'”’)\]*])|[。，、；：！？…]""")


class ReadableConfig(BaseModel):
    """Bounds that a thought keeps to. Words are split by white space; of Chinese, every character is one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    consistency: float = Field(
        default=0.98, ge=0, le=1, description="least share of words in the question's language; 0 = any"
    )
    repetition: float = Field(
        default=0.2, ge=0, le=1, description="largest share of runs of six words that were there before"
    )
    longest_line: int = Field(
        default=0, ge=0, description="most words with no punctuation or line end between them; 0 = no limit"
    )
    fillers: float = Field(default=0.02, ge=0, le=1, description="largest share of words that say nothing")
    code: bool = Field(default=False, description="whether code blocks are allowed")
    longest: int = Field(default=0, ge=0, description="most characters; 0 = no limit")


def unreadable(thought: str, language: str, config: ReadableConfig) -> list[str]:
    """The names of the filters that ``thought``, the text between the think tags, fails; [] when it passes.

    "mixed language", "repetition", "fillers", "long paragraph", "code block", "too long", in this order. An
    empty thought passes all of them, and one without words (calculations only) is of no language and passes
    that filter. Raises ``ValueError`` for a ``language`` that is neither "en" nor "zh", unless it does not
    matter (``consistency = 0``). Linear in the length of the thought, whatever it holds.
    """
    failed = {
        "mixed language": config.consistency > 0
        and any(words(thought))
        and consistency(thought, language) < config.consistency,
        "repetition": repetition(thought, GRAM) > config.repetition,
        "fillers": filler_share(thought) > config.fillers,
        "long paragraph": 0 < config.longest_line < longest_line(thought),
        "code block": FENCE in thought and not config.code,
        "too long": 0 < config.longest < len(thought),
    }
    return [name for name, fails in failed.items() if fails]


def units(text: str) -> list[str]:
    """Words by white space, signs and all; of Chinese, every character."""
    return _UNIT.findall(text)


def repetition(text: str, n: int) -> float:
    """``1 − unique/all`` of the runs of ``n`` words; 0 when there are fewer than two. Raises ``ValueError``
    for n below 1."""
    if n < 1:
        raise ValueError("a run has one word at least")
    found = units(text)
    grams = list(zip(*(found[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def filler_share(text: str) -> float:
    """The share of the words that say nothing, without formulas and code; 0 of none. Of Chinese, every
    character is a word."""
    spoken = _SPOKEN.findall(prose(text))
    return sum(_DOUBLED.sub(r"\1", w.lower()) in FILLERS for w in spoken) / len(spoken) if spoken else 0.0


def longest_line(text: str) -> int:
    """The most words in a row with no punctuation and no line end between them."""
    return max(len(units(stretch)) for stretch in _PAUSE.split(text))
