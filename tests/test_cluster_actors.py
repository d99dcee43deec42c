"""What runs in the processes of a cluster, without Ray: an actor's loop, weights on their way, graders."""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scripted_ray
import torch
from conftest import tiny_model
from scripted_ray import Anywhere, OutOfMemoryError, RayActorError, RayError, RayTaskError, ScriptedRay

from liubai.cluster.actors import (
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
from liubai.cluster.graders import LOSSES, GraderLost, RayGrader, RemoteGraders
from liubai.errors import UserError
from liubai.grade import GradeItem, Verdict, grade
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


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ScriptedRay:
    return scripted_ray.installed(monkeypatch)


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


# ---- graders ----


class Scripted:
    """Grades as it should, and is lost with a chance of ``die``."""

    def __init__(self, die: float, seed: int) -> None:
        self.die, self.rng, self.ended = die, random.Random(seed), False

    def wait(self, closed: Callable[[], bool]) -> None:
        if self.rng.random() < self.die / 2:
            raise GraderLost("it never came up")

    def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
        assert not self.ended
        if self.rng.random() < self.die:
            self.ended = True
            raise GraderLost("its node is gone")
        return [grade(GradeItem("exact", i.gold, i.response, i.meta)) for i in items]

    def end(self) -> None:
        self.ended = True


class Mortal(Scripted):
    """Comes up each time."""

    def wait(self, closed: Callable[[], bool]) -> None: ...


def items_of(count: int, verifier: str) -> list[GradeItem]:
    return [GradeItem(verifier, str(i), f"<think></think><answer>{i - i % 2}</answer>") for i in range(count)]


@pytest.fixture
def checker(tmp_path: Any) -> str:
    """Never called: it only has to be there."""
    (tmp_path / "checker.py").write_text("def check(gold, answer, meta): return False\n")
    return f"{tmp_path}/checker.py:check"


@pytest.mark.parametrize("die", [0.0, 0.15])
def test_every_verdict_comes_once_whoever_is_lost(
    die: float, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)
    seeds = iter(range(1000))
    hired: list[int] = []
    lock = threading.Lock()

    def hire(place: int) -> Scripted:
        with lock:
            hired.append(place)
            return Scripted(die, next(seeds))

    closed: list[bool] = []
    with RemoteGraders(hire, 3, 5.0, lambda: closed.append(True)) as pool:
        tickets = pool.submit(items_of(900, checker))
        verdicts = pool.gather(tickets)
        assert [v.correct for v in verdicts] == [i % 2 == 0 for i in range(900)]
        assert pool.errors == 0
        assert pool.lost >= len(hired) - 3
        assert (pool.lost > 0) == (die > 0)
        assert pool.poll() == {}
        # bounded ones are graded at once, by nobody else
        before = len(hired)
        assert [v.correct for v in pool.gather(pool.submit(items_of(2, "exact")))] == [True, False]
        assert len(hired) == before
    assert closed == [True]


def test_answers_that_cost_one_grader_after_the_other_are_errors(checker: str) -> None:
    with RemoteGraders(lambda place: Mortal(1.0, 0), 1, 5.0) as pool:
        (verdict,) = pool.gather(pool.submit(items_of(1, checker)))
        pool.close()
        assert verdict.error == f"{LOSSES + 1} graders were lost: its node is gone"
        assert (pool.lost, pool.errors) == (LOSSES + 1, 1)


@pytest.mark.parametrize("good", [0, 1])
def test_where_no_grader_comes_up_others_have_its_work(
    good: int, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)

    class Absent(Scripted):
        def wait(self, closed: Callable[[], bool]) -> None:
            raise GraderLost("no room")

    hire = lambda place: Scripted(0, 0) if place < good else Absent(0, 0)  # noqa: E731
    with RemoteGraders(hire, 3, 5.0) as pool:
        errors = {v.error for v in pool.gather(pool.submit(items_of(100, checker)))}
        assert errors == ({None} if good else {"no grader comes up: no room"})


def test_whatever_a_grader_raises_nobody_waits_for_ever(checker: str) -> None:
    class Broken(Scripted):
        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            raise RuntimeError("no such file there")

    with RemoteGraders(lambda place: Broken(0, 0), 2, 5.0) as pool:
        verdicts = pool.gather(pool.submit(items_of(30, checker)))
        assert {v.error for v in verdicts} == {"no grader could say: no such file there"}
        assert pool.errors == 30


def test_a_grader_that_raised_is_asked_nothing_more(checker: str) -> None:
    hired: list[Scripted] = []

    class Once(Scripted):
        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            if len(hired) == 1:
                raise RuntimeError("its state is unknown")
            return super().grade(items, closed)

    def hire(place: int) -> Scripted:
        hired.append(Once(0, 0))
        return hired[-1]

    with RemoteGraders(hire, 1, 5.0) as pool:
        (first,) = pool.gather(pool.submit(items_of(1, checker)))
        assert first.error == "no grader could say: its state is unknown"
        assert {v.error for v in pool.gather(pool.submit(items_of(30, checker)))} == {None}
    assert [grader.ended for grader in hired] == [True, True]


@pytest.mark.parametrize("where", ["hire", "wait"])
def test_whatever_goes_wrong_in_hiring_another_place_has_its_work(
    where: str, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)
    tried: list[int] = []

    class Broken(Scripted):
        def wait(self, closed: Callable[[], bool]) -> None:
            raise ImportError("no such module there")

        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            raise AssertionError("it has never come up")

    def hire(place: int) -> Scripted:
        if place:
            return Scripted(0, 0)
        tried.append(place)
        if where == "hire":
            raise ValueError("the placement group is gone")
        return Broken(0, 0)

    with RemoteGraders(hire, 2, 5.0) as pool:
        verdicts = pool.gather(pool.submit(items_of(100, checker)))
        assert {v.error for v in verdicts} == {None}
        pool._threads[0].join(10)
        assert len(tried) == LOSSES + 1


def test_a_grader_killed_for_its_memory_costs_no_verdict(
    checker: str, ray: ScriptedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liubai.cluster.graders.PAUSE", 0.0)
    killed = OutOfMemoryError("Task was killed due to the node running low on memory")
    ray.actors = [
        {"here": lambda: killed},
        {"grade": lambda items: killed},
        {"grade": lambda items: Scripted(0, 0).grade(items, bool)},
    ]
    places: Any = Anywhere(1)
    with RemoteGraders(lambda place: RayGrader(5.0, places, place), 1, 5.0) as pool:
        verdicts = pool.gather(pool.submit(items_of(5, checker)))
        assert [v.error for v in verdicts] == [None] * 5
        assert pool.lost == 2


def test_to_close_is_not_to_wait_for_an_answer(checker: str) -> None:
    class Slow(Scripted):
        def grade(self, items: Sequence[GradeItem], closed: Callable[[], bool]) -> list[Verdict]:
            while not closed():
                threading.Event().wait(0.01)
            raise GraderLost("the pool was closed")

    pool = RemoteGraders(lambda place: Slow(0, 0), 1, 5.0)
    tickets = pool.submit(items_of(3, checker))
    pool.close()
    verdicts = pool.gather(tickets)
    assert {v.error for v in verdicts} == {"the grader pool was closed"}
    assert pool.errors == pool.lost == 0
