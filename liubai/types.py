"""The few types that every room shares. They know nothing of models, files or training.

A mask is carried with its tokens and never inferred from token values: in a :class:`Sample` the
prompt and the completion are separate tuples, so "which tokens were generated" is always known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Stop(StrEnum):
    """Why an answer ended."""

    EOS = "eos"  #: the model closed the answer itself; the end token is the last completion id
    LENGTH = "length"  #: the token budget ran out; the answer is unfinished
    ABORT = "abort"  #: the caller withdrew the request; never trained on


@dataclass(frozen=True, slots=True)
class Problem:
    """One question. ``prompt`` is the bare question: templates are applied by ``liubai.text``.

    ``gold`` is what the verifier compares with: for some families an answer, for others the
    specification that an answer must meet (countdown: the numbers and the target).
    """

    prompt: str
    gold: str
    verifier: str
    family: str = ""
    language: str = "en"
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` consecutive completion tokens that were sampled under weights ``version``."""

    version: int
    count: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated answer, as tokens. Text is decoded only to grade and to show.

    ``logprobs[i]`` is the log-probability (nats) of ``completion_ids[i]`` under the behaviour
    policy **at the sampling temperature**. ``versions`` says which weights wrote which tokens; it
    has more than one span only when new weights arrived while the answer was being written.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Stop
    versions: tuple[Span, ...]

    def __post_init__(self) -> None:
        n = len(self.completion_ids)
        if len(self.logprobs) != n:
            raise ValueError(f"a sample of {n} tokens carries {len(self.logprobs)} log-probabilities")
        if sum(span.count for span in self.versions) != n:
            raise ValueError("the version spans of a sample do not cover its completion")

    @property
    def version(self) -> int:
        """The oldest weights that wrote any of it (the staleness that matters)."""
        return min((span.version for span in self.versions), default=0)


@dataclass(frozen=True, slots=True)
class Reward:
    """``parts`` are logged one by one, always; ``total`` is what learning sees."""

    parts: Mapping[str, float]
    total: float


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one problem, with their rewards (same order, same length)."""

    problem: Problem
    samples: tuple[Sample, ...]
    rewards: tuple[Reward, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.rewards):
            raise ValueError("a group needs exactly one reward per sample")
