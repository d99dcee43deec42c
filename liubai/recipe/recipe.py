"""A recipe: a TOML file, checked completely before anything happens.

Every mistake is one ``UserError`` that names the key (dotted), the file and, for an unknown name,
the nearest valid one. The form::

    name = "zero"
    seed = 0
    threads = 2            # torch threads; 0 leaves them alone

    [stages.base]
    kind = "pretrain"      # the other keys are those of the stage's Config
    steps = 100

    [stages.zero]
    kind = "rl"
    from = "base"          # one earlier stage, or a list of them
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from liubai.errors import UserError, nearest
from liubai.problems.rows import ENDINGS
from liubai.recipe import toml
from liubai.stages import stage_module
from liubai.stages.config import StageConfig

TOP = ("name", "seed", "threads", "stages")
#: Names become folders and parts of dotted keys.
RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class StagePlan:
    """One stage: ``parents`` are names of earlier stages."""

    name: str
    kind: str
    parents: tuple[str, ...]
    config: StageConfig


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Stages run in this order."""

    name: str
    seed: int
    threads: int
    stages: tuple[StagePlan, ...]

    def to_toml(self) -> str:
        """The recipe with every default spelt out; reading it gives the same recipe again."""
        stages = {}
        for plan in self.stages:
            origin = {"from": list(plan.parents)} if plan.parents else {}
            stages[plan.name] = {"kind": plan.kind, **origin, **plan.config.model_dump(mode="json")}
        top = {"name": self.name, "seed": self.seed, "threads": self.threads}
        return toml.dumps({**top, "stages": stages})


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read ``path``, apply ``--set`` overrides (``stage.key=value``), and check everything.

    Raises ``UserError`` for the first problem found; touches nothing.
    """
    raw = _read(path)
    for override in overrides:
        _override(raw, override, path)
    return _Checker(path, overrides).recipe(raw)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no recipe file '{path}'") from None
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: not UTF-8 text ({reason}){_ending(path)}") from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder; name the recipe in it: {_inside(path)}") from None
    except OSError as error:
        raise UserError(f"cannot read the recipe '{path}': {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(_syntax(path, text, str(error)) + _ending(path)) from None


def _inside(folder: Path) -> Path:
    """A recipe of the folder, that of `liubai init` before others."""
    usual, found = folder / "recipe.toml", sorted(folder.glob("*.toml"))
    return found[0] if found and usual not in found else usual


def _ending(path: Path) -> str:
    """What to say about a file that is no recipe, and by its name was never meant to be one."""
    if path.suffix.lower() == ".toml":
        return ""
    return f". Recipes end in .toml; questions are read from {', '.join(ENDINGS)}"


def _syntax(path: Path, text: str, message: str) -> str:
    """tomllib's message with the line itself, and the dotted key when one is written twice."""
    found = re.search(r"\(at line (\d+), column \d+\)", message)
    if found is None:
        return f"{path}: {message}"
    number = int(found[1])
    lines = text.splitlines()
    line = lines[number - 1].strip() if number <= len(lines) else ""
    what = message[: found.start()].strip()
    if what.startswith("Cannot declare"):
        return f"{path}:{number}: '{line.strip('[] ')}' is declared twice"
    if what.startswith("Cannot overwrite"):
        headers = [h for h in map(str.strip, lines[: number - 1]) if h.startswith("[")]
        table = headers[-1].strip("[] ") + "." if headers else ""
        return f"{path}:{number}: '{table}{line.partition('=')[0].strip()}' is given twice"
    return f"{path}:{number}: {what[:1].lower()}{what[1:]}: {line}"


def _override(raw: dict[str, Any], override: str, path: Path) -> None:
    """Apply one ``dotted.key=value`` in place."""
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"--set '{override}': write stage.key=value, for example base.steps=100 ({path})")
    stages = raw.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    names = list(stages)
    if keys[0] == "stages" and len(keys) > 1 and "stages" not in names:
        keys = keys[1:]  # the dotted key as error messages and the file spell it
    top = [key for key in TOP if key != "stages"]
    if len(keys) == 1:
        if keys[0] not in top:
            homes = [f"{name}.{keys[0]}" for name in names if keys[0] in _keys(stages[name])]
            hint = nearest(keys[0], top)
            if homes:
                hint = f"name its stage, too: {' or '.join(homes)}"
            elif keys[0] in names:
                hint = "name a key of the stage too"
            raise UserError(f"--set '{override}': '{keys[0]}' is no key of {path}; {hint}")
        raw[keys[0]] = _parse(text)
        return
    if keys[0] not in names:
        raise UserError(f"--set '{override}': {path} has no stage '{keys[0]}'; {nearest(keys[0], names)}")
    table = raw["stages"]
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            at = ".".join(["stages", *keys[:depth]])
            raise UserError(f"--set '{override}': '{at}' in {path} is a value, not a table")
    table[keys[-1]] = _parse(text)


def _keys(table: Any) -> Collection[str]:
    """The keys that a stage may have; none where it is not known of which kind it is."""
    kind = table.get("kind") if isinstance(table, dict) else None
    try:
        return stage_module(kind).Config.model_fields if isinstance(kind, str) else ()
    except UserError:
        return ()


def _parse(text: str) -> Any:
    """A TOML value; what is not one is a bare string, so quotes are seldom needed."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return parsed["value"] if list(parsed) == ["value"] else text


class _Checker:
    """Turns the raw tables of one file into a recipe, or into one sentence about what is wrong."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self._path, self._overrides = path, overrides

    def recipe(self, raw: dict[str, Any]) -> Recipe:
        for key in raw:
            if key not in TOP:
                self._fail(key, f"unknown key; {nearest(key, TOP)}")
        name = raw.get("name", self._path.stem)
        if not isinstance(name, str) or not RECIPE_NAME.fullmatch(name):
            self._fail("name", f"must be letters, digits, '.', '_' and '-', not {_show(name)}")
        seed = self._integer(raw, "seed", 2**63)
        threads = self._integer(raw, "threads", 1025)
        stages = raw.get("stages")
        if not isinstance(stages, dict) or not stages:
            self._fail("stages", "a recipe needs at least one table [stages.NAME]")
        plans: list[StagePlan] = []
        for stage, table in stages.items():
            plans.append(self._stage(stage, table, {plan.name: plan.kind for plan in plans}, list(stages)))
        return Recipe(name, seed, threads, tuple(plans))

    def _integer(self, raw: dict[str, Any], key: str, end: int) -> int:
        value = raw.get(key, 0)
        if type(value) is not int or not 0 <= value < end:
            self._fail(key, f"must be a whole number from 0 to {end - 1}, not {_show(value)}")
        return value

    def _stage(self, name: str, table: Any, earlier: dict[str, str], names: list[str]) -> StagePlan:
        key = f"stages.{name}"
        if not STAGE_NAME.fullmatch(name):
            self._fail(key, "the name of a stage must be letters, digits, '_' and '-'")
        if not isinstance(table, dict):
            self._fail(key, f"must be a table [{key}], not {_show(table)}")
        options = dict(table)
        if "kind" not in options:
            self._fail(f"{key}.kind", "is missing")
        kind = options.pop("kind")
        if not isinstance(kind, str):
            self._fail(f"{key}.kind", f"must be a string, not {_show(kind)}")
        try:
            module = stage_module(kind)
        except UserError as error:
            self._fail(f"{key}.kind", str(error))
        parents = self._parents(f"{key}.from", name, options.pop("from", []), list(earlier), names)
        config = self._config(key, module.Config, options).located(self._path.parent)
        try:
            config.require_parents({parent: earlier[parent] for parent in parents})
        except ValueError as error:
            self._fail(f"{key}.from", str(error))
        return StagePlan(name, kind, parents, config)

    def _parents(
        self, key: str, name: str, value: Any, earlier: list[str], names: list[str]
    ) -> tuple[str, ...]:
        parents = [value] if isinstance(value, str) else value
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            self._fail(key, f"must be the name of a stage, or a list of names, not {_show(value)}")
        for parent in parents:
            if parent == name:
                self._fail(key, f"stage '{name}' cannot come from itself")
            if parent in names and parent not in earlier:
                self._fail(key, f"stage '{parent}' comes later; stages run in the order of the file")
            if parent not in names:
                hint = nearest(parent, earlier) if earlier else "there is no earlier stage"
                self._fail(key, f"there is no stage '{parent}'; {hint}")
            if parents.count(parent) > 1:
                self._fail(key, f"stage '{parent}' is named twice")
        return tuple(parents)

    def _config(self, key: str, config: type[StageConfig], options: dict[str, Any]) -> StageConfig:
        try:
            # strict, and by way of JSON: "100" is no number and true no 1, but an array is a tuple
            whole = json.dumps(config.filled(options), default=str)
            return config.model_validate_json(whole, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = _walk(first["loc"], options)
            self._fail(".".join([key, *at]), _explain(first, config, at))
        except UserError as error:
            self._fail(key, str(error))

    def _fail(self, key: str, message: str) -> NoReturn:
        short = key.removeprefix("stages.")
        source = next((f" (--set {o})" for o in self._overrides if _names(o.partition("=")[0], short)), "")
        raise UserError(f"{self._path}: '{key}': {message}{source}")


def _names(dotted: str, key: str) -> bool:
    """Does an override of ``dotted`` touch ``key``?"""
    dotted = dotted.strip().removeprefix("stages.")
    return key == dotted or key.startswith(dotted + ".")


def _walk(location: Sequence[int | str], options: Any) -> list[str]:
    """The part of pydantic's location that the user wrote: without the tags of unions."""
    path: list[str] = []
    for i, part in enumerate(location):
        if isinstance(options, list):
            options = dict(enumerate(options))
        if not isinstance(options, dict):
            break
        missing = part not in options
        if missing and i < len(location) - 1:
            continue  # a tag, not a key: a key that is missing can only come last
        options = options.get(part)
        path.append(str(part))
    return path


def _explain(error: Any, config: type[BaseModel], at: Sequence[str]) -> str:
    """pydantic's first error in the house's words."""
    match error["type"]:
        case "extra_forbidden":
            valid = _fields(config, at[:-1])
            return "unknown key" + (f"; {nearest(at[-1], valid)}" if valid else "")
        case "missing":
            return "is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "literal_error" | "enum" if isinstance(error["input"], str):
            valid = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"unknown value {_show(error['input'])}; {nearest(error['input'], valid)}"
    message = error["msg"].replace("Input should be", "must be")
    return f"{message}, not {_show(error['input'])}"


def _fields(config: type[BaseModel], at: Sequence[str]) -> list[str]:
    """The keys that the table ``at`` may have, as far as its types say."""
    for part in at:
        field = config.model_fields.get(part)
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        config = inner[0]
    return list(config.model_fields)


def _show(value: object) -> str:
    """A value as the user may have written it, cut when it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
