"""Several paths to one answer: how to spend tokens at answer time.

    outcome = await answer(writer, ask, PathsConfig.parse("vote:8"))
    outcome.best.content, outcome.spent.written

- ``greedy``: the likeliest token each time. ``sample``: ``n`` draws, of which the first is the answer.
- ``beam``: the likeliest whole answer that ``width`` beginnings lead to.
- ``vote``: the answer that most of ``n`` draws agree on (self-consistency, arXiv 2203.11171).
- ``best``: the one of ``n`` draws that a reward model or a process model scores highest.
- ``tree``: a search over the steps of the thought (:mod:`liubai.rollout.tree`).

They cost differently, so they are to be compared at equal tokens: :class:`Outcome` says what was spent.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from re import fullmatch
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from liubai.errors import UserError, nearest
from liubai.rollout.engine import Request
from liubai.rollout.thinking import Ask, Draft, Path, Spent, one, path_of, together
from liubai.rollout.tree import TreeSearch, TreeSettings, Value
from liubai.rollout.writer import Judge, Piece, Writer
from liubai.seeds import derive
from liubai.text.tokenizer import END_THINK

Kind = Literal["greedy", "sample", "beam", "vote", "best", "tree"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Which kinds a key means something to.
BELONGS: dict[str, tuple[Kind, ...]] = {
    "n": ("sample", "vote", "best"),
    "width": ("beam",),
    "alpha": ("beam",),
    "judge": ("best", "tree"),
    "simulations": ("tree",),
    "branch": ("tree",),
    "c_puct": ("tree",),
    "step_tokens": ("tree",),
    "value": ("tree",),
    "rollouts": ("tree",),
    "tokens": ("tree",),
}
#: What the number behind a kind is, and what it is when there is none.
NUMBER: dict[Kind, tuple[str, int]] = {
    "sample": ("n", 1),
    "vote": ("n", 8),
    "best": ("n", 8),
    "beam": ("width", 4),
    "tree": ("simulations", 16),
}

#: No text that names paths has more characters.
LONGEST = 80

#: Heard of path number so much.
HeardPath = Callable[[int, Piece], None]


class PathsConfig(BaseModel):
    """What is not set has a default of its kind. A text in its place is read by :meth:`parse`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    kind: Kind = "sample"
    n: int | None = Field(None, ge=1, le=1024, description="answers")
    width: int | None = Field(None, ge=1, le=256, description="beginnings that a beam search keeps")
    alpha: float | None = Field(None, ge=0, le=2, description="0: the likeliest; 1: the likeliest a token")
    #: which model judges: the reward model ("preference") or the process model; the one there is
    judge: Judge | None = None
    simulations: int | None = Field(None, ge=1, le=10_000)
    branch: int | None = Field(None, ge=1, le=64, description="next steps drawn from a thought")
    c_puct: float | None = Field(None, ge=0, le=100, description="how much a tree explores")
    step_tokens: int | None = Field(None, ge=1, description="the longest step")
    #: what a thought is worth: by the process model (if there is one), or by how far its rollouts agree
    value: Value | None = None
    rollouts: int | None = Field(None, ge=1, le=64, description="thoughts finished to judge one")
    tokens: int | None = Field(None, ge=1, description="no simulation begins after so many tokens")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, raw: Any) -> Any:
        return _fields(raw) if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, kinds in BELONGS.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"'{key}' means nothing to {self.kind}; it belongs to {', '.join(kinds)}")
        if self.kind == "tree" and self.judge == "preference":
            raise ValueError("a reward model judges whole answers; a tree needs the judge 'process', or none")
        if self.judge is not None and self.value == "rollouts":
            raise ValueError("a tree is led by a judge or by rollouts: leave one of them out")
        if self.rollouts is not None and self.value != "rollouts":
            raise ValueError("'rollouts' needs value = rollouts")
        return self

    @classmethod
    def parse(cls, text: str) -> PathsConfig:
        """``KIND[:N[:JUDGE]]``: ``vote:8``, ``beam:4``, ``best:8:process``, ``tree:16:rollouts``. Raises
        ``UserError``."""
        try:
            return cls.model_validate(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = first["msg"].removeprefix("Value error, ")
            raise UserError(f"paths '{text[:LONGEST]}': {what[:1].lower()}{what[1:]}") from None

    @property
    def number(self) -> int:
        """How many answers, beginnings or simulations."""
        name, default = NUMBER.get(self.kind, ("", 1))
        return getattr(self, name, None) or default

    @property
    def name(self) -> str:
        """What :meth:`parse` would read, as far as it goes."""
        number = f":{self.number}" if self.kind in NUMBER else ""
        judge = self.judge or ("rollouts" if self.value == "rollouts" else "")
        return f"{self.kind}{number}{f':{judge}' if judge else ''}"

    @property
    def at_once(self) -> int:
        """Answers that may be written at the same time."""
        if self.kind == "tree":
            settings = self.tree(self.value or "rollouts")
            return settings.branch + (settings.rollouts if settings.value == "rollouts" else 0)
        return self.number

    @property
    def in_all(self) -> int:
        """Answers that are written, steps of a tree among them; what a tree begins and ends with not
        counted."""
        return self.number * self.at_once if self.kind == "tree" else self.number

    def tree(self, value: Value) -> TreeSettings:
        """The settings of a tree, whose value has been settled."""
        named = ("simulations", "branch", "c_puct", "step_tokens", "rollouts", "tokens")
        given = {key: set_to for key in named if (set_to := getattr(self, key)) is not None}
        return TreeSettings(value=value, **given)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All ``paths``, and which of them is the answer. ``votes`` of a path are those for its answer, in a tree
    its visits; ``score`` is the judge's, in a tree the mean value. ``spent`` covers all of them, and what was
    thrown away."""

    chosen: int
    paths: tuple[Path, ...]
    spent: Spent

    @property
    def best(self) -> Path:
        return self.paths[self.chosen]


async def answer(writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None = None) -> Outcome:
    """Raises ``UserError`` for what cannot be: no judge where one is needed, draws at temperature 0.

    ``heard`` is given the tokens of draws as they come. A beam search and a tree are silent: what they look
    at is mostly given up again.
    """
    spent = Spent()
    paths, chosen = await ANSWERERS[config.kind](writer, ask, config, heard, spent)
    return Outcome(chosen, tuple(paths), spent)


Answerer = Callable[
    [Writer, Ask, PathsConfig, HeardPath | None, Spent], Awaitable[tuple[Sequence[Path], int]]
]


async def greedy(
    writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None, spent: Spent
) -> tuple[Sequence[Path], int]:
    return await draw(writer, replace(ask, temperature=0.0, top_p=1.0), 1, heard, spent), 0


async def sample(
    writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None, spent: Spent
) -> tuple[Sequence[Path], int]:
    return await draw(writer, ask, config.number, heard, spent), 0


async def beam(
    writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None, spent: Spent
) -> tuple[Sequence[Path], int]:
    """``alpha`` chooses among what the search found. ``written`` counts what was computed: a token of all
    beginnings at each of its steps, of which the longest answer that it returns may have had fewer."""
    if ask.budget is not None or ask.at_least or ask.use is not None:
        raise UserError(
            "a beam search writes whole answers: it has no thinking budget, no least thought and no tools"
        )
    request = Request(
        id=0,
        prompt_ids=ask.prompt_ids,
        max_tokens=ask.max_tokens,
        seed=ask.seed,
        stop_ids=ask.stop_ids,
    )
    samples = await writer.beams(request, config.number)
    spent.read += len(ask.prompt_ids)
    spent.written += config.number * samples.steps
    paths = [
        path_of(
            ask,
            Draft(s.completion_ids, s.logprobs, (False,) * len(s.completion_ids), s.stop, s.version),
        )
        for s in samples
    ]
    paths = [replace(p, score=p.logprob / max(1, p.tokens) ** (config.alpha or 0.0)) for p in paths]
    return paths, _most(paths, lambda path: (path.ended, path.score))


async def vote(
    writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None, spent: Spent
) -> tuple[Sequence[Path], int]:
    return elect(await draw(writer, ask, config.number, heard, spent))


async def best(
    writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None, spent: Spent
) -> tuple[Sequence[Path], int]:
    """Ended answers before those that were cut off, those that can be read before those that cannot; then by
    score, then by probability."""
    judge = judge_of(writer, config.judge)
    paths = await draw(writer, ask, config.number, heard, spent)
    scores = await writer.judge(judge, [(ask.question, path.response) for path in paths])
    tag = len(ask.template.tokenizer.encode(END_THINK))
    for path in paths:
        spent.judged += len(ask.prompt_ids) + path.tokens
        if judge == "preference" and path.thought_tokens:  # a reward model reads the answer alone
            spent.judged -= min(path.thought_tokens + tag, path.tokens)
    paths = [replace(path, score=score) for path, score in zip(paths, scores, strict=True)]
    return paths, _most(paths, lambda p: (p.ended, p.answer is not None, p.score, p.logprob))


async def tree(
    writer: Writer, ask: Ask, config: PathsConfig, heard: HeardPath | None, spent: Spent
) -> tuple[Sequence[Path], int]:
    value = config.value or ("process" if config.judge or "process" in writer.judges() else "rollouts")
    if value == "process" and "process" not in writer.judges():
        raise UserError(
            "a tree led by a process model needs one (a stage of kind process); name it, or let its rollouts "
            "lead it (value = rollouts)"
        )
    return await TreeSearch(writer, ask, config.tree(value), spent, ballot).run()


ANSWERERS: dict[Kind, Answerer] = {
    "greedy": greedy,
    "sample": sample,
    "beam": beam,
    "vote": vote,
    "best": best,
    "tree": tree,
}


async def draw(writer: Writer, ask: Ask, n: int, heard: HeardPath | None, spent: Spent) -> list[Path]:
    """``n`` paths at once. The first has the seed of the ask itself: one draw is a plain answer."""
    if n > 1 and ask.temperature == 0:
        raise UserError(f"{n} answers at temperature 0 are one and the same; raise the temperature")

    def ear(i: int) -> Callable[[Piece], None] | None:
        return None if heard is None else lambda piece: heard(i, piece)

    seeds = [ask.seed, *(derive(ask.seed, "path", i) for i in range(1, n))]
    return await together([one(writer, replace(ask, seed=s), ear(i), spent) for i, s in enumerate(seeds)])


def elect(paths: Sequence[Path]) -> tuple[list[Path], int]:
    """The paths with their votes, and the first of those whose answer has most. Of answers with as many votes
    the one wins that the model gives the greatest probability, over all its paths; then the first. A path
    without an answer has no vote; where no path has one, the likeliest that ended is taken."""
    ballots: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        if path.answer is not None:
            ballots.setdefault(ballot(path.answer), []).append(i)
    if not ballots:
        return list(paths), _most(paths, lambda path: (path.ended, path.logprob))

    def weight(voters: Sequence[int]) -> tuple[int, float]:
        most = max(paths[i].logprob for i in voters)  # probabilities of whole answers underflow
        return len(voters), most + math.log(sum(math.exp(paths[i].logprob - most) for i in voters))

    winners = max(ballots.values(), key=weight)
    votes = {i: len(voters) for voters in ballots.values() for i in voters}
    return [replace(path, votes=votes.get(i)) for i, path in enumerate(paths)], winners[0]


def ballot(answer: str) -> str:
    """The same for answers that say the same: ``3.80`` and ``3.8``, ``1/2`` and ``0.5``, ``A`` and ``a``."""
    plain = "".join(answer.split()).casefold()
    if fullmatch(r"[+-]?\d{1,40}(\.\d{1,40})?|[+-]?\d{1,40}/\d{1,40}", plain):
        try:
            return str(Fraction(plain))
        except ZeroDivisionError:
            return plain
    return plain


def judge_of(writer: Writer, wanted: Judge | None) -> Judge:
    """The judge that was asked for or, without a wish, the one there is; of two the process model, which
    reads the thought."""
    there = writer.judges()
    if wanted is None and there:
        return "process" if "process" in there else "preference"
    if wanted not in there or wanted is None:
        kind = {
            "preference": "a reward model (a stage of kind reward_model)",
            "process": "a process model (a stage of kind process)",
            None: "a model that judges (a stage of kind reward_model or process)",
        }
        raise UserError(
            f"the best of several answers needs {kind[wanted]}; name one, or let the answers vote"
        )
    return wanted


def _most(paths: Sequence[Path], key: Callable[[Path], Any]) -> int:
    """The first of those with the greatest key."""
    return max(range(len(paths)), key=lambda i: key(paths[i]))


def _fields(text: str) -> dict[str, Any]:
    if len(text) > LONGEST:
        raise ValueError("write KIND, KIND:N or KIND:N:JUDGE, for example best:8:process")
    kind, *rest = text.strip().split(":")
    if kind not in KINDS:
        raise ValueError(f"there is no kind '{kind}'; {nearest(kind, KINDS)}")
    found: dict[str, Any] = {"kind": kind}
    if rest and kind not in NUMBER:
        raise ValueError(f"{kind} takes no number")
    if rest:
        if not rest[0].isascii() or not rest[0].isdecimal() or len(rest[0]) > 6:
            raise ValueError(f"'{rest[0]}' is no number; write KIND:N, for example vote:8")
        found[NUMBER[kind][0]] = int(rest[0])  # type: ignore[index]
    if rest[1:]:
        found["value" if rest[1] == "rollouts" else "judge"] = rest[1]
    if rest[2:]:
        raise ValueError("write KIND, KIND:N or KIND:N:JUDGE, for example best:8:process")
    return found
