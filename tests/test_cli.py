"""The command line: quick to start, one line for a user's mistake, a clean way out of everything."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_stage
import typer

import liubai
import liubai.stages
from liubai import cli, ranks
from liubai.commands import stopping

ROOT = Path(liubai.__file__).parent.parent
COMMANDS = tuple(sorted(typer.main.get_command(cli.app).commands))  # type: ignore[attr-defined]
RECIPE = 'name = "toys"\n[stages.base]\nkind = "toy"\nsteps = 4\n'


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(liubai.stages, "KINDS", dict(liubai.stages.KINDS))
    toy_stage.register(liubai.stages.KINDS)
    monkeypatch.setattr("liubai.stages.context.Context._tensorboard", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def spawn(*arguments: str, code: str = "", **options: Any) -> subprocess.Popen[str]:
    """Run a command line in a process of its own."""
    # whoever runs the tests in the background may have told all their children to ignore Ctrl-C
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}\n"
    script += "from liubai.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def mistake(result: SimpleNamespace) -> str:
    """The one line that a user's mistake gets."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("liubai: ")
    assert result.err.count("\n") == 1
    return str(result.err.removeprefix("liubai: ").rstrip("\n"))


# Starting


def test_starting_imports_nothing_heavy() -> None:
    heavy = (
        "torch",
        "numpy",
        "pydantic",
        "rich",
        "rich.live",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "tokenizers",
    )
    code = f"import sys, liubai, liubai.cli; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (printed.stdout, printed.stderr) == ("[]\n", "")


def test_the_package_looks_names_up_on_first_use() -> None:
    from liubai.types import Problem, Stop

    assert liubai.Problem is Problem
    assert liubai.Stop is Stop
    assert set(dir(liubai)) == {"Group", "Problem", "Reward", "Sample", "Stop", "__version__", "load"}
    from liubai.model.checkpoint import load

    assert liubai.load is load
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = liubai.nope


def test_version(liubai_: Any) -> None:
    result = liubai_("--version")
    assert (result.code, result.out) == (0, f"liubai {liubai.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example(liubai_: Any, command: str) -> None:
    result = liubai_(command, "--help")
    assert result.code == 0
    assert result.out.rstrip().splitlines()[-1].strip().startswith(f"Example: liubai {command}")


def test_help_lists_every_command(liubai_: Any) -> None:
    printed = liubai_("--help").out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


def test_an_unknown_command_or_option_exits_2(liubai_: Any) -> None:
    assert liubai_("evla").code == 2
    assert liubai_("run", "x.toml", "--nope").code == 2
    assert liubai_("eval", "x", "--problems", "countdown", "--samples", "0").code == 2


# run, zero, report


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    written: list[Path] = []

    def write_report(folder: Path) -> Path:
        written.append(folder)
        return folder / "report.html"

    monkeypatch.setattr("liubai.report.write_report", write_report, raising=False)
    monkeypatch.setattr("liubai.report.damaged", lambda folder: [], raising=False)
    monkeypatch.setattr("liubai.report.headline", lambda folder: f"HEADLINE {folder}", raising=False)
    return written


def test_run_runs_and_reports(liubai_: Any, reports: list[Path]) -> None:
    Path("toys.toml").write_text(RECIPE)
    result = liubai_("run", "toys.toml", "--set", "base.steps=2", "--set", "seed=1")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "base: toy, 2 steps"
    assert lines[-2:] == ["HEADLINE runs/toys", "report: runs/toys/report.html"]
    assert reports == [Path("runs/toys")]
    assert len(Path("runs/toys/1-base/metrics.jsonl").read_text().splitlines()) == 2
    again = liubai_(
        "run", "toys.toml", "--out", "runs/toys", "--set", "base.steps=2", "--set", "seed=1", "--no-live"
    )
    assert "base: finished before, reused" in again.out


def test_mistakes_of_run_are_one_line(liubai_: Any) -> None:
    Path("toys.toml").write_text(RECIPE + "stpes = 3\n")
    assert mistake(liubai_("run", "nope.toml")) == "there is no recipe file 'nope.toml'"
    assert mistake(liubai_("run", "toys.toml")) == (
        "toys.toml: 'stages.base.stpes': unknown key; did you mean 'steps'?"
    )
    Path("toys.toml").write_text(RECIPE)
    assert mistake(liubai_("run", "toys.toml", "--set", "base.steps=-5")) == (
        "toys.toml: 'stages.base.steps': must be greater than 0, not -5 (--set base.steps=-5)"
    )
    assert "is a file" in mistake(liubai_("run", "toys.toml", "--out", "toys.toml"))
    assert not Path("runs").exists()


def test_zero_runs_the_shipped_recipe(
    liubai_: Any, reports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "liubai" / "cli.py"))
    assert "clone the repository, or give a recipe of your own" in mistake(liubai_("zero"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "zero.toml").write_text(RECIPE)
    assert liubai_("zero", "--out", "here").code == 0
    assert reports == [Path("here")]


@pytest.mark.parametrize(("how", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_say_how_to_continue(how: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    (tmp_path / "toys.toml").write_text(
        RECIPE.replace("steps = 4", "steps = 4000\npause = 0.01\nsave_every = 2")
    )
    code = (
        "import toy_stage, liubai.stages as s; toy_stage.register(s.KINDS); toy_stage.without_tensorboard()"
    )
    process = spawn("run", "toys.toml", "--set", "seed=1", code=code)
    while not (tmp_path / "runs/toys/1-base/state").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=20)
    assert process.returncode == exit_code
    assert err == (
        "liubai: stopped; what was saved is in runs/toys; to continue: liubai run toys.toml --set seed=1\n"
    )
    assert "base: toy, 4000 steps" in out


def test_how_to_continue_is_a_command_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [cli.__file__, "run", "a b.toml"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert stopping.again() == "bin/python -m liubai.cli run 'a b.toml'"
    monkeypatch.setattr(shutil, "which", {"python": sys.executable}.get)
    assert stopping.again() == "python -m liubai.cli run 'a b.toml'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stopping.again() == "the same torchrun command"


def test_sigterm_twice_at_once_is_once() -> None:
    """`timeout` sends it to the program and to its group."""
    cleaned = []

    def stopped() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt), stopping.heeding_sigterm() as terminated:
        stopped()
    assert terminated()
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_knows_what_has_stopped_it(
    number: signal.Signals, code: int, liubai_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a library, as Ray does, raises a ``KeyboardInterrupt`` of its own in the place of ours."""

    def through(*_: Any) -> bool:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
        raise KeyboardInterrupt

    Path("toys.toml").write_text(RECIPE)
    monkeypatch.setattr(cli, "_through", through)
    result = liubai_("run", "toys.toml")
    assert result.code == code
    assert "to continue: " in result.err


def test_under_torchrun_a_mistake_is_said_once(liubai_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("toys.toml").write_text(RECIPE + "stpes = 3\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        result = liubai_("run", "toys.toml")
        assert (result.code, result.err.count("did you mean 'steps'")) == (2, int(rank == "0"))
    # the others did not come: who says so may be the only one
    monkeypatch.setattr(ranks, "_sought", True)
    assert "did you mean" in mistake(liubai_("run", "toys.toml"))


def test_ctrl_c_elsewhere_is_130_and_quiet(liubai_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("liubai.grade.answers.read_answers", interrupt)
    result = liubai_("grade", "x.jsonl")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_report_rewrites(liubai_: Any, reports: list[Path], tmp_path: Path) -> None:
    assert mistake(liubai_("report", "nope")) == "'nope' is not a run folder: it has no recipe.toml"
    (tmp_path / "recipe.toml").write_text("")
    result = liubai_("report", str(tmp_path))
    assert (result.code, result.out) == (0, f"HEADLINE {tmp_path}\nreport: {tmp_path / 'report.html'}\n")


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("command", ["report", "bridge", "hallucination"])
def test_where_a_file_cannot_be_written_is_said_first(
    liubai_: Any, reports: list[Path], tmp_path: Path, command: str
) -> None:
    """Before any work: neither the checkpoint nor the run has to be there to learn of it."""
    (tmp_path / "recipe.toml").write_text("")
    option, ending = {"report": ("--png", "png"), "bridge": ("--out", "html")}.get(command, ("--out", ""))
    asked = [command, str(tmp_path), *(["--problems", "chain"] if command == "bridge" else []), option]
    assert f"there is no folder '{tmp_path}/no'" in mistake(liubai_(*asked, f"{tmp_path}/no/x.{ending}"))
    assert "is a folder" in mistake(liubai_(*asked, str(made(tmp_path / f"x.{ending}"))))
    if ending:
        assert f"ends in .{ending}" in mistake(liubai_(*asked, f"{tmp_path}/x.txt"))
    assert not (tmp_path / "no").exists()
    assert reports == []


# grade

GOOD = {
    "verifier": "countdown",
    "gold": "3 4 5 = 12",
    "response": "<think> x </think> <answer> 3+4+5 </answer>",
}


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the graders, which have tests of their own."""
    import liubai.grade

    seen: list[Any] = []

    def grade_lines(items: list[Any], *, timeout_s: float, workers: int) -> Iterator[Any]:
        for item in items:
            seen.append((item, timeout_s, workers))
            error = "timed out" if item.gold == "slow" else None
            yield liubai.grade.Verdict(item.gold == "yes", item.response or None, {"correct": 1.0}, error)

    monkeypatch.setattr(liubai.grade, "grade_lines", grade_lines)
    return seen


def test_grade_prints_one_verdict_a_line_in_order(liubai_: Any, graded: list[Any]) -> None:
    lines = [{**GOOD, "gold": g, "response": r} for g, r in [("yes", "一"), ("no", ""), ("slow", "\ud800")]]
    lines[1]["meta"] = {"k": 1}
    Path("x.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\r\n", encoding="utf-8")
    result = liubai_("grade", "x.jsonl", "--timeout", "2", "--workers", "1")
    assert (result.code, result.err) == (0, "")
    assert [json.loads(line) for line in result.out.splitlines()] == [
        {"correct": True, "answer": "一", "parts": {"correct": 1.0}},
        {"correct": False, "answer": None, "parts": {"correct": 1.0}},
        {"correct": False, "answer": "\ud800", "parts": {"correct": 1.0}, "error": "timed out"},
    ]
    assert [(timeout, workers) for _, timeout, workers in graded] == [(2.0, 1)] * 3
    assert graded[1][0].meta == {"k": 1}


def test_grade_reads_stdin(liubai_: Any, graded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps(GOOD).encode())))
    assert len(liubai_("grade", "-").out.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:3: not JSON ("),
        ("[" * 100_000, "x.jsonl:3: not JSON ("),
        ("[1]", "x.jsonl:3: must be a JSON object with 'verifier', 'gold' and 'response'"),
        ('{"verifier": "countdown", "gold": "x"}', "x.jsonl:3: 'response' is missing"),
        (
            '{"verifier": "countdown", "gold": true, "response": ""}',
            "x.jsonl:3: 'gold' must be a string, not true",
        ),
        (
            '{"verifier": "number", "gold": NaN, "response": ""}',
            "x.jsonl:3: 'gold' must be a string, not NaN",
        ),
        (
            json.dumps({**GOOD, "verifier": "wxyz"}),
            "x.jsonl:3: there is no verifier 'wxyz'; valid: choice, code, exact, faithful, json, judge, "
            "logic, math, number, regex, sonnet, verse. Your own is",
        ),
        (json.dumps({**GOOD, "meta": [1]}), "x.jsonl:3: 'meta' must be an object, not [1]"),
        (
            json.dumps({**GOOD, "verifier": "cuontdown"}),
            "x.jsonl:3: there is no verifier 'cuontdown'; did you mean",
        ),
    ],
)
def test_grade_names_the_bad_line_before_it_judges_any(
    liubai_: Any, graded: list[Any], line: str, message: str
) -> None:
    Path("x.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    assert mistake(liubai_("grade", "x.jsonl")).startswith(message)
    assert graded == []


def test_grade_takes_a_number_as_its_text(liubai_: Any, graded: list[Any]) -> None:
    golds = [5, -0.5, "5"]
    Path("x.jsonl").write_text("".join(json.dumps({**GOOD, "gold": gold}) + "\n" for gold in golds))
    assert liubai_("grade", "x.jsonl").code == 0
    assert [item.gold for item, _, _ in graded] == ["5", "-0.5", "5"]


def test_grade_of_nothing(liubai_: Any, graded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("x.jsonl").write_text("\n \n")
    assert mistake(liubai_("grade", "x.jsonl")).startswith("'x.jsonl' has no answers; write one a line: {")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert mistake(liubai_("grade", "-")).startswith("'-' has no answers")


def test_grade_of_a_file_that_cannot_be_read(liubai_: Any) -> None:
    assert mistake(liubai_("grade", "nope.jsonl")) == "cannot read 'nope.jsonl': No such file or directory"
    Path("x.jsonl").write_bytes(b"\n\xff\n")
    assert (
        mistake(liubai_("grade", "x.jsonl")) == "x.jsonl:2: not UTF-8 text (byte 1); save the file as UTF-8"
    )

    with open("big.jsonl", "wb") as file:
        file.seek(2 << 30)  # a hole: one line of two gigabytes, of which little is read
        file.write(b"\n")
    assert mistake(liubai_("grade", "big.jsonl")) == "big.jsonl:1: the line is longer than 16 MB"


def test_grade_with_the_real_graders_and_a_reader_that_leaves() -> None:
    Path("x.jsonl").write_text((json.dumps(GOOD) + "\n") * 3000)
    process = spawn("grade", "x.jsonl")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) == 1
    assert set(json.loads(first)) >= {"correct", "answer", "parts"}


# eval


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "1-base" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_eval_prints_a_table_or_json(liubai_: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def evaluate_checkpoint(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return {"pass@1": 0.123456, "n_problems": 20, "pass@k": {"16": 0.5}, "rows": [1, 2]}

    monkeypatch.setattr("liubai.stages.evaluate.evaluate_checkpoint", evaluate_checkpoint)
    limits = ("--limit", "20", "--seed", "3", "--device", "cpu")
    result = liubai_("eval", str(checkpoint), "--problems", "countdown", *limits)
    assert result.out == "problems    countdown\npass@1      0.1235\nn_problems  20\npass@k 16   0.5\n"
    problems = asked.pop("problems")
    assert len({p.prompt for p in problems}) == 20
    assert {p.verifier for p in problems} == {"countdown"}
    assert asked.pop("compute").device == "cpu"
    assert asked == {
        "path": checkpoint, "samples": 16, "max_tokens": 320,
        "temperature": 1.0, "top_p": 1.0, "seed": 3, "progress": None,
    }  # fmt: skip
    result = liubai_("eval", str(checkpoint), "--problems", "countdown", "--json")
    assert json.loads(result.out) == {
        "pass@1": 0.123456,
        "problems": "countdown",
        "n_problems": 20,
        "pass@k": {"16": 0.5},
        "rows": [1, 2],
    }


@pytest.mark.parametrize("command", [["eval", "--problems", "countdown"], ["chat"]])
def test_what_is_no_checkpoint(liubai_: Any, checkpoint: Path, command: list[str]) -> None:
    assert mistake(liubai_(*command, "nope")) == "there is no checkpoint folder 'nope'"
    said = mistake(liubai_(*command, str(checkpoint), "--device", "gpu"))
    assert said == "--device 'gpu': auto, cpu, cuda or cuda:N"
    run = checkpoint.parent.parent
    wrong = f"'{run}' is not a checkpoint: it has no config.json"
    # what lies about in a folder that is no run (a temporary one, a home) is nobody's guess
    assert mistake(liubai_(*command, str(run))) == wrong
    (run / "recipe.toml").touch()
    assert mistake(liubai_(*command, str(run))) == f"{wrong}; did you mean '{checkpoint}'?"
    stage = checkpoint.parent
    assert mistake(liubai_(*command, str(stage))).endswith(f"did you mean '{checkpoint}'?")


def test_chat_streams_and_leaves_cleanly(
    liubai_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liubai.model.checkpoint import save_checkpoint
    from liubai.model.config import ModelConfig
    from liubai.model.transformer import build
    from liubai.text.template import BARE
    from liubai.text.tokenizer import word_level

    tokenizer = word_level(["which", "one", "wait"])
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    save_checkpoint(tmp_path / "tiny", build(config, 0), tokenizer, BARE)
    questions = iter(["which one", "", "one " * 40, "which one"])

    def ask(prompt: str) -> str:
        print(prompt, end="")
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    result = liubai_("chat", str(tmp_path / "tiny"), "--max-tokens", "12")
    assert result.code == 0
    assert result.err == "the question has 42 tokens, the model takes 32; shorten it\n"
    assert ">" not in result.out.replace("<|unknown|>", "").replace("</answer>", "")  # no prompt
    assert result.out.endswith("\n")
    assert len(result.out.split()) > 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), "permission denied: '/x'"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/x/y"), "read-only file system: '/x/y'"),
        (OSError(errno.ENXIO, os.strerror(errno.ENXIO)), "no such device or address"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "no usable temporary directory found in ['/tmp']",
        ),
        (OSError("two\nlines"), "two lines"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    liubai_: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", refused)
    assert mistake(liubai_("run", "x.toml")) == said
