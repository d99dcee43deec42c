"""A server that writes for several ranks, as a user starts them: the first rank asks it, all learn from
what it says, and all end when the canary stops the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import REPOSITORY, start
from scripted_vllm import Script, serving
from test_ranks import cli, waited
from test_smoke import without_times

from liubai.model.checkpoint import load

RECIPE = """
seed = 3
threads = 1
[stages.zero]
kind = "rl"
model = "MODEL"
steps = 3
groups = 3
samples = 4
max_tokens = 16
slots = 8
lr = 0.003
inflight = INFLIGHT
eval_problems = 2
eval_samples = 1
[stages.zero.rewards]
overlong = -0.5
overlong_from = 0.0
[stages.zero.engine]
kind = "server"
url = "URL"
timeout = 60
"""


def recipe(base: Path, url: str, path: Path, inflight: bool = False) -> Path:
    text = RECIPE.replace("MODEL", str(base / "checkpoint")).replace("URL", url)
    path.write_text(text.replace("INFLIGHT", str(inflight).lower()))
    return path


#: the model comes together layer by layer
LAYERED = """
import sys
from liubai import cli
from liubai.learn import sharded
sharded.ROOM = 0
sys.exit(cli.main())
"""


@pytest.mark.parametrize("layered", [False, True])
def test_ranks_learn_from_a_server_what_one_process_does(layered: bool, base: Path, tmp_path: Path) -> None:
    """It writes the evaluations, too, with the weights of the step that they follow."""
    model, _ = load(base / "checkpoint")
    with serving(Script(model, max_model_len=4096)) as (program, url):
        tiny = recipe(base, url, tmp_path / "tiny.toml")
        done = subprocess.run(
            [sys.executable, *cli(tiny, tmp_path / "alone")], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        reloads = [program.calls.count("/collective_rpc")]
        command = cli(tiny, tmp_path / "together")
        ends = waited(start(["-c", LAYERED, *command[2:]] if layered else command, 2))
        assert [code for code, _ in ends] == [0, 0], ends
        reloads.append(program.calls.count("/collective_rpc"))
    assert reloads == [4, 8]  # the weights are sent once a step and once at the end, however many learn
    alone, together = (
        without_times(tmp_path / run / "1-zero/metrics.jsonl") for run in ("alone", "together")
    )
    assert len(alone) == len(together) == 4
    for mine, theirs in zip(together, alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    for row in together[1:]:
        assert row["logprob_gap/canary"] < 1e-5
        assert row["grad_norm"] > 0
    said = [(tmp_path / run / "1-zero/samples.jsonl").read_text() for run in ("alone", "together")]
    assert said[0] == said[1]
    assert not (tmp_path / "together/1-zero/weights").exists()


def test_ranks_that_compute_in_16_bits_are_compared_by_their_bound(base: Path, tmp_path: Path) -> None:
    """Their parts are in 32."""
    model, _ = load(base / "checkpoint")
    with serving(Script(model, max_model_len=4096)) as (_, url):
        tiny = recipe(base, url, tmp_path / "tiny.toml")
        ends = waited(start([*cli(tiny, tmp_path / "run"), "--set", "zero.precision=bfloat16"], 2))
        assert [code for code, _ in ends] == [0, 0], ends
    rows = [json.loads(line) for line in (tmp_path / "run/1-zero/metrics.jsonl").read_text().splitlines()]
    assert all(1e-3 < row["logprob_gap/canary"] < 0.1 for row in rows[1:])


@pytest.mark.parametrize("inflight", [False, True])
def test_all_ranks_end_when_weights_do_not_arrive(inflight: bool, base: Path, tmp_path: Path) -> None:
    model, _ = load(base / "checkpoint")
    with serving(Script(model, max_model_len=4096, deaf=True)) as (program, url):
        tiny = recipe(base, url, tmp_path / "tiny.toml", inflight)
        (first, said), (second, other) = waited(start(cli(tiny, tmp_path / "run"), 2))
        with program.changed:
            assert program.changed.wait_for(lambda: not program.writing, timeout=30)
    assert (first, second) == (2, 2), said + other
    assert "did not reach the engine" in said
    assert "liubai (rank 1): " in other
    assert "Traceback" not in said + other
    rows = [json.loads(line) for line in (tmp_path / "run/1-zero/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2  # the second step was not begun
