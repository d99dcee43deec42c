"""Ray without processes: what actors answer is written down in the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception): ...


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RayActorError(RayError): ...


class ActorUnavailableError(RayActorError):
    """What Ray says of an actor while it does not know whether it is gone."""


class OutOfMemoryError(RayError):
    """What Ray says of an actor that its memory monitor has killed."""


class Ref:
    """``value`` is what a call gives, or raises; a call that is not ``ready`` gives nothing for ever."""

    def __init__(self, value: Any = None, ready: bool = True) -> None:
        self.value, self.ready = value, ready


#: Answers of an actor, by the name of the method.
Script = dict[str, Callable[..., Any]]


class Handle:
    def __init__(self, script: Script, calls: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._script, self._calls = script, calls

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Ref:
            self._calls.append((name, given))
            found = self._script.get(name, lambda *_: None)(*given)
            return found if isinstance(found, Ref) else Ref(found)

        return SimpleNamespace(remote=remote)


class ScriptedRay(ModuleType):
    """In the place of ``ray``. ``actors`` are hired from the first on; ``calls`` are what they were told."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.actors: list[Script] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def remote(self, kind: type) -> Any:
        hired = SimpleNamespace(remote=lambda *_: Handle(self.actors.pop(0), self.calls))
        return SimpleNamespace(options=lambda **_: hired)

    def wait(
        self, refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        self.calls.append(("wait", tuple(refs)))
        ready = [ref for ref in refs if ref.ready][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: Handle) -> None:
        self.calls.append(("kill", (actor,)))


def installed(monkeypatch: pytest.MonkeyPatch) -> ScriptedRay:
    ray, exceptions = ScriptedRay(), ModuleType("ray.exceptions")
    for kind in (RayError, RayTaskError, RayActorError, ActorUnavailableError, OutOfMemoryError):
        setattr(exceptions, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    return ray


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ScriptedRay:
    return installed(monkeypatch)


class Anywhere:
    """In the place of :class:`liubai.cluster.placement.Places`."""

    def __init__(self, size: int, *_: Any) -> None:
        self.size, self.given_back = size, 0

    def options(self, place: int) -> dict[str, Any]:
        return {}

    def give_back(self) -> None:
        self.given_back += 1
