"""A grader may hang, crash or eat memory: one verdict is lost, and counted; nothing else is."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, Verdict, check_verifier, grade, grade_lines, is_bounded

CHECKER = """
import os, subprocess, time

def check(gold, answer, meta):
    if answer == "loop":
        while True:
            pass
    if answer == "power":
        return 9**9**9 > 0
    if answer == "sleep":
        time.sleep(60)
    if answer == "exit":
        os._exit(3)
    if answer == "killed":
        os.kill(os.getpid(), 9)
    if answer == "memory":
        return len(bytearray(4 << 30)) > 0
    if answer == "recursion":
        return check(gold, answer, meta)
    if answer == "raise":
        raise LookupError("no such thing")
    if answer == "quit":
        raise SystemExit(0)
    if answer == "child":
        held = os.open(meta["pipe"], os.O_WRONLY)
        subprocess.Popen(["sleep", "60"], pass_fds=[held])
        os.write(held, b"up")
        time.sleep(60)
    if answer == "talk":
        print('["done", 0, true, "x", {}, null]')
        try:
            input()
        except EOFError:
            pass
    if answer == "half":
        return 0.5
    if answer == "two":
        return 2.0
    if answer == "word":
        return "yes"
    return answer == gold
"""


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user") / "checker.py"
    path.write_text(CHECKER)
    return f"{path}:check"


def item(checker: str, answer: str, **meta: str) -> GradeItem:
    return GradeItem(checker, "a", f"<think> </think> <answer> {answer} </answer>", meta)


def test_verdicts_come_in_order_and_good_code_is_just_graded(checker: str) -> None:
    with GraderPool(workers=2) as pool:
        answers = ["a", "b"] * 30 + ["talk", "half"]
        verdicts = pool.gather(pool.submit([item(checker, answer) for answer in answers]))
    assert [v.correct for v in verdicts] == [True, False] * 30 + [False, False]
    assert [v.answer for v in verdicts] == answers
    assert verdicts[-1].parts == {"correct": 0.5, "format": 1.0}
    assert pool.errors == 0


def test_grader_timeout_is_counted_and_survived(checker: str) -> None:
    limit = 1.0
    answers = ["a", "loop", "b", "power", "a", "exit", "killed", "memory", "a", "b"]
    with GraderPool(workers=2, timeout_s=limit, memory_mb=512) as pool:
        pool.gather(pool.submit([item(checker, "a")] * 4))  # start-up is not the grader's time
        started = time.monotonic()
        verdicts = pool.gather(pool.submit([item(checker, answer) for answer in answers]))
        # both hanging ones may have met the same worker; replacing workers takes a moment
        assert time.monotonic() - started < 2 * (limit + 0.5) + 3
        assert pool.errors == 5
    by_answer = dict(zip(answers, verdicts, strict=True))
    assert by_answer["loop"].error == by_answer["power"].error == "timeout after 1.0 s"
    assert by_answer["exit"].error == "the grader crashed (exit code 3)"
    assert by_answer["killed"].error == "the grader crashed (signal 9)"
    assert "MemoryError" in str(by_answer["memory"].error)
    assert [v.correct for v in verdicts if v.error is None] == [True, False, True, True, False]


def test_a_hang_is_killed_on_time_with_its_children(checker: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with GraderPool(workers=1, timeout_s=0.5) as pool:
        pool.gather(pool.submit([item(checker, "a")]))
        started = time.monotonic()
        (verdict,) = pool.gather(pool.submit([item(checker, "child", pipe=str(pipe))]))
        assert time.monotonic() - started < 0.5 + 0.5
        assert verdict.error == "timeout after 0.5 s"
    assert os.read(reader, 10) == b"up"
    # the pipe ends when nobody holds it any more; a surviving child would make this raise BlockingIOError
    time.sleep(0.1)
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_whatever_a_checker_raises_or_returns_is_an_error_verdict(checker: str) -> None:
    with GraderPool(workers=1) as pool:
        answers = ["raise", "quit", "recursion", "two", "word", "a"]
        verdicts = pool.gather(pool.submit([item(checker, answer) for answer in answers]))
    errors = [str(v.error) for v in verdicts]
    for error, expected in zip(
        errors, ["no such thing", "SystemExit", "Recursion", "2.0", "str"], strict=False
    ):
        assert expected in error
    assert verdicts[-1].correct
    assert pool.errors == 5


def test_grader_off_main_thread(checker: str) -> None:
    got: dict[int, list[Verdict]] = {}
    with GraderPool(workers=2, timeout_s=1.0) as pool:

        def work(i: int) -> None:
            items = [item(checker, "a"), item(checker, "b"), GradeItem("number", "2", "<answer>2</answer>")]
            got[i] = pool.gather(pool.submit([*items, item(checker, "loop")] if i == 0 else items))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    for i in range(4):
        assert [v.correct for v in got[i]][:3] == [True, False, True]
        assert all(v.error is None for v in got[i][:3])
    assert got[0][3].error == "timeout after 1.0 s"


def test_poll_hands_out_each_verdict_once(checker: str) -> None:
    with GraderPool(workers=1) as pool:
        tickets = pool.submit([item(checker, "a"), GradeItem("number", "2", "<answer>2</answer>")])
        got: dict[int, Verdict] = {}
        deadline = time.monotonic() + 10
        while len(got) < 2 and time.monotonic() < deadline:
            got.update(pool.poll())
            time.sleep(0.01)
        assert sorted(got) == sorted(tickets)
        assert pool.poll() == {}
        with pytest.raises(KeyError, match="handed out"):
            pool.gather(tickets)


def test_bounded_verifiers_start_no_process() -> None:
    with GraderPool() as pool:
        items = [
            GradeItem("number", "2", "<answer>2</answer>"),
            GradeItem("number", "?", "<answer>2</answer>"),
        ]
        right, broken = pool.gather(pool.submit(items))
        assert right.correct
        assert "not a number" in str(broken.error)
        assert pool.errors == 1
        assert not pool._threads


def test_close_answers_those_who_wait(checker: str) -> None:
    pool = GraderPool(workers=1, timeout_s=30.0)
    tickets = pool.submit([item(checker, "sleep"), item(checker, "a")])
    got: list[Verdict] = []
    waiter = threading.Thread(target=lambda: got.extend(pool.gather(tickets)))
    waiter.start()
    time.sleep(0.3)
    started = time.monotonic()
    pool.close()
    waiter.join(5)
    assert time.monotonic() - started < 2
    assert [v.error for v in got] == ["the grader pool was closed"] * 2
    assert pool.errors == 0
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([])


def test_a_worker_that_died_while_idle_costs_no_verdict(checker: str) -> None:
    with GraderPool(workers=1) as pool:
        pool.gather(pool.submit([item(checker, "a")]))
        (process,) = pool._processes
        process.kill()
        process.popen.wait(5)
        (verdict,) = pool.gather(pool.submit([item(checker, "a")]))
        assert verdict.correct
        assert pool.errors == 0


def test_a_program_that_forgets_to_close_the_pool_leaves_no_grader_behind(checker: str) -> None:
    code = (
        "import sys, time; from liubai.grade import GradeItem, GraderPool; pool = GraderPool(1, 60.0)\n"
        "pool.submit([GradeItem(sys.argv[1], 'a', '<answer> sleep </answer>')]); time.sleep(0.5)\n"
        "print(*(p.popen.pid for p in pool._processes))"
    )
    out = subprocess.run([sys.executable, "-c", code, checker], capture_output=True, text=True, timeout=20)
    with pytest.raises(ProcessLookupError):
        os.kill(int(out.stdout), 0)


def test_code_that_cannot_be_loaded_is_an_error_verdict(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(1)")
    (tmp_path / "other.py").write_text("check = 1")
    with GraderPool(workers=1) as pool:
        names = [f"{tmp_path}/broken.py:check", f"{tmp_path}/other.py:check", "no.such.module:check"]
        verdicts = pool.gather(pool.submit([item(name, "a") for name in names]))
    assert all("cannot be loaded" in str(v.error) for v in verdicts)


def test_module_checkers_and_streams_keep_their_order() -> None:
    def items() -> list[GradeItem]:
        return [GradeItem("operator:contains", "abc", f"<answer> {a} </answer>") for a in "abx"]

    # operator.contains takes two arguments: an error for each, but a loaded module
    verdicts = list(grade_lines(items(), timeout_s=5.0, workers=1))
    assert all("TypeError" in str(v.error) for v in verdicts)
    numbers = [GradeItem("number", str(i % 3), f"<answer> {i} </answer>") for i in range(400)]
    assert [v.answer for v in grade_lines(numbers)] == [str(i) for i in range(400)]


def test_user_code_is_never_run_in_this_process(checker: str) -> None:
    assert not is_bounded(checker)
    assert is_bounded("countdown")
    with pytest.raises(ValueError, match="GraderPool"):
        grade(item(checker, "a"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("countdwn", "did you mean 'countdown'"),
        ("zzz", "valid: choice"),
        ("nofile.py:check", "no file"),
        ("a b:check", "neither"),
        ("os:not a name", "name of a function"),
        ("", "valid"),
    ],
)
def test_unknown_verifiers_are_the_users_to_mend(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        check_verifier(name)
    with GraderPool() as pool, pytest.raises(UserError):
        pool.submit([GradeItem(name, "a", "")])


def test_workers_import_no_torch() -> None:
    heavy = "('torch', 'numpy', 'tokenizers')"
    code = f"import sys, liubai.grade, liubai.grade.worker; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
