"""Judges and beams of a model's process: they say and find what they would in this one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from hosting import QUESTION, SLOTS, WAITING, ask, assert_close
from hosting import folders as folders  # a fixture
from hosting import host as host  # a fixture
from hosting import long as long  # a fixture
from hosting import loop as loop  # a fixture
from hosting import offline as offline  # a fixture

from liubai.errors import UserError
from liubai.model.checkpoint import load
from liubai.problems import FAMILIES
from liubai.problems.family import CAREFUL, Audited, Habits
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request
from liubai.rollout.paths import PathsConfig
from liubai.rollout.writer import Judge
from liubai.seeds import stream
from liubai.serve.host import Host
from liubai.stages import by_paths
from liubai.stages.by_paths import settled
from liubai.stages.scoring import Preference, problem_of
from liubai.stages.scoring import Process as ProcessModel
from liubai.types import Problem, Sample


def test_judges_say_what_they_say_in_this_process(
    host: Host, loop: asyncio.Runner, folders: dict[str, Path], long: list[Request]
) -> None:
    problem = problem_of(QUESTION)
    hasty = Habits(blind=0.0, stop=0.6)
    thoughts = [FAMILIES["make"].document(problem, stream(i, "t"), hasty) for i in range(11)]
    answers = [(QUESTION, thought) for thought in thoughts]
    pairs = [(problem, thought) for thought in thoughts]
    device = torch.device("cpu")

    async def story() -> tuple[list[float], list[float]]:
        busy = asyncio.create_task(host.write(long[0]))  # they go on beside the writing
        found = await asyncio.gather(host.judge("preference", answers), host.judge("process", answers))
        assert not busy.done()
        busy.cancel()
        assert await host.judge("process", []) == []
        return found[0], found[1]

    liked, checked = loop.run(story())
    assert len(set(liked)) > 1
    assert len(set(checked)) > 1
    assert liked == pytest.approx(Preference(folders["preference"], device)(pairs), abs=1e-4)
    assert checked == pytest.approx(ProcessModel(folders["process"], device)(pairs), abs=1e-4)
    assert host.judges() == {"preference", "process"}
    # more than the socket takes at once; a thought is nothing to a reward model
    thought = "1 " * 500_000
    (same,) = loop.run(host.judge("preference", [(QUESTION, f"{thought}</think> <answer> 7 </answer>")]))
    (wanted,) = loop.run(host.judge("preference", [(QUESTION, "</think> <answer> 7 </answer>")]))
    assert same == pytest.approx(wanted, abs=1e-5)


def test_the_process_model_judges_only_where_it_finds_steps(
    host: Host, loop: asyncio.Runner, folders: dict[str, Path]
) -> None:
    """Where it can find none all answers would have the same score, and the best of them be any."""
    assert host._process is not None
    pid, france = host._process.pid, "What is the capital of France?"
    told = "so it is </think> <answer> 7 </answer>"
    with pytest.raises(UserError, match=r"finds no steps .* let a reward model judge"):
        loop.run(host.judge("process", [(france, told), (france, "")]))
    (liked,) = loop.run(host.judge("preference", [(france, told)]))
    (wanted,) = Preference(folders["preference"], torch.device("cpu"))([(problem_of(france), told)])
    assert liked == pytest.approx(wanted, abs=1e-5)
    # a thought without a step, of a question that has some, has not shown any that is right
    assert loop.run(host.judge("process", [(QUESTION, "</think> <answer> 7 </answer>")])) == [0.0]
    assert (host._process.pid, host.figures().restarts) == (pid, 0)


@pytest.mark.parametrize(
    ("asked", "judges", "question", "settled_as"),
    [
        ("best:4", ("preference", "process"), QUESTION, "best:4"),
        ("best:4", ("preference", "process"), "hello", "best:4:preference"),
        ("best:4", ("process",), "hello", None),
        ("best:4", ("preference",), "hello", "best:4"),
        ("best:4", (), "hello", "best:4"),  # which is refused elsewhere
        ("best:4:process", ("preference", "process"), "hello", None),
        ("best:4:process", ("preference", "process"), QUESTION, "best:4:process"),
        ("best:4:preference", ("preference", "process"), "hello", "best:4:preference"),
        ("tree:8", ("process",), QUESTION, "tree:8"),
        ("tree:8", ("process",), "hello", "tree:8:rollouts"),
        ("tree:8", (), "hello", "tree:8"),
        ("tree:8:rollouts", ("process",), "hello", "tree:8:rollouts"),
        ("tree:8:process", ("process",), "hello", None),
        ("vote:3", ("process",), "hello", "vote:3"),
    ],
)
def test_who_judges_where_nobody_said(
    asked: str, judges: tuple[Judge, ...], question: str, settled_as: str | None
) -> None:
    config = PathsConfig.parse(asked)
    if settled_as is None:
        with pytest.raises(UserError, match="finds no steps"):
            settled(config, judges, question)
    else:
        assert settled(config, judges, question).name == settled_as


def test_judges_of_known_problems_are_asked_about_these() -> None:
    """A family says whether its steps can be found."""
    made = [
        Problem("3.11 or 3.8", "3.8", "number", "greater", "en"),
        Problem("please greet ben", "", "", "errand"),
    ]
    read: list[Problem] = []

    class Spy:
        def __init__(self, folder: Path, device: torch.device) -> None:
            assert folder == Path("p")

        def __call__(self, answers: list[tuple[Problem, str]]) -> list[float]:
            read.extend(problem for problem, _ in answers)
            return [float(len(response)) for _, response in answers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_paths, "Process", Spy)
        judging = by_paths.judges_of({"process": Path("p")}, made, torch.device("cpu"))["process"]
    assert judging([(made[0].prompt, "a"), (made[0].prompt, "bc")]) == [1.0, 2.0]
    assert read == [made[0], made[0]]
    with pytest.raises(UserError, match="finds no steps"):
        judging([(made[0].prompt, "a"), (made[1].prompt, "b")])


def test_beams_are_those_of_beam_search(
    host: Host, loop: asyncio.Runner, folders: dict[str, Path], long: list[Request]
) -> None:
    model, tokenizer = load(folders["model"])
    widths = (1, 2, 3, 4, 2, 2)  # of which one goes on at a time
    requests = [ask(i, max_tokens=12 + i) for i in range(len(widths))]

    async def story() -> list[list[Sample]]:
        with host.admit(15) as writer:
            busy = asyncio.create_task(writer.write(long[0]))
            given_up = asyncio.create_task(writer.beams(long[1], 3))
            both = [writer.beams(r, width) for r, width in zip(requests, widths, strict=True)]
            found = await asyncio.gather(*both)
            assert not busy.done()
            for task in (busy, given_up):
                task.cancel()
            for width in (0, SLOTS + WAITING + 1):
                with pytest.raises(ValueError, match="between 1 and 16"):
                    await writer.beams(ask(1), width)
        return found

    for request, width, found in zip(requests, widths, loop.run(story()), strict=True):
        search = BeamSearch(model, request, width, eos_ids=tokenizer.eos_ids)
        while search.step():
            pass
        wanted = search.best()
        assert len(found) == len(wanted) == width
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if isinstance(f, Audited)])
def test_a_question_finds_the_family_that_checks_its_steps(name: str) -> None:
    family = FAMILIES[name]
    assert isinstance(family, Audited)
    for i in range(30):
        rng = stream(i, name)
        problem = family.sample(rng)
        thought = family.document(problem, rng, CAREFUL).partition("</think>")[0].removeprefix("<think>")
        found = problem_of(problem.prompt)
        assert found.family == name
        assert family.steps(found, thought) == family.steps(problem, thought)
    assert problem_of("What is the capital of France?").family == ""
    assert problem_of("").family == ""
