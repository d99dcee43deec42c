"""Runs on several processes as a user starts them: the numbers of one process, kills, and what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rank_processes import REPOSITORY, environment, free_port, start
from safetensors.torch import load_file
from test_smoke import lines, without_times

from liubai import ranks
from liubai.errors import UserError
from liubai.stages.rollouts import Rollouts
from liubai.stages.sft import careful
from liubai.stages.together import Shared

RECIPE = """
name = "tiny"
seed = 3
threads = 1
[stages.base]
kind = "pretrain"
steps = 12
tokens_per_step = 512
save_every = 3
[stages.base.model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
[stages.taught]
kind = "sft"
from = "base"
epochs = 2.0
batch = 8
save_every = 3
texts = {path = "texts.jsonl"}
[stages.zero]
kind = "rl"
from = "taught"
steps = 4
groups = 3
samples = 4
max_tokens = 40
slots = 8
eval_every = 2
eval_problems = 5
eval_samples = 2
save_every = 1
refills = 1
reference_every = 2
[stages.zero.loss]
aggregation = "token-mean"
kl = 0.01
[stages.eval]
kind = "eval"
from = "zero"
limit = 5
samples = 2
max_tokens = 40
[stages.voted]
kind = "eval"
from = "zero"
limit = 2
samples = 1
max_tokens = 24
paths = "vote:2"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    rows = [{"prompt": e.prompt, "text": f"<think> {e.response}"} for e in careful({"countdown": 1.0}, 30, 0)]
    (path.parent / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cli(recipe: Path, out: Path) -> list[str]:
    return ["-m", "liubai.cli", "run", str(recipe), "--out", str(out)]


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run([sys.executable, *cli(recipe, out)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def together(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """By torchrun; the run and what was printed."""
    out = tmp_path_factory.mktemp("together") / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, *cli(recipe, out)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


STAGES = ("1-base", "2-taught", "3-zero", "4-eval")


def test_a_recipe_on_two_processes_has_the_numbers_of_one(alone: Path, together: tuple[Path, str]) -> None:
    out, _ = together
    for stage in STAGES:
        ours, theirs = (without_times(run / stage / "metrics.jsonl") for run in (out, alone))
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(yours, rel=1e-5, abs=1e-5), stage
    samples = [(run / "3-zero" / "samples.jsonl").read_bytes() for run in (out, alone)]
    assert samples[0] == samples[1]
    for file in ("4-eval/scores.json", "5-voted/scores.json"):
        assert (out / file).read_bytes() == (alone / file).read_bytes()


def test_what_ranks_leave_is_a_hugging_face_folder(alone: Path, together: tuple[Path, str]) -> None:
    for stage in STAGES[:3]:
        ours, theirs = (
            load_file(run / stage / "checkpoint" / "model.safetensors") for run in (together[0], alone)
        )
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
        assert max(float((t - theirs[n]).abs().max()) for n, t in ours.items()) < 1e-4
        names = [
            sorted(p.name for p in (run / stage / "checkpoint").iterdir()) for run in (together[0], alone)
        ]
        assert names[0] == names[1]
        assert not (together[0] / stage / "state").exists()


def test_one_of_them_speaks(together: tuple[Path, str]) -> None:
    out, said = together
    assert said.count("base: pretrain, 12 steps") == 1
    assert said.count("report: ") == 1
    assert json.loads((out / "environment.json").read_text())["ranks"] == 2


# ---- what happens to processes ----


def waited(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        said = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def until(processes: Sequence[subprocess.Popen[str]], run: Path, count: int) -> None:
    while lines(run) < count:
        assert all(p.poll() is None for p in processes), waited(processes)
        time.sleep(0.005)


def test_killed_processes_go_on_where_they_were(
    recipe: Path, together: tuple[Path, str], tmp_path: Path
) -> None:
    """A rank that is gone ends the others with a sentence; the same command goes on, to the same bits."""
    out = tmp_path / "run"
    for victim, after in ((1, 5), (0, 16), (1, 23)):
        processes = start(cli(recipe, out), 2)
        until(processes, out, after)
        os.kill(processes[victim].pid, signal.SIGKILL)
        ends = waited(processes)
        code, said = ends[1 - victim]
        assert code == 2, said
        assert "another process of this run has ended" in said
        assert "for more than 30 minutes (LIUBAI_RANK_TIMEOUT_MINUTES)" in said
        assert "Heard here: " in said
        assert "Traceback" not in said
    done = waited(start(cli(recipe, out), 2))
    assert [code for code, _ in done] == [0, 0], done
    for stage in STAGES:
        log = f"{stage}/metrics.jsonl"
        assert without_times(out / log) == without_times(together[0] / log)
    weights = "3-zero/checkpoint/model.safetensors"
    assert (out / weights).read_bytes() == (together[0] / weights).read_bytes()


def test_one_process_goes_on_from_where_two_were(recipe: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(cli(recipe, out), 2)
    until(processes, out, 23)
    for p in processes:
        p.kill()
    waited(processes)
    done = subprocess.run([sys.executable, *cli(recipe, out)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        ours, theirs = (without_times(run / stage / "metrics.jsonl") for run in (out, alone))
        for mine, yours in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(yours, rel=1e-5, abs=1e-5)


def test_a_mistake_is_said_and_ends_all(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not a run")
    (first, said), (second, other) = waited(start(cli(recipe, tmp_path), 2))
    assert (first, second) == (2, 2)
    assert "is not empty and not a run of liubai" in said
    assert "liubai (rank 1): " in other
    assert "Traceback" not in said + other
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_processes_that_do_not_find_each_other(recipe: Path, tmp_path: Path) -> None:
    """One of two, in vain."""
    process = subprocess.Popen(
        [sys.executable, *cli(recipe, tmp_path / "run")],
        env=environment(0, 2, free_port()) | {"LIUBAI_RANK_TIMEOUT_MINUTES": "0.02"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ((code, said),) = waited([process])
    assert code == 2, said
    assert "did not find each other" in said
    assert "Traceback" not in said


def test_a_wrong_number_of_minutes_is_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for minutes in ("soon", "0", "nan", "inf"):
        monkeypatch.setenv("LIUBAI_RANK_TIMEOUT_MINUTES", minutes)
        with pytest.raises(UserError, match=f"is a number of minutes, such as 30, and not '{minutes}'"):
            ranks._patience()
    process = subprocess.run(
        [sys.executable, *cli(recipe, tmp_path / "run")],
        env=environment(0, 2, free_port()) | {"LIUBAI_RANK_TIMEOUT_MINUTES": "soon"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "LIUBAI_RANK_TIMEOUT_MINUTES is a number of minutes" in process.stderr
    assert "Traceback" not in process.stderr


def test_two_ranks_on_one_gpu_are_told_apart() -> None:
    ranks._require_own_gpus([("here", "GPU-1"), ("here", "GPU-2"), ("there", "GPU-1")])
    with pytest.raises(UserError, match="ranks 1 and 2 are on the same GPU of here; start as many processes"):
        ranks._require_own_gpus([("here", "GPU-1"), ("here", "GPU-2"), ("here", "GPU-2")])


# ---- what fails on one rank while the others wait ----

DRY = """
from liubai.learn import sharded
from liubai.model.transformer import Transformer
sharded.ROOM, hidden = 0, Transformer.hidden
def bounded(self, ids, *args):
    if ranks.rank() == 1 and torch.is_grad_enabled() and ids.numel() > 1:
        raise RuntimeError("out of memory")
    return hidden(self, ids, *args)
Transformer.hidden = bounded
"""
REFUSED = """
from liubai.errors import UserError
from liubai.rollout.torch_engine import TorchEngine
load = TorchEngine.load
def refused(self, weights, version):
    if ranks.is_main() and version == 1:
        raise UserError("the weights did not arrive")
    load(self, weights, version)
TorchEngine.load = refused
"""
ELSEWHERE = """
import rank_jobs
rank_jobs.elsewhere().__enter__()
"""
BROKEN = """
from liubai.stages.rollouts import Rollouts
collect = Rollouts.collect
def broken(self, groups):
    if ranks.rank() == 1:
        raise ValueError("a bug of rank 1")
    return collect(self, groups)
Rollouts.collect = broken
"""
NOTICED = "another process of this run has ended"


@pytest.mark.parametrize(
    ("fault", "codes", "said"),
    [
        (DRY, (2, 2), (NOTICED, "memory ran out on rank 1; lower tokens_per_microbatch")),
        (REFUSED, (2, 2), ("liubai: the weights did not arrive", "rank 0: the weights did not arrive")),
        (
            REFUSED + ELSEWHERE,
            (2, 2),
            ("liubai: the weights did not arrive", "rank 0: the weights did not arrive"),
        ),
        (BROKEN, (2, 1), (NOTICED, "ValueError: a bug of rank 1")),
    ],
    ids=["memory in layers", "transfer", "transfer elsewhere", "rollouts"],
)
def test_a_failure_on_one_rank_ends_all(
    fault: str,
    codes: tuple[int, int],
    said: tuple[str, str],
    recipe: Path,
    together: tuple[Path, str],
    tmp_path: Path,
) -> None:
    """At once, and with a sentence everywhere but where a bug is."""
    begin = "import sys, torch\nfrom liubai import cli, ranks\nfrom liubai.stages import policy\n"
    # what comes before them is taken over
    changed = "taught.epochs=1.0" if fault == DRY else "zero.steps=2"
    options = ["--reuse", str(together[0]), "--set", changed]
    program = ["-c", f"{begin}{fault}\nsys.exit(cli.main())"]
    ends = waited(start([*program, *cli(recipe, tmp_path / "run")[2:], *options], 2))
    assert tuple(code for code, _ in ends) == codes, ends
    for (code, heard), words in zip(ends, said, strict=True):
        assert words in heard
        assert ("Traceback" in heard) == (code == 1), heard


# ---- shares ----


class Ranks:
    """Some ranks in one process, one after the other. What they say to each other is the test's to give."""

    def __init__(self, world: int, patch: pytest.MonkeyPatch) -> None:
        self.world, self.patch = world, patch

    def as_rank(self, rank: int) -> None:
        self.patch.setattr(ranks, "_rank", rank)
        self.patch.setattr(ranks, "_world", self.world)


def test_shares_are_dealt_out_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(7))
    for world in (1, 2, 3, 9):
        there = Ranks(world, monkeypatch)
        shares = []
        for rank in range(world):
            there.as_rank(rank)
            shares.append(ranks.own(items))
        assert ranks.dealt(shares) == items


def test_every_rank_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.portion(10_000, 2048) == 2048
    Ranks(4, monkeypatch).as_rank(0)
    assert ranks.portion(10_000, 2048) == 1250
    assert 2048 >> ranks.halvings(10_000, 2048) == 1024
    assert ranks.halvings(100_000, 2048) == 0
    assert ranks.portion(100_000, 2048) == 2048
    assert ranks.portion(0, 2048) == 1


class Idle:
    """An engine whose answers nobody waits for."""

    def submit(self, requests: Any) -> None:
        self.asked = [r.id for r in requests]

    def partials(self) -> list[Any]:
        return []

    def resume(self, partials: Any) -> None: ...


def begun_by(kind: type[Rollouts]) -> Rollouts:
    """What counts problems of it."""
    made: Any = object.__new__(kind)
    made.engine, made.samples = Idle(), 2
    made.next_index, made._missing, made._open, made._ended, made._dropped = 0, [], {}, [], 0
    return made  # type: ignore[no-any-return]


def test_what_ranks_have_begun_is_begun_by_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem is begun once, however far one rank is ahead of the others, and whoever goes on."""
    begun: list[int] = []
    states = []
    three = Ranks(3, monkeypatch)
    for rank, count in enumerate((5, 1, 3)):
        three.as_rank(rank)
        mine = begun_by(Shared)
        begun += [mine._next() for _ in range(count)]
        states.append(Rollouts.state(mine))
    assert sorted(begun) == [0, 1, 2, 3, 5, 6, 8, 9, 12]
    monkeypatch.setattr(ranks, "gather", lambda value: states)
    state = json.loads(json.dumps(begun_by(Shared).state()))
    monkeypatch.undo()
    assert (state["next_index"], state["missing"]) == (13, [4, 7, 10, 11])
    for world in (1, 2, 4):
        there, later = Ranks(world, monkeypatch), []
        for rank in range(world):
            there.as_rank(rank)
            mine = begun_by(Shared if world > 1 else Rollouts)
            mine.restore(state)
            later += [mine._next() for _ in range(20)]
        assert len(set(later)) == len(later)
        assert not set(later) & set(begun)
        assert set(range(20)) <= set(later) | set(begun)
        monkeypatch.undo()
