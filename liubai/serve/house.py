"""Which models there are, and what each of them can do."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.model.config import ModelConfig
from liubai.rollout.paths import KINDS
from liubai.rollout.thinking import CLOSE, END_CALL, completing
from liubai.rollout.writer import Writer
from liubai.serve.errors import Refused
from liubai.serve.host import Host
from liubai.serve.limits import Limits
from liubai.serve.router import ROUTES, Router
from liubai.serve.tools import TOOLS
from liubai.text.template import THINK_ANSWER, Template
from liubai.text.tokenizer import ANSWER, END_THINK, THINK, TextTokenizer


@dataclass
class Served:
    """A model under its name. ``writer`` writes for it; one that has ``admit`` is asked for room first.
    ``token_bytes`` are the keys and values of a token in a beam search, at most; 0: nobody counts them."""

    name: str
    writer: Writer
    tokenizer: TextTokenizer
    thinking: Template
    max_length: int
    version: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    token_bytes: int = 0

    def __post_init__(self) -> None:
        #: the same without a thought; where the template always opens one, ``closing`` must follow it
        self.plain = Template(self.tokenizer, self.thinking.source, thinking=False)
        self.closing = ""
        own = self.tokenizer.id_of(THINK) is not None and self.tokenizer.id_of(END_THINK) is not None
        self.thinks = (
            own or self.thinking.prefilled == THINK or self.plain.prefilled != self.thinking.prefilled
        )
        if self.plain.prefilled == THINK:
            self.plain = copy.copy(self.plain)
            self.plain.prefilled, self.closing = f"{THINK} {END_THINK}", CLOSE
        #: ``<answer>`` and its end are form, not text
        self.tagged = self.tokenizer.id_of(ANSWER) is not None or self.thinking.source == THINK_ANSWER

    @classmethod
    def by(cls, host: Host) -> Served:
        return cls(
            host.name,
            host,
            host.tokenizer,
            host.template,
            host.max_length,
            host.version,
            token_bytes=token_bytes(host.config),
        )

    @property
    def calls(self) -> bool:
        """Can it write a tool call at all?"""
        return bool(completing(self.tokenizer, END_CALL))

    def kinds(self) -> list[str]:
        judged = bool(self.writer.judges())
        return [kind for kind in KINDS if kind != "best" or judged]

    def room(self, answers: int) -> AbstractContextManager[Writer]:
        """For so many answers at a time. Raises what :meth:`Host.admit` raises."""
        if isinstance(self.writer, Host):
            return self.writer.admit(answers)
        return nullcontext(self.writer)


class House:
    """All models; the first is the one that answers when none is named. ``fast`` and ``think`` are the names
    of the models to which a router's ways lead (default: the one that was asked). ``judges_by`` ends the
    sentence that a model is missing which judges paths: how it is given."""

    def __init__(
        self,
        models: Iterable[Served],
        limits: Limits | None = None,
        *,
        router: Router | None = None,
        fast: str | None = None,
        think: str | None = None,
        judges_by: str = "; the server is given one at its start: --reward-model DIR, --process-model DIR",
    ) -> None:
        self.models = {served.name: served for served in models}
        self.limits, self.router = limits or Limits(), router
        self.judges_by = judges_by
        ways: dict[str, str | None] = {"fast": fast, "think": think}
        self.ways = {way: name for way, name in ways.items() if name is not None}
        for way, name in self.ways.items():
            if name not in self.models:
                raise UserError(f"there is no model '{name}' here for --{way}; name one of those served")

    def on(self, way: str | None, name: str | None) -> Served:
        """The model for a way of the router; the one of that name where it has none of its own. Raises
        :class:`Refused` (404)."""
        asked = self.find(name)
        return asked if way not in self.ways else self.models[self.ways[way]]

    def find(self, name: str | None) -> Served:
        """Raises :class:`Refused` (404)."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            shown = ", ".join(self.models)
            raise Refused(
                404, f"there is no such model here; there is: {shown}", param="model", code="model_not_found"
            )
        return self.models[name]

    def described(self, served: Served) -> dict[str, Any]:
        """For /v1/models."""
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "liubai",
            "liubai": {
                "thinking": served.thinks,
                "max_length": served.max_length,
                "judges": sorted(served.writer.judges()),
                "paths": served.kinds(),
                "tools": list(TOOLS) if served.calls else [],
                "routes": list(ROUTES) if self.router is not None else [],
                "functions": served.thinking.takes_tools,
            },
        }


def token_bytes(config: ModelConfig) -> int:
    """Of the keys and values of one token, in float32."""
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each checkpoint: of a run its stage (``r1`` of ``runs/mine/16-r1/checkpoint``), else its
    folder's; with the folder above in front where two would be the same."""
    parts = [[part for part in folder.absolute().parts if part != "/"] for folder in folders]
    stems = []
    for steps in parts:
        stem = steps[:-1] if steps[-1] == "checkpoint" and len(steps) > 1 else steps
        # hub ids are folders like models--org--name/snapshots/HASH
        hub = [step for step in stem if step.startswith("models--")]
        stems.append(hub[-1].split("--")[1:] if hub else stem)
    names = [_plain(stem[-1]) for stem in stems]
    for depth in range(2, 1 + max(map(len, stems))):
        if len(set(names)) == len(names):
            break
        names = [
            "-".join(map(_plain, stem[-depth:])) if names.count(name) > 1 else name
            for name, stem in zip(names, stems, strict=True)
        ]
    return [
        name if names.index(name) == i else f"{name}-{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def _plain(part: str) -> str:
    number, dash, rest = part.partition("-")
    part = rest if dash and rest and number.isdigit() else part
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in part
    )
    return kept.strip("-.") or "model"
