"""Does a passage support what a summary says? Rules, no model: what the summary claims and the passage lacks.

A summary may leave out; it may not add, change or turn round. What is looked for, in English and Chinese:

- ``number``, ``date``: values that the passage does not have; ``relation``: it has the value, but never
  with a word that it stands beside here; ``count``: a small number in words, which may count what it lists.
- ``name``: words with a capital that the passage does not have.
- ``negation``: denied here and not there; ``affirmed``: the reverse; ``limit``: only, except, 只, 除 … where
  the passage has no such word near the same thing.
- ``opposite``: a contrary or un-, non- of what the passage says; ``word``: a content word (in Chinese, a run
  of characters) that the passage has in no form, nor a common synonym of it.

The weights of the findings were fitted on half of the labelled summaries (``bench/faithful.py``; what came
out on the other half is in docs/hallucination.md). A passage of the wide world (``anna has 3 red cups .``) is
a list of facts, and judged exactly. Left out on purpose: who did what to whom, inference, arithmetic, and
knowledge of the world: what is true and not in the passage is unsupported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from liubai.grade.prose import Token, related, stem, tokens
from liubai.grade.wordlists import OPPOSITES, OPPOSITES_ZH, PLACES, SURNAMES, SYNONYMS
from liubai.problems.lexicon import COLOURS, NAMES, THINGS, translate

SCOPE = 3  #: content words that a denial reaches
OFTEN = 200  #: places of one word that are looked at
MAX_PASSAGE = 200_000  #: characters
SHORTER = 0.75  #: of the passage's words a summary has at most
SUPPORTED = 0.5  #: least score of a summary that the passage supports

#: What a finding costs, in log odds; a kind counts :data:`MOST` times at most. ``share`` is the cost of a
#: summary all of whose content words are unsupported. ``python -m bench.faithful --fit`` fits them again;
#: only a relation, too rare there to be fitted, is half of the bound by decision.
WEIGHTS = {
    "number": 1.47,
    "date": 1.47,
    "relation": 0.35,
    "count": 0.2,
    "name": 1.17,
    "negation": 1.39,
    "affirmed": 1.39,
    "limit": 0.69,
    "opposite": 0.71,
    "word": 0.09,
    "share": 1.23,
}
#: what a summary may cost and still be supported
BOUND = 0.72
MOST = 3
#: kinds that are a content word each
LOST = ("word", "name", "opposite")
_HAN = re.compile(r"[\u3400-\u9fff]")

#: before a word they make its contrary; in-, im- and de- too seldom do (*inform*, *improve*, *describe*)
REVERSING = ("un", "non", "mis", "dis")
#: Han characters that join words and are none
PARTICLES = frozenset(
    "的了着过是在和与及等也都就而被把将对于从到向由为以这那其并或一个之所又还很更最有可会能要让使给则但因此"
)

#: (name, number, colour or "", thing), in English
Fact = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the summary says and the passage does not."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """``score`` from 0 to 1; ``told`` is the share of the passage's facts (of its content words, where it is
    prose) that the summary has."""

    score: float
    supported: bool
    findings: tuple[Finding, ...]
    told: float


def judge(passage: str, summary: str) -> Judgement:
    """Of a summary without any claim the score is 0. Raises ``ValueError`` for a passage that is empty or
    longer than :data:`MAX_PASSAGE`. Time grows about as the lengths do."""
    if not passage.strip() or len(passage) > MAX_PASSAGE:
        raise ValueError(f"a passage has 1 to {MAX_PASSAGE:,} characters")
    facts = facts_in(passage)
    if facts is not None:
        return _closed(facts, summary)
    source = _passage(passage)
    said = tokens(summary)
    if not any(_counts(token) for token in said):
        return Judgement(0.0, False, (), 0.0)
    found = tuple(findings(source, said))
    score = 2.0 ** (-cost(found, claims_in(said)) / BOUND)
    return Judgement(score, score >= SUPPORTED, found, source.told(said))


def faithful(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """How far the passage ``gold`` supports a summary, from 0 to 1: of a list of facts the share of what is
    said that is true, of prose 2^(−cost/:data:`BOUND`), so that ½ is the bound.

    It pays for saying little: ``meta["covers"]`` (0 to 1, default 0) is the share of the passage's facts or
    content words below which the score falls in proportion. And copies are no summaries: above
    ``meta["words"]`` words (default 0: :data:`SHORTER` of the passage's) it falls, too.
    """
    covers, most = meta.get("covers", 0), meta.get("words", 0)
    if isinstance(covers, bool) or not isinstance(covers, int | float) or not 0 <= covers <= 1:
        raise ValueError(f"meta 'covers' is a share from 0 to 1, not {covers!r:.60}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ValueError(f"meta 'words' is a whole number from 0, not {most!r:.60}")
    found = judge(gold, answer)
    most = most or SHORTER * word_count(gold)
    enough = min(1.0, found.told / covers) if covers else 1.0
    return found.score * enough * min(1.0, most / max(1, word_count(answer)))


def word_count(text: str) -> int:
    """Words by white space; of Chinese, every character is one."""
    return len(re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text))


def claims_in(said: Sequence[Token]) -> int:
    """Content words; two Han characters are about one."""
    han = sum(token.kind == "han" and token.text not in PARTICLES for token in said)
    return sum(token.claims for token in said) + -(-han // 2)


def lost_share(found: Iterable[Finding], claims: int) -> float:
    """The share of ``claims`` content words that are unsupported."""
    lost = sum(-(-len(f.text) // 2) if _HAN.match(f.text) else 1 for f in found if f.kind in LOST)
    return min(1.0, lost / max(1, claims))


def cost(found: Sequence[Finding], claims: int) -> float:
    """Of findings in a summary with so many content words."""
    counted = Counter(finding.kind for finding in found)
    each = sum(WEIGHTS[kind] * min(n, MOST) for kind, n in counted.items())
    return each + WEIGHTS["share"] * lost_share(found, claims)


# --- the wide world's lists of facts --------------------------------------------------------------


def facts_in(passage: str) -> list[Fact] | None:
    """The facts of a passage of the wide world in either language; ``None`` when it is none."""
    text = translate(passage.replace("summarise", "").replace("概括", ""), "en")
    parts = [part.split() for part in text.split(".") if part.strip()]
    facts = [_fact(part) for part in parts if part[1:2] == ["has"]]
    known = [fact for fact in facts if fact]
    return known if known and len(known) == len(parts) else None


def _fact(words: Sequence[str]) -> Fact | None:
    """Of ``anna has 3 red cups``; the verb and the colour may be missing."""
    rest = [word for i, word in enumerate(words) if not (i == 1 and word == "has")]
    if len(rest) == 3:
        rest.insert(2, "")
    if len(rest) != 4 or rest[0] not in NAMES or not rest[1].isdigit() or rest[3] not in THINGS:
        return None
    return (rest[0], rest[1], rest[2], rest[3]) if not rest[2] or rest[2] in COLOURS else None


def _closed(facts: Sequence[Fact], summary: str) -> Judgement:
    parts = [part.split() for part in re.split(r"[.,]", translate(summary, "en")) if part.strip()]
    found: list[Finding] = []
    told: set[Fact] = set()
    for part in parts:
        said = _fact(part)
        true = [f for f in facts if said and f[:2] == said[:2] and f[3] == said[3] and said[2] in ("", f[2])]
        told.update(true)
        if not true:
            found.append(Finding(_wrong(facts, said), " ".join(part)))
    score = (len(parts) - len(found)) / len(parts) if parts else 0.0
    return Judgement(score, bool(parts) and not found, tuple(found), len(told) / len(facts))


def _wrong(facts: Sequence[Fact], said: Fact | None) -> str:
    if said is None:
        return "word"
    theirs = [fact for fact in facts if fact[0] == said[0]]
    if not theirs:
        return "name"
    return "number" if any(fact[3] == said[3] for fact in theirs) else "relation"


# --- prose ----------------------------------------------------------------------------------------


def _stems(group: Iterable[str]) -> frozenset[str]:
    return frozenset(map(stem, group))


_SAME: dict[str, set[str]] = {}
for _group in map(_stems, SYNONYMS):
    for _stem in _group:
        _SAME.setdefault(_stem, set()).update(_group)
_CONTRARY: dict[str, set[str]] = {}
for _one, _other in OPPOSITES:
    for _stem in _stems(_one):
        _CONTRARY.setdefault(_stem, set()).update(_stems(_other))
    for _stem in _stems(_other):
        _CONTRARY.setdefault(_stem, set()).update(_stems(_one))


class Passage:
    """A passage, to be asked many times what it has and where."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens = text, tokens(text)
        self.at: dict[str, list[int]] = {}
        self._by_head: dict[str, list[str]] = {}
        for i, token in enumerate(self.tokens):
            self.at.setdefault(token.stem, []).append(i)
        for known in self.at:
            self._by_head.setdefault(known[:4], []).append(known)
        self.pairs: dict[str, list[int]] = {}
        for i, (one, other) in enumerate(pairwise(self.tokens)):
            if one.kind == other.kind == "han":
                self.pairs.setdefault(one.text + other.text, []).append(i)
        #: where it denies something, told closely: two words, or as many characters as :data:`SCOPE`
        self.denied = {
            j
            for i, token in enumerate(self.tokens)
            if token.denies
            for n, j in enumerate(_scope(self.tokens, i))
            if n < 2 or self.tokens[j].kind == "han"
        }
        self._sentence = list(accumulate(token.kind == "stop" for token in self.tokens))
        self.squeezed = _squeezed(text)  # "PowerPoint" is there when "power point" is
        self._places: dict[str, list[int]] = {}

    def places(self, stem: str) -> list[int]:
        """Where it has this word, in whatever form."""
        if stem not in self._places:
            self._places[stem] = sorted(i for form in self._forms(stem) for i in self.at[form])
        return self._places[stem]

    def where(self, token: Token) -> list[int]:
        """Of a word, in whatever form or else by a synonym; of anything else, as it is."""
        if token.kind != "word":
            return self.at.get(token.stem, [])
        return self.places(token.stem) or self.alike(token.stem)

    def together(self, places: Iterable[int], others: Iterable[int]) -> bool:
        """Is one of the places in one sentence (or line) with one of the others, or in the next?"""
        near = {self._sentence[place] + step for place in places for step in (-1, 0, 1)}
        return any(self._sentence[other] in near for other in others)

    def alike(self, stem: str) -> list[int]:
        """Where it has a synonym of this word."""
        return sorted(i for other in _SAME.get(stem, ()) for i in self.at.get(other, ()))

    def told(self, said: Sequence[Token]) -> float:
        """The share of its different content words (Han characters) and values that ``said`` has."""
        mine = {token.stem for token in self.tokens if _counts(token)}
        found = {form for t in said if _counts(t) for form in self._forms(t.stem)}
        return len(mine & found) / len(mine) if mine else 0.0

    def _forms(self, stem: str) -> list[str]:
        return [form for form in self._by_head.get(stem[:4], ()) if related(form, stem)]


def _counts(token: Token) -> bool:
    return (
        token.claims
        or token.kind in ("number", "month", "day")
        or (token.kind == "han" and token.text not in PARTICLES)
    )


@lru_cache(maxsize=256)
def _passage(text: str) -> Passage:
    return Passage(text)


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def findings(source: Passage, said: Sequence[Token]) -> list[Finding]:
    """What the tokens of a summary claim and the passage lacks, in their order but for Chinese runs."""
    found: list[Finding] = []
    for i, token in enumerate(said):
        if token.kind in ("number", "month", "day"):
            found += _value(source, said, i)
        elif token.claims and not source.places(token.stem):
            found += _word(source, token)
        elif token.claims or token.kind == "han":
            found += _affirmed(source, said, i)
        for flag, kind in (("denies", "negation"), ("limits", "limit")):
            scope = [said[j] for j in _scope(said, i)] if getattr(token, flag) else []
            if scope and not any(
                _flagged(source, p, flag) for word in scope for p in source.where(word)[:OFTEN]
            ):
                found.append(Finding(kind, " ".join([token.text, *(word.text for word in scope)])))
    return found + _runs(source, said)


def _value(source: Passage, said: Sequence[Token], i: int) -> list[Finding]:
    token = said[i]
    places = source.at.get(token.stem, [])
    if not places:
        dated = token.kind != "number" or any(t.kind == "month" for t in said[max(0, i - 2) : i + 3])
        small = token.spelt and len(token.stem) == 1
        return [Finding("date" if dated else "count" if small else "number", token.text)]
    if token.spelt:
        return []
    known = [(word, at) for word in _beside(said, i) if (at := source.where(word))]
    if known and not source.together(places, (p for _, at in known for p in at)):
        return [Finding("relation", f"{token.text} {known[-1][0].text}")]
    return []


def _beside(said: Sequence[Token], i: int) -> list[Token]:
    """The closest word or value on either side, in the same sentence and at most four tokens away."""
    found = []
    for side in (said[max(0, i - 4) : i][::-1], said[i + 1 : i + 5]):
        for token in side:
            if token.kind == "stop":
                break
            if _counts(token):
                found.append(token)
                break
    return found


def _word(source: Passage, token: Token) -> list[Finding]:
    squeezed = _squeezed(token.text)
    if len(squeezed) > 4 and squeezed in source.squeezed:
        return []
    if token.named:
        return [Finding("name", token.text)]
    bare = next((token.stem[len(p) :] for p in REVERSING if token.stem.startswith(p)), "")
    turned = len(bare) >= 4 and source.places(bare)
    if turned or (len(token.stem) >= 4 and any(p + token.stem in source.at for p in REVERSING)):
        return [Finding("opposite", token.text)]
    if source.alike(token.stem):
        return []
    contrary = any(other in source.at for other in _CONTRARY.get(token.stem, ()))
    return [Finding("opposite" if contrary else "word", token.text)]


def _affirmed(source: Passage, said: Sequence[Token], i: int) -> list[Finding]:
    """Wherever the passage has the word (two characters in a row) it denies it, and the summary does not."""
    if any(token.denies for token in said[max(0, i - 7) : i + 3]):
        return []
    text = said[i].text
    if said[i].kind == "han":
        text += said[i + 1].text if i + 1 < len(said) else ""
    places = source.pairs.get(text, []) if said[i].kind == "han" else source.places(said[i].stem)
    return [Finding("affirmed", text)] if places and source.denied.issuperset(places) else []


def _flagged(source: Passage, place: int, flag: str) -> bool:
    return any(getattr(token, flag) for token in source.tokens[max(0, place - 6) : place + 2])


def _scope(said: Sequence[Token], i: int) -> list[int]:
    """Where stands what is denied at ``i``: the next words that say something, in the same sentence."""
    found: list[int] = []
    for j, token in enumerate(said[i + 1 : i + 12], i + 1):
        if token.kind == "stop" or len(found) == SCOPE:
            break
        if token.claims or (token.kind == "han" and token.text not in PARTICLES):
            found.append(j)
    return found


def _runs(source: Passage, said: Sequence[Token]) -> list[Finding]:
    """Two and more Han characters in a row that the passage has beside neither of their neighbours."""
    runs = [""]
    for i, token in enumerate(said):
        lost = token.kind == "han" and not (token.text in PARTICLES or token.denies or token.limits)
        if lost:
            before = said[i - 1].text if i else ""
            after = said[i + 1].text if i + 1 < len(said) else ""
            lost = before + token.text not in source.pairs and token.text + after not in source.pairs
        runs[-1:] = [runs[-1] + token.text] if lost else [runs[-1], ""]
    return [Finding(_run_kind(source, run), run) for run in runs if len(run) > 1]


def _run_kind(source: Passage, run: str) -> str:
    for one, other in (*OPPOSITES_ZH, *(pair[::-1] for pair in OPPOSITES_ZH)):
        if one in run and other in source.text:
            return "opposite"
    return "name" if (len(run) <= 3 and run[0] in SURNAMES) or run[-1] in PLACES else "word"
