"""What runs in the processes of a cluster, without Ray: an actor's loop, weights on their way, the crew."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from scripted_ray import (
    ActorUnavailableError,
    Anywhere,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    Ref,
    ScriptedRay,
)
from scripted_ray import ray as ray  # a fixture

from liubai.cluster.actors import (
    UNSURE,
    Build,
    EngineBuild,
    RayCrew,
    RolloutActor,
    packed,
    releases,
    unpacked,
    why_lost,
)
from liubai.cluster.crew import Lost, Report, Written
from liubai.errors import UserError
from liubai.rollout.engine import Partial, Request, generate
from liubai.rollout.engines import EngineConfig, engine_for
from liubai.rollout.torch_engine import TorchEngine
from liubai.types import Sample, Span

MODEL = tiny_model(3)


def requests_of(groups: int, samples: int = 3, first: int = 0) -> list[Request]:
    return [
        Request(id=g * samples + j, prompt_ids=(5, 6 + g, 7), max_tokens=30, seed=1000 * g + j)
        for g in range(first, first + groups)
        for j in range(samples)
    ]


def fresh(place: int = 0, stack: ExitStack | None = None) -> TorchEngine:
    return TorchEngine(tiny_model(4), eos_ids=[1], slots=4, max_length=64)


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    return tiny_model(seed).state_dict()


def alone(requests: Sequence[Request], seed: int = 3, version: int = 0) -> list[Sample]:
    engine = fresh()
    engine.load(weights_of(seed), version)
    return generate(engine, requests)


async def opened(build: Build = fresh) -> RolloutActor:
    actor = RolloutActor()
    await actor.open(build, 0, 1, releases())
    return actor


async def heard(actor: RolloutActor, count: int) -> list[Written]:
    found: list[Written] = []
    while len(found) < count:
        report = await actor.hear(0)
        assert report.place == 0
        found += report.answers
    return found


def samples(found: Sequence[Written], requests: Sequence[Request]) -> list[Sample]:
    by_id = {one.id: one for one in found}
    assert len(by_id) == len(found)
    return [by_id[r.id].sample(r.prompt_ids) for r in requests]


def partials(requests: Sequence[Request]) -> list[Partial]:
    return [Partial(request) for request in requests]


def go(test: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(whole())


def test_an_actor_writes_what_its_engine_would() -> None:
    """To the last bit, whatever it wrote before: the lot decides."""
    asked, before = requests_of(4), requests_of(3, first=9)

    async def test() -> None:
        actor = await opened()
        await actor.load(packed(weights_of(3)), 0, None)
        await actor.write(7, partials(before), 0)
        await heard(actor, len(before))
        await actor.write(8, partials(asked), 0)
        found = await heard(actor, len(asked))
        assert {one.lot for one in found} == {8}
        assert samples(found, asked) == alone(asked)

    go(test)


def test_messages_may_overtake_each_other() -> None:
    asked = requests_of(2)

    async def test() -> None:
        actor = RolloutActor()
        early = [
            asyncio.create_task(actor.write(0, partials(asked), 5)),
            asyncio.create_task(actor.load(packed(weights_of(9)), 5, None)),
            asyncio.create_task(actor.cancel(0, [99])),
        ]
        for _ in range(5):
            await asyncio.sleep(0)
        await actor.open(fresh, 0, 1, releases())
        await asyncio.gather(*early)
        await actor.load(packed(weights_of(3)), 4, None)  # older than what is there
        found = await heard(actor, len(asked))
        assert samples(found, asked) == alone(asked, seed=9, version=5)

    go(test)


def test_answers_go_on_under_newer_weights_unless_they_are_too_old() -> None:
    asked = requests_of(1, samples=4)

    async def spans(oldest: int | None) -> tuple[list[Sample], int]:
        actor = await opened()
        await actor.load(packed(weights_of(3)), 0, None)
        await actor.write(0, partials(asked), 0)
        for _ in range(12):
            await asyncio.sleep(0)
        assert actor.engine.pending == 4
        await actor.load(packed(weights_of(9)), 1, oldest)
        again, found = 0, list[Written]()
        while len(found) < 4:
            report = await actor.hear(0)
            again += report.begun_again
            found += report.answers
        return samples(found, asked), again

    async def test() -> None:
        kept, again = await spans(0)
        assert again == 0
        assert all([span.version for span in s.versions] == [0, 1] for s in kept)
        new, again = await spans(1)
        assert again == 4
        assert new == alone(asked, seed=9, version=1)

    go(test)


def test_a_request_is_withdrawn_from_its_own_lot_alone() -> None:
    asked = requests_of(1)

    async def test() -> None:
        actor = await opened()
        await actor.load(packed(weights_of(3)), 0, None)
        await actor.write(3, partials(asked), 0)
        await actor.cancel(2, [0, 1, 2])  # of another lot, and late
        await actor.cancel(3, [1])
        found = await heard(actor, 2)
        assert sorted(one.id for one in found) == [0, 2]
        assert actor.engine.pending == 0
        # asked for again while it is still being written: the new lot has it
        await actor.write(4, partials(asked), 0)
        await actor.write(5, partials(asked[:1]), 0)
        again = {one.id: one.lot for one in await heard(actor, 3)}
        assert again == {0: 5, 1: 4, 2: 4}

    go(test)


def test_begun_answers_keep_what_they_said() -> None:
    (request,) = requests_of(1, samples=1)
    (whole,) = alone([request])
    half = Partial(request, whole.completion_ids[:4], whole.logprobs[:4], (Span(0, 4),))

    async def test() -> None:
        actor = await opened()
        await actor.load(packed(weights_of(3)), 1, None)
        await actor.write(0, [half], 1)
        (found,) = samples(await heard(actor, 1), [request])
        assert found.completion_ids == whole.completion_ids
        assert found.versions == (Span(0, 4), Span(1, len(whole.completion_ids) - 4))

    go(test)


def test_what_goes_wrong_is_said_when_news_are_asked_for() -> None:
    def refuses(place: int, stack: ExitStack) -> Any:
        raise UserError("there is no such engine")

    def broken(ids: Any) -> Any:
        raise RuntimeError("no answer can be withdrawn")

    async def test() -> None:
        actor = await opened()
        await actor.load({"no": ("float32", (1,), packed({"x": torch.zeros(1)})["x"][2])}, 0, None)
        with pytest.raises(ValueError, match="another shape"):
            await actor.hear(0)
        with pytest.raises(UserError, match="no such engine"):
            await opened(refuses)
        with pytest.raises(UserError, match=r"same releases: here liubai 0\.0 with torch 1, there liubai"):
            await RolloutActor().open(fresh, 0, 1, "liubai 0.0 with torch 1")
        actor = await opened()
        actor.engine.cancel = broken  # type: ignore[method-assign]
        await actor.cancel(0, [1])
        with pytest.raises(RuntimeError, match="no answer can be withdrawn"):
            await actor.hear(0)

    go(test)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_as_they_were(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(7, 5, generator=generator).to(dtype)
    weights = {
        "a": torch.randn(3, 4, generator=generator).to(dtype),
        "turned": torch.randn(3, 4, generator=generator).to(dtype).T,
        "scalar": torch.tensor(2.0, dtype=dtype),
        "embedding": embedding,
        "head": embedding,
        "learns": torch.nn.Parameter(torch.ones(2, dtype=dtype)),
        "square": (square := torch.randn(3, 3, generator=generator).to(dtype)),
        "square, turned": square.T,
    }
    away = packed(weights)
    assert away["embedding"][2] is away["head"][2]  # tied weights travel once
    back = unpacked(away)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)


def test_of_rays_messages_the_telling_part_is_kept() -> None:
    page = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RolloutActor\n\tpid: 7\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    )
    assert why_lost(RuntimeError(page)) == "its worker process has died"
    assert why_lost(RuntimeError("Something else. And more")) == "Something else"
    assert why_lost(RuntimeError("")) == "RuntimeError"


# ---- the crew on Ray ----


def crew_of(ray: ScriptedRay, *actors: dict[str, Any]) -> RayCrew:
    """Each has come up, with its place as its process id."""
    ray.actors = [{"open": lambda build, place, threads, release: place} | actor for actor in actors]
    crew = RayCrew(fresh, Anywhere(len(actors)), 1)  # type: ignore[arg-type]
    for place in range(len(actors)):
        crew.start(place)
    assert crew.hear(1) == [Report(place) for place in range(len(actors))]
    return crew


@pytest.mark.parametrize("kind", [OutOfMemoryError, RayActorError, RayError])
def test_an_actor_that_ray_has_lost_is_lost(kind: type[Exception], ray: ScriptedRay) -> None:
    """However: its process died, was killed for the memory of the node, or has no place any more."""
    gone = kind("Task was killed due to the node running low on memory. And a page")
    crew = crew_of(ray, {"hear": lambda *_: gone}, {"hear": lambda place: Report(place, begun_again=1)})
    why = "Task was killed due to the node running low on memory"
    assert crew.hear(1) == [Lost(0, why), Report(1, begun_again=1)]
    assert crew.pids == {1: 1}


@pytest.mark.parametrize("fate", [RayActorError("its node has died"), None, "never"])
def test_an_actor_out_of_reach_is_lost_at_once_and_replaced_when_it_is_known_to_be_gone(
    fate: Exception | str | None, ray: ScriptedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would put the next one on the same node, until it has found out that there is none."""
    away = ActorUnavailableError("The actor x is unavailable: The actor is temporarily unavailable: RpcError")
    said = iter([away, away, away if fate == "never" else fate or Report(0)])
    crew = crew_of(ray, {"hear": lambda *_: next(said, away)})
    assert crew.hear(1) == [Lost(0, "it cannot be reached")]
    assert crew.pids == {}
    assert not crew.vacant(0)
    assert crew.hear(1) == []
    assert not crew.vacant(0)
    assert crew.hear(1) == []
    assert crew.vacant(0) is (fate != "never")
    later = time.monotonic() + UNSURE
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert crew.vacant(0)
    ray.actors = [{"open": lambda build, place, threads, release: 7}]
    crew.start(0)
    assert crew.hear(1) == [Report(0)]
    assert crew.pids == {0: 7}


@pytest.mark.parametrize("message", ["load", "write", "cancel"])
@pytest.mark.parametrize(
    "error", [RayError("the object is lost"), RayTaskError(RayError("the object is lost"))]
)
def test_an_actor_that_a_message_did_not_reach_is_lost(
    message: str, error: Exception, ray: ScriptedRay
) -> None:
    """It would wait for weights that never come, and say every few seconds that it lives."""
    crew = crew_of(ray, {message: lambda *_: error, "hear": lambda *_: Ref(ready=False)})
    crew.load(0, None, 3, None)
    crew.write(0, 0, [], 3)
    crew.cancel(0, 0, [])
    news = crew.hear(1)
    assert news == [Lost(0, "the object is lost")]
    assert crew.hear(1) == []
    assert crew.pids == {}


def test_that_messages_were_read_is_no_news(ray: ScriptedRay) -> None:
    crew = crew_of(ray, {"hear": lambda place: Report(place, begun_again=1)})
    crew.load(0, None, 3, None)
    crew.write(0, 0, [], 3)
    assert crew.hear(1) == [Report(0, begun_again=1)]


def test_what_an_actor_itself_raises_is_no_loss(ray: ScriptedRay) -> None:
    crew = crew_of(ray, {"hear": lambda *_: RayTaskError(UserError("no such engine"))})
    with pytest.raises(UserError, match="no such engine"):
        crew.hear(1)


def test_actors_may_clear_up_before_they_are_ended(ray: ScriptedRay) -> None:
    crew = crew_of(ray, {}, {"hear": lambda *_: RayActorError("gone")})
    crew.hear(1)  # the second one is down
    ray.calls.clear()
    crew.close()
    assert [name for name, _ in ray.calls] == ["close", "wait", "kill", "kill"]
    assert crew._places.given_back == 1  # type: ignore[attr-defined]


def test_of_an_actors_weights_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[tuple[Path, str]] = []

    def engine_for(config: EngineConfig, model: Any, *, folder: Path, **_: Any) -> TorchEngine:
        assert not folder.exists()  # what an actor before it has left is gone
        (folder / "step-000001").mkdir(parents=True)
        made.append((folder, config.folder))
        return fresh()

    monkeypatch.setattr("liubai.cluster.actors.engine_for", engine_for)

    def build(stage: str, shared: str = "") -> EngineBuild:
        return EngineBuild(
            config=EngineConfig(kind="vllm", folder=shared),
            model=MODEL.config,
            dtype=torch.float32,
            device="cpu",
            parent=tmp_path,
            folder=Path(stage),
            eos_ids=(1,),
            slots=4,
            max_length=64,
        )

    async def test() -> None:
        one, other = RolloutActor(), RolloutActor()
        await one.open(build("run/2-zero"), 0, 1, releases())  # … and is killed
        await other.open(build("run/2-zero"), 0, 1, releases())
        await RolloutActor().open(build("run/2-zero"), 1, 1, releases())
        await RolloutActor().open(build("run/3-more"), 0, 1, releases())
        await RolloutActor().open(build("run/3-more", str(tmp_path / "shared")), 0, 1, releases())
        await other.close()

    go(test)
    folders = [folder for folder, _ in made]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4
    assert folders[4].parent == tmp_path / "shared"
    assert {folder.parent for folder in folders[:4]} == {tmp_path}
    assert {shared for _, shared in made} == {""}  # each has its own
    assert [folder.exists() for folder in folders] == [False, False, True, True, True]


def test_two_runs_of_the_same_path_share_no_actors_weights(tmp_path: Path) -> None:
    """On two machines, say, that see one folder for weights or use one cluster."""
    got: list[Path] = []

    def engine_of(config: EngineConfig, model: Any, *, folder: Path, **_: Any) -> SimpleNamespace:
        got.append(folder)
        return SimpleNamespace(close=lambda: None)

    def begun(machine: str, stack: ExitStack) -> None:
        engine_for(
            EngineConfig(kind="vllm", folder=str(tmp_path / "shared")),
            MODEL,
            parent=tmp_path,
            eos_ids=(1,),
            slots=4,
            max_length=64,
            folder=tmp_path / machine / "run" / "2-zero" / "weights",
            stack=stack,
            cluster=SimpleNamespace(engine_for=engine_of),  # type: ignore[arg-type]
        )

    with ExitStack() as ended:
        begun("one", ExitStack())  # and is killed
        begun("one", ended)
        begun("other", ended)
    assert got[0] == got[1] != got[2]  # who goes on finds what was left
    assert {folder.parent for folder in got} == {tmp_path / "shared"}
    with ExitStack() as later:
        begun("one", later)
    assert got[3] not in got[:3]
