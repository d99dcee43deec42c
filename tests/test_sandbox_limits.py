"""Processes, memory, output and time are bounded, and nothing survives. Looked at from outside."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from attacks import RAW, ROOT, Watched, attack, children, gone, number, refusals, said, sandboxes

from liubai.errors import UserError
from liubai.grade.sandbox import Limits, require, spawn

try:
    require()
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

# --- processes and memory --------------------------------------------------------------------------


def test_fork_bomb() -> None:
    lines = """
    os.fork()
    os.forkpty()
    os.posix_spawn(sys.executable, ['x'], {})
    subprocess.run([sys.executable, '-c', ''])
    multiprocessing.get_context('fork').Process(target=print).start()
    """
    with Watched() as watched:
        # without /dev/shm multiprocessing does not even get as far as forking
        assert refusals(lines) <= {"PermissionError", "OSError", "FileNotFoundError"}
        bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        assert attack(bomb, seconds=1.0).why == "timeout"
    # bwrap, the init of its namespace, and the program
    assert 0 < watched.most <= 3


@pytest.mark.parametrize("name", ["fork", "vfork", "clone", "clone3"])
def test_fork_bomb_by_raw_system_calls(name: str) -> None:
    expected = "ENOSYS" if name == "clone3" else "EPERM"
    assert said(f"{RAW}\nprint(call({number(name)}, 17, 0, 0, 0, 0))") == expected
    new_user_namespace = 0x10000000 | 17
    assert said(f"{RAW}\nprint(call({number('clone')}, {new_user_namespace}, 0, 0, 0, 0))") == "EPERM"


def test_thread_bomb() -> None:
    source = """
    import threading
    threading.stack_size(1 << 16)
    hold, started = threading.Event(), 0
    try:
        while True:
            threading.Thread(target=hold.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        print(started)
    hold.set()
    """
    assert 8 <= int(said(source)) <= 16


MEMORY = {
    "bytearray": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "small objects": "x = []\nwhile True: x.append([None] * 100)",
    "mmap": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24)); x[-1][:] = b'x' * (1 << 24)",
    "integers": "x = 3\nwhile True: x = x * x",
    "threads": (
        "import threading\ndef eat():\n    x = []\n    while True: x.append(bytearray(1 << 22))\n"
        "for _ in range(8): threading.Thread(target=eat).start()"
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_bomb(name: str) -> None:
    with Watched() as watched:
        result = attack(MEMORY[name], memory_mb=200, seconds=1.5)
    assert result.why in ("memory", "timeout", "exit", "signal")
    assert 0 < watched.peak < 260 << 20


@pytest.mark.parametrize("name", ["shmget", "msgget", "semget", "mq_open", "memfd_create", "memfd_secret"])
def test_memory_that_no_process_owns(name: str) -> None:
    assert said(f"{RAW}\nprint(call({number(name)}, 0, 1 << 30, 0o1600))") == "EPERM"


def test_huge_output() -> None:
    for stream in (1, 2):
        started = time.monotonic()
        result = attack(f"import os\nwhile True: os.write({stream}, b'x' * 65536)", output_bytes=1 << 18)
        assert result.why == "output"
        assert len(result.stdout) <= 1 << 18
        assert len(result.stderr) <= 4096
        assert time.monotonic() - started < 5


def test_infinite_loop_and_sleep_end_on_time() -> None:
    for source in (
        "while True: pass",
        "import time; time.sleep(1e6)",
        "9**9**9",
        "import re; re.match('(a*)*b', 'a'*99)",
    ):
        result = attack(source, seconds=0.5)
        assert (result.why, result.status) == ("timeout", None)
        assert result.seconds < 0.5 + 0.5
    assert gone(children())


def test_recursion_crash() -> None:
    deep = "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\n"
    c_stack = "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)"
    for source in (f"{deep}f()", f"{deep}{c_stack}"):  # a crash, or a traceback of a million lines
        assert attack(source, seconds=1.0).why in ("signal", "memory", "exit", "output", "timeout")
    assert said("print('the next one is well')") == "the next one is well"


# --- signals, survivors, peeking --------------------------------------------------------------------


def test_signal_games() -> None:
    bystander = subprocess.Popen(["sleep", "30"])
    try:
        source = f"""
        import os, signal
        print(os.getppid(), os.getpid(), os.getsid(0) != 0)
        for pid in (os.getppid(), 1, -1, {os.getpid()}, {bystander.pid}, -{os.getpgid(0)}):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        print("still here")
        """
        result = attack(source)
        assert result.why in ("ok", "signal")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_ignoring_every_signal_does_not_help() -> None:
    source = """
    import signal, time
    for n in range(1, 64):
        try: signal.signal(n, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: time.sleep(1)
    """
    with Watched() as watched:
        result = attack(source, seconds=0.5)
    assert result.why == "timeout"
    assert result.seconds < 1.0
    assert watched.seen
    assert gone(list(watched.seen))


DAEMON = """
import os, time
for step in (os.fork, os.setsid, os.fork):
    try:
        if step() and step is os.fork: os._exit(0)
    except OSError as error:
        print(step.__name__, error.errno)
print("up", flush=True)
os.closerange(0, 3)
time.sleep(60)
"""


def test_leaving_a_daemon_behind() -> None:
    with Watched() as watched:
        result = attack(DAEMON, seconds=1.0)
    assert result.why == "timeout"  # closing its output is not an end
    assert result.stdout.splitlines()[-1] == b"up"
    assert watched.seen
    assert gone(list(watched.seen))


def test_a_sandbox_that_is_killed_while_it_comes_up_is_gone() -> None:
    for i in range(60):
        with spawn("import time; time.sleep(60)", limits=Limits(tmp_mb=13)):
            time.sleep(0.0003 * i)
    assert gone(sandboxes(13))


def test_workers_that_are_killed_at_any_moment_leave_nothing() -> None:
    script = (
        "from liubai.grade.sandbox import Limits, require, run\nrequire()\nprint('up', flush=True)\n"
        "while True: run('pass', limits=Limits(tmp_mb=11))"
    )
    for i in range(8):
        caller = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        with caller:
            assert caller.stdout is not None
            assert caller.stdout.readline() == b"up\n"
            time.sleep(0.05 + 0.0017 * i)
            os.killpg(caller.pid, signal.SIGKILL)  # as GraderPool does it
    time.sleep(0.1)
    assert gone(sandboxes(11))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_caller_is_the_death_of_the_sandbox(how: signal.Signals) -> None:
    code = f"from liubai.grade.sandbox import Limits, run; run({DAEMON!r}, limits=Limits(seconds=60.0))"
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 60  # beside other work a process may take long to begin
        while len(children()) < 4 and time.monotonic() < deadline:  # caller, bwrap, init, program
            time.sleep(0.02)
        time.sleep(0.2)
        family = children()
        assert len(family) >= 4
        caller.send_signal(how)
        caller.wait()
        assert gone(family)
    finally:
        caller.kill()
        caller.wait()


def test_peeking_at_other_processes() -> None:
    lines = """
    open('/proc/1/environ').read()
    open('/proc/self/status').read()
    os.listdir('/proc')
    os.listdir('/proc/1/root')
    os.stat('/sys')
    """
    assert refusals(lines) == {"FileNotFoundError"}
    assert refusals(f"os.kill({os.getpid()}, 0)\nos.getpgid({os.getpid()})") == {"ProcessLookupError"}


KERNEL = [
    *("ptrace", "process_vm_readv", "kcmp", "pidfd_open", "unshare", "setns", "mount", "chroot", "bpf"),
    *("keyctl", "io_uring_setup", "userfaultfd", "perf_event_open", "open_by_handle_at", "personality"),
]


@pytest.mark.parametrize("name", KERNEL)
def test_ways_into_other_processes_and_the_kernel(name: str) -> None:
    assert said(f"{RAW}\nprint(call({number(name)}, 16, 1, 0, 0))") == "EPERM"


def test_secrets_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hidden-token")
    environment = said("import os; print(dict(os.environ))")
    assert "hidden" not in environment
    assert "API_TOKEN" not in environment
    # what the C library was given at the start
    assert "hidden" not in said(
        f"{RAW}\nlibc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'API_TOKEN'))"
    )


def test_inherited_files_and_stdin() -> None:
    held = os.open(ROOT / "pyproject.toml", os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        source = """
        import os, stat
        for fd in range(64):
            try: print(fd, stat.S_ISREG(os.fstat(fd).st_mode), os.fstat(fd).st_size)
            except OSError: pass
        """
        sizes = [line.split() for line in said(source).splitlines()]
        assert str((ROOT / "pyproject.toml").stat().st_size) not in [size for _, _, size in sizes]
    finally:
        os.close(held)
    # its own input is a file in memory that cannot grow, and there is no terminal to type into
    lines = "os.write(0, b'x' * (1 << 20))\nos.ftruncate(0, 1 << 30)\nopen('/dev/tty')\nopen('/dev/pts/0')"
    assert refusals(lines) <= {"PermissionError", "OSError", "FileNotFoundError"}


def test_it_is_not_root_and_cannot_become_it() -> None:
    assert 0 not in json.loads(
        said("import json, os; print(json.dumps([*os.getresuid(), *os.getresgid(), *os.getgroups()]))")
    )
    assert refusals("os.setuid(0)\nos.setgid(0)\nos.setgroups([0])\nos.nice(-5)") == {"PermissionError"}
    assert refusals("resource.setrlimit(resource.RLIMIT_AS, (-1, -1))") == {"ValueError"}
