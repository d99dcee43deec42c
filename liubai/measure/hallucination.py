"""Hallucination in summaries, by the method of vectara's leaderboard: how often does a summary say what the
document does not?

The model is asked, at temperature 0, for a summary from the document alone. What counts is documents that
were *answered*: a refusal, an empty or a cut-off answer is none. Beside the rate stand the answer rate, the
mean length and the share of copies, for silence and copying both look faithful; and the rate over all
documents, answered or not. Checkpoints are compared on the documents that all of them answered. Left out on
purpose: how good a summary is.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.files import read_json
from liubai.grade.extract import ANSWER, END_THINK, THINK, extract
from liubai.grade.faithful import MAX_PASSAGE, facts_in, word_count
from liubai.measure.faithful import Score
from liubai.problems.rows import read_rows
from liubai.types import Problem

#: fewer words of prose are no summary; of the wide world's lists of facts, one is enough
LEAST_WORDS = 5
#: two-sided, of Wilson's interval
Z = 1.959964
DRAWS = 2000  #: of the bootstrap
_REFUSAL = re.compile(
    r"\W*(i'?m sorry|i am sorry|sorry|i can(?:not|'t)|i am unable|i'm unable|unable to|there is no passage"
    r"|抱歉|对不起|很抱歉|我?无法|我?不能)",
    re.IGNORECASE,
)
_ASK = {
    "en": "Below is a passage. Summarise it briefly, with its main points; use nothing but the passage.\n\n",
    "zh": "下面是一段文字。请只根据这段文字，简要概括其要点。\n\n",
}
_HAN = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Document:
    """``prompt`` is what is asked; ``summary`` one that is there already, or ""."""

    passage: str
    prompt: str
    language: str = "en"
    summary: str = ""

    def problem(self) -> Problem:
        """For the engine: the rules are its verifier, whichever scorer judges it later."""
        return Problem(self.prompt, self.passage, "faithful", "hallucination", self.language)


@dataclass(frozen=True, slots=True)
class Summary:
    """``said`` is ``None`` where the document was not answered, and then ``score``, too. ``tokens`` are those
    of the whole answer, thought and all; 0 when nobody counted."""

    document: Document
    said: str | None
    score: Score | None = None
    tokens: int = 0

    @property
    def hallucinated(self) -> bool | None:
        """``None`` where nothing was said or judged."""
        return None if self.score is None or self.score.error is not None else not self.score.supported


def of_problems(problems: Sequence[Problem]) -> list[Document]:
    """The family's own: a passage that asks for its summary. Raises ``UserError`` for other families."""
    if not all(facts_in(problem.prompt) for problem in problems):
        raise UserError(
            "hallucination is measured on passages: the family 'passage', or a file of {\"passage\": …} rows"
        )
    return [Document(p.prompt, p.prompt, p.language) for p in problems]


def of_file(path: str, limit: int | None = None) -> list[Document]:
    """Rows with ``passage``, and perhaps ``prompt`` (what is asked, in place of our own words) and
    ``summary``. Raises ``UserError`` with file and line for a bad one."""
    found: list[Document] = []
    for line, row in read_rows(path):
        if limit is not None and len(found) >= limit:
            break
        passage = row.get("passage")
        if not isinstance(passage, str) or not passage.strip():
            names = ", ".join(sorted(map(str, row)))[:80]
            raise UserError(f"{path}:{line}: needs a 'passage' to be summarised; it has {names or 'nothing'}")
        if len(passage) > MAX_PASSAGE:
            raise UserError(f"{path}:{line}: a passage has at most {MAX_PASSAGE:,} characters; cut it")
        for key in ("prompt", "summary"):
            if not isinstance(row.get(key, ""), str):
                raise UserError(f"{path}:{line}: '{key}' must be text")
        language = "zh" if 2 * len(_HAN.findall(passage)) > len(re.sub(r"\s", "", passage)) else "en"
        prompt = row.get("prompt") or _ASK[language] + passage
        found.append(Document(passage, prompt, language, row.get("summary", "")))
    if not found:
        raise UserError(f"'{path}' has no rows; each is one {{\"passage\": …}}")
    return found


def said_in(response: str, passage: str, prefilled: str = "") -> str | None:
    """The summary in a response: what its answer tags hold, or all that comes after the thought; ``None``
    when that is nothing, a refusal, or of prose less than :data:`LEAST_WORDS` words."""
    turn = prefilled + response
    closed = turn.rfind(END_THINK)
    if turn.rfind(THINK) > closed:
        return None
    text = turn[closed + len(END_THINK) :] if closed >= 0 else turn
    said = extract(response, prefilled).answer if ANSWER in text else text.strip()
    least = 1 if facts_in(passage) else LEAST_WORDS
    if not said or _REFUSAL.match(said) or word_count(said) < least:
        return None
    return said


def figures(summaries: Sequence[Summary]) -> dict[str, Any]:
    """What ``hallucination.json`` holds of one checkpoint; shares from 0 to 1, lengths in words.

    ``rate`` is over answered documents with a verdict, with Wilson's 95 % interval, and ``None`` without any;
    ``rate_all`` over all documents. ``kinds`` counts the summaries that have a finding of that kind.
    """
    answered = [s for s in summaries if s.said is not None]
    judged = [s for s in answered if s.hallucinated is not None]
    wrong = [s for s in judged if s.hallucinated]
    told = [s.score.told for s in judged if s.score and s.score.told is not None]
    kinds = Counter(kind for s in wrong if s.score for kind in {f.kind for f in s.score.findings})
    return {
        "documents": len(summaries),
        "answered": len(answered),
        "answer_rate": _share(len(answered), len(summaries)),
        "rate": _share(len(wrong), len(judged)) if judged else None,
        "interval": list(wilson(len(wrong), len(judged))) if judged else None,
        "rate_all": _share(len(wrong), len(summaries)),
        "words": _mean([float(word_count(s.said or "")) for s in answered]),
        "tokens": _mean([float(s.tokens) for s in summaries]),
        "told": _mean(told) if told else None,
        "copied": _share(sum(_copied(s) for s in answered), len(answered)),
        "errors": len(answered) - len(judged),
        "kinds": dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
    }


def compare(ours: Sequence[bool | None], theirs: Sequence[bool | None], seed: int = 0) -> dict[str, Any]:
    """Two checkpoints over the documents that both answered (``None``: not answered, or no verdict).

    ``worse`` is the rate of ours less that of theirs, ``interval`` its 95 % bootstrap interval over
    documents; both ``None`` where there is no such document. Raises ``UserError`` for unequal numbers.
    """
    if len(ours) != len(theirs):
        raise UserError(
            f"{len(ours)} documents against {len(theirs)}: only the same documents can be compared; give "
            "both the same problems and limit"
        )
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not both:
        return {"documents": 0, "rate": None, "other": None, "worse": None, "interval": None}
    differences = [int(a) - int(b) for a, b in both]
    rng, n = random.Random(seed), len(both)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(DRAWS))
    return {
        "documents": n,
        "rate": sum(a for a, _ in both) / n,
        "other": sum(b for _, b in both) / n,
        "worse": sum(differences) / n,
        "interval": [means[round(0.025 * (DRAWS - 1))], means[round(0.975 * (DRAWS - 1))]],
    }


def wilson(count: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share: sensible at 0 of n, too. Raises ``ValueError`` without any."""
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"{count} of {n} is no share")
    p = count / n
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / scale if count else 0.0, (middle + half) / scale if count < n else 1.0


def record(summary: Summary) -> dict[str, Any]:
    """One document as JSON values: for a file, and to look at."""
    score = summary.score
    told: dict[str, Any] = {"passage": summary.document.passage, "summary": summary.said}
    if score is not None:
        told |= {"score": round(score.value, 4), "hallucinated": summary.hallucinated}
        told["findings"] = [[finding.kind, finding.text] for finding in score.findings]
        if score.error is not None:
            told["error"] = score.error
    return told


def _copied(summary: Summary) -> bool:
    """Is it a piece of the passage, word for word?"""
    said, passage = (" ".join(text.split()) for text in (summary.said or "", summary.document.passage))
    return bool(said) and said in passage


def _share(count: int, n: int) -> float:
    return count / n if n else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def saved(path: Path) -> dict[str, Any]:
    """``hallucination.json`` of another stage. Raises ``UserError`` when it is damaged."""
    try:
        told = read_json(path)
        if not isinstance(told.get("verdicts"), list) or not isinstance(told.get("documents_digest"), str):
            raise ValueError("no verdicts")
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}); run its stage again") from error
    return told
