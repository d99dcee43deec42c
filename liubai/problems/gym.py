"""The data sets of reasoning-gym as families: ``gym:NAME``, or ``gym:NAME:option=value, option=value``.

Options are those of the data set, written as in TOML: ``gym:countdown:max_numbers=4, operators=["+", "-"]``.
Entries are made by a process of their own (:mod:`liubai.problems.gym_maker`), which bounds their time, and
a problem carries its entry, so that a grader process can score an answer without making it again. Left out
on purpose: found text (nobody can be pre-trained on them), curricula, and ``composite`` (a recipe mixes
families itself).
"""

from __future__ import annotations

import atexit
import json
import os
import random
import select
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.problems.family import Habits
from liubai.problems.gym_maker import INSTALL, unpacked
from liubai.types import Problem

PREFIX = "gym:"
#: Seconds that an entry may take; the first one waits for imports.
LIMIT_S = 60.0

#: Data sets whose entries have no answer, because many are right -> where they keep one that is.
EXAMPLES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}


class Gym:
    """One data set with its options. ``name`` is without the options: problems of a kind are split alike,
    however they were asked for. A problem without a known answer has an empty gold."""

    verifier = "gym"
    vocabulary: tuple[str, ...] = ()

    def __init__(self, dataset: str, options: Mapping[str, Any]) -> None:
        self.name, self.dataset, self.options = PREFIX + dataset, dataset, dict(options)
        self._options = json.dumps(self.options, sort_keys=True)
        self._entries: int = maker.ask(dataset, self._options, None)["entries"]

    def sample(self, rng: random.Random) -> Problem:
        packed = _entry(self.dataset, self._options, rng.randrange(self._entries))
        entry = unpacked(packed)
        gold = entry["answer"]
        if gold is None and self.dataset in EXAMPLES:
            example = entry["metadata"][EXAMPLES[self.dataset]]
            gold = example if isinstance(example, str) else json.dumps(example)
        meta = {"dataset": self.dataset, "options": self.options, "entry": packed}
        return Problem(entry["question"], gold or "", self.verifier, self.name, meta=meta)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        raise UserError(f"nobody wrote text about '{self.name}'; it is a family for rl and eval")

    def key(self, problem: Problem) -> str:
        # signs matter here, in mazes and sums: only white space and case do not
        return " ".join(unicodedata.normalize("NFKC", problem.prompt).casefold().split())

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        raise UserError(f"nobody wrote text about '{self.name}'; it is a family for rl and eval")


@lru_cache(maxsize=256)
def gym_family(name: str) -> Gym:
    """``gym:countdown:max_numbers=4`` -> its family. Raises ``UserError`` for a data set or an option that
    does not exist, or when reasoning-gym is not installed."""
    if util.find_spec("reasoning_gym") is None:
        raise UserError(INSTALL)
    dataset, _, text = name.removeprefix(PREFIX).partition(":")
    return Gym(dataset.strip(), _options(text, name))


def version() -> str:
    """Of reasoning-gym: with another one, a seed gives other problems."""
    return metadata.version("reasoning-gym")


def _options(text: str, name: str) -> dict[str, Any]:
    try:
        table = tomllib.loads(f"options = {{{text}}}")
        json.dumps(table)  # it travels with every problem, and JSON has no dates
    except (tomllib.TOMLDecodeError, TypeError):
        table = {}
    if list(table) != ["options"]:
        raise UserError(
            f"'{' '.join(name.split())[:120]}': options are written key=value, key=value, values as in TOML "
            '(texts in quotes), such as gym:countdown:max_numbers=4, operators=["+", "-"]'
        )
    options: dict[str, Any] = table["options"]
    return options


class _Maker:
    """The process that makes entries: started when it is needed, gone with this one. Used by one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, *request: object) -> Any:
        """Its answer. Raises ``UserError`` for what it refuses, or when it takes too long or dies."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], LIMIT_S)[0]:
                line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not line:  # an interrupt, too, leaves an answer that nobody waits for
                self.stop()
        if not line:
            raise UserError(f"'gym:{request[0]}' made no problem within {LIMIT_S:.0f} s; change its options")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from liubai.problems.gym_maker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # some print dots while they work
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        atexit.register(self.stop)
        return self._process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            atexit.unregister(self.stop)
            process.kill()
            process.communicate()


maker = _Maker()


@lru_cache(maxsize=2048)  # a step asks for its problems again and again, and some are slow to make
def _entry(dataset: str, options: str, number: int) -> Any:
    return maker.ask(dataset, options, number)
