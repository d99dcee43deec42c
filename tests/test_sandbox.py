"""Every attack is really made, and looked at from outside: nothing may have happened."""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.memory import tree_rss

from liubai.errors import UserError
from liubai.grade import seccomp
from liubai.grade.sandbox import Limits, Result, require, run

try:
    require()
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ROOT = Path(__file__).parents[1]

#: Raw system calls, past whatever Python would check. ``call`` returns the result or the error's name.
RAW = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    value = libc.syscall(number, *map(ctypes.c_long, args))
    return value if value >= 0 else errno.errorcode[ctypes.get_errno()]
"""


def attack(source: str, *, stdin: bytes = b"", **limits: float) -> Result:
    return run(textwrap.dedent(source), stdin, Limits(**{"seconds": 10.0, **limits}))  # type: ignore[arg-type]


def said(source: str) -> str:
    result = attack(source)
    assert result.why == "ok", result.stderr.decode()
    return result.stdout.decode().strip()


def refusals(source: str) -> set[str]:
    """What each line of ``source`` raises; the name of nothing raised is ``-``."""
    lines = [line.strip() for line in source.strip().splitlines()]
    done = said(
        "import ctypes, os, socket, subprocess, multiprocessing, sys, shutil, signal, resource\n"
        f"for line in {lines!r}:\n"
        "    try:\n        exec(line)\n        print('-')\n"
        "    except Exception as error:\n        print(type(error).__name__)"
    ).split()
    assert len(done) == len(lines)
    return set(done)


def number(name: str) -> int:
    numbers = {"clone": seccomp.CLONE, "clone3": (seccomp.CLONE3,) * 2, **seccomp.REFUSED}[name]
    found = numbers[list(seccomp.MACHINES).index(platform.machine())]
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def tasks(marker: str) -> list[int]:
    """Processes whose command line has ``marker``, or all those in a sandbox where it is ``bwrap``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if marker.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return found


def children() -> list[int]:
    """All descendants of this process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {os.getpid()})


def gone(pids: list[int], within: float = 0.5) -> bool:
    """Are these processes dead (or reaped) soon?"""
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Watched:
    """Looks at the descendants of this process a hundred times a second."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.most = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            now = children()
            self.seen.update(now)
            self.most = max(self.most, len(now))
            self.peak = max(self.peak, tree_rss(os.getpid()) - tree_rss_of_one(os.getpid()))

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def tree_rss_of_one(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- what works ------------------------------------------------------------------------------------


def test_a_program_reads_and_prints() -> None:
    result = attack("import sys\nprint(input()[::-1]); print('e', file=sys.stderr)", stdin="留白\n".encode())
    assert (result.status, result.why, result.stderr) == (0, "ok", b"e\n")
    assert result.stdout.decode() == "白留\n"


@pytest.mark.parametrize(
    ("source", "status", "why"),
    [
        ("raise SystemExit(3)", 3, "exit"),
        ("1/0", 1, "exit"),
        ("def", 1, "exit"),
        ("x = '\\ud800'; print(len(x))", 0, "ok"),
        ("import os; os.kill(os.getpid(), 11)", 128 + 11, "signal"),
        ("import os; os.abort()", 128 + 6, "signal"),
        ("bytearray(1 << 40)", 1, "memory"),
        ("while True: pass", None, "timeout"),
        ("import time; time.sleep(1000)", None, "timeout"),
        ("while True: print('x' * 1000)", None, "output"),
    ],
)
def test_how_it_ended(source: str, status: int | None, why: str) -> None:
    result = attack(source, seconds=1.0 if why == "timeout" else 10.0)
    assert (result.status, result.why) == (status, why)


def test_the_standard_library_is_there_and_threads_asyncio_and_tmp_work() -> None:
    source = """
    import asyncio, bisect, collections, datetime, decimal, hashlib, heapq, itertools, json, random, re
    import tempfile, threading, typing, unicodedata, zlib
    seen = []
    threading.stack_size(64 << 20)
    threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    with tempfile.NamedTemporaryFile("w+") as file:
        file.write("x"); file.seek(0); seen.append(file.read())
    seen.append(asyncio.run(asyncio.sleep(0, "y")))
    print(seen, __name__)
    """
    assert said(source) == "[0, 1, 2, 'x', 'y'] __main__"


# --- network ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def listener(family: int, address: object) -> Iterator[socket.socket]:
    with socket.socket(family) as server:
        server.bind(address)
        server.listen()
        server.settimeout(0.2)
        yield server
        with pytest.raises(TimeoutError):  # nobody has called
            server.accept()


def test_network_tcp() -> None:
    with listener(socket.AF_INET, ("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # from outside it can be reached
            server.accept()[0].close()
        lines = f"socket.create_connection(('127.0.0.1', {port}), 1)\nsocket.socket()\nsocket.socket(socket.AF_INET6)"
        assert refusals(lines) == {"PermissionError"}


def test_network_names_are_not_looked_up() -> None:
    assert refusals("socket.gethostbyname('example.com')\nsocket.getaddrinfo('example.com', 80)") == {
        "gaierror"
    }


def test_network_abstract_unix_socket_and_other_families() -> None:
    name = f"\0liubai-test-{os.getpid()}"
    with listener(socket.AF_UNIX, name):
        lines = f"s = socket.socket(socket.AF_UNIX); s.connect({name!r})\n"
        # netlink, packets, and the virtual machine's own line to its host, which no namespace covers
        lines += "socket.socket(16, 3, 0)\nsocket.socket(17, 3, 0)\nsocket.socket(40, 1, 0)\nsocket.socket(38, 5, 0)"
        assert refusals(lines) == {"PermissionError"}
    raw = f"{RAW}\nprint(call({number('socket')}, 40, 1, 0))"
    assert said(raw) == "EPERM"


def test_network_has_no_interface_and_no_host_name() -> None:
    assert said("import socket; print(socket.gethostname())") == "sandbox"


# --- files -----------------------------------------------------------------------------------------


def test_reading_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    outside = [
        secret,
        "/etc/shadow",
        "/etc/passwd",
        "/etc/hostname",
        ROOT / "pyproject.toml",
        Path.home() / "x",
    ]
    outside += [
        __file__,
        "/proc/self/environ",
        "/sys/kernel/version",
        "/run",
        "/var",
        "/home",
        "/etc",
        "/proc",
    ]
    lines = "\n".join(
        f"os.stat({str(path)!r})" for path in [*outside, *Path.home().iterdir(), ROOT, tmp_path]
    )
    wanted = {"FileNotFoundError"}
    home = {str(path) for path in Path(sys.base_prefix).parents} & set(re.findall(r"'(.*)'", lines))
    lines = "\n".join(line for line in lines.splitlines() if not any(f"'{path}'" in line for path in home))
    assert refusals(lines) == wanted
    for path in home:  # the interpreter lies there: nothing else does
        listed = json.loads(said(f"import json, os; print(json.dumps(os.listdir({path!r})))"))
        assert [Path(path, name) for name in listed] == [
            p for p in Path(sys.base_prefix, "x").parents if str(p.parent) == path
        ]


def test_reading_other_peoples_packages() -> None:
    assert refusals("import pytest\nimport torch\nimport liubai\nimport pip") == {"ModuleNotFoundError"}
    packages = Path(
        sys.base_prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"
    )
    if packages.is_dir() and any(packages.iterdir()):
        assert said(f"import os; print(os.listdir({str(packages)!r}))") == "[]"


def test_writing_outside() -> None:
    here = str(ROOT / "written-by-the-sandbox")
    places = [here, "/usr/lib/x", "/dev/x", "/dev/shm/x", "/x", "/tmp/../x", f"{sys.base_prefix}/x", "/etc/x"]
    done = refusals("\n".join(f"open({place!r}, 'w')" for place in places))
    assert done <= {"OSError", "PermissionError", "FileNotFoundError"}
    assert not Path(here).exists()


def test_writing_is_possible_in_tmp_alone() -> None:
    source = """
    import os
    for folder, names, _ in os.walk("/"):
        names[:] = [n for n in names if not (folder.startswith("/usr/lib/") and folder.count("/") > 3)]
        try:
            open(folder + "/probe", "w").close()
            print(folder)
        except OSError:
            pass
    """
    assert said(source) == "/tmp"


def test_tmp_is_empty_private_and_gone_afterwards() -> None:
    mine = Path("/tmp") / f"liubai-outside-{os.getpid()}"
    mine.write_text("mine")
    try:
        assert said("import os; print(os.listdir('/tmp')); open('/tmp/left', 'w').write('x')") == "[]"
        assert said("import os; print(os.listdir('/tmp'))") == "[]"
        assert not Path("/tmp/left").exists()
    finally:
        mine.unlink()


def test_symlinks_hard_links_and_dotdot_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    lines = f"""
    os.symlink({str(secret)!r}, 'a'); open('a').read()
    os.symlink('/etc', 'b'); os.listdir('b')
    os.symlink('../../../../../../../etc/shadow', 'c'); open('c').read()
    open('/tmp/../../../etc/shadow').read()
    os.symlink('/proc/1/root', 'd'); os.listdir('d')
    os.link({str(secret)!r}, 'e')
    """
    assert refusals(lines) == {"FileNotFoundError"}
    lines = "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))\nos.chroot('/tmp')\nos.chmod('/usr/lib', 0o777)"
    assert refusals(lines) <= {"PermissionError", "OSError"}
    assert secret.read_text() == "hidden"


def test_filling_the_disk() -> None:
    source = """
    import errno, os
    total, reasons = 0, set()
    for i in range(8):
        try:
            with open(f"/tmp/{i}", "wb", 0) as file:
                while True:
                    total += file.write(b"x" * (1 << 20))
        except OSError as error:
            reasons.add(error.errno)
    print(total >> 20, reasons == {errno.ENOSPC} or reasons == {errno.ENOSPC, errno.EFBIG})
    """
    before = shutil.disk_usage("/").free
    megabytes, reasons = said(source).split()
    assert (int(megabytes), reasons) == (16, "True")
    assert before - shutil.disk_usage("/").free < 1 << 30


def test_opening_thousands_of_files() -> None:
    source = "files = []\ntry:\n    while True: files.append(open('/dev/null'))\nexcept OSError as e: print(e.errno, len(files))"
    error, opened = map(int, said(source).split())
    assert (error, opened < 64) == (24, True)
    assert refusals("resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))") == {"ValueError"}


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
    "mmap": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24)); x[-1].write(b'x' * (1 << 24))",
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
    assert said(f"{RAW}\nprint(call({number(name)}, 0, 1 << 30, 0o1600))") in ("EPERM", "EFAULT")
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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_caller_is_the_death_of_the_sandbox(how: signal.Signals) -> None:
    code = f"from liubai.grade.sandbox import Limits, run; run({DAEMON!r}, limits=Limits(seconds=60.0))"
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 20
    while len(family := children()) < 4 and time.monotonic() < deadline:  # caller, bwrap, init, program
        time.sleep(0.02)
    time.sleep(0.2)
    family = children()
    assert len(family) >= 4
    caller.send_signal(how)
    caller.wait()
    assert gone(family)


def test_peeking_at_other_processes() -> None:
    lines = """
    open('/proc/1/environ').read()
    open('/proc/self/status').read()
    os.listdir('/proc')
    os.listdir('/proc/1/root')
    os.stat('/sys')
    """
    assert refusals(lines) == {"FileNotFoundError"}
    assert refusals("os.kill(%d, 0)\nos.getpgid(%d)" % (os.getpid(), os.getpid())) == {"ProcessLookupError"}


@pytest.mark.parametrize(
    "name",
    ["ptrace", "process_vm_readv", "kcmp", "unshare", "setns", "mount", "bpf", "keyctl", "io_uring_setup"]
    + ["userfaultfd", "perf_event_open", "pidfd_open", "open_by_handle_at", "chroot", "personality"],
)
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


# --- where it does not work -------------------------------------------------------------------------


def test_without_bubblewrap_nothing_is_run(tmp_path: Path) -> None:
    code = "from liubai.grade.sandbox import run; run(\"open('ran', 'w')\")"
    env = {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "UserError: programs are run in a sandbox: install the Debian package bubblewrap" in done.stderr
    broken = tmp_path / "bwrap"  # such as one that is not allowed to make namespaces
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "does not work here (bwrap: No permissions to create new namespace)" in done.stderr
    # one that runs the program as it is, in no sandbox at all
    broken.write_text('#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "UserError: the sandbox does not work here" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="root becomes another")
def test_another_user_has_the_same_sandbox(tmp_path_factory: pytest.TempPathFactory) -> None:
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True
    )
    if version.stdout != b"True\n":
        pytest.skip("the system's Python is too old")
    with contextlib.ExitStack() as stack:
        home = Path("/var/tmp") / f"liubai-test-{os.getpid()}"
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        package = home / "liubai" / "grade"
        package.mkdir(parents=True)
        (home / "liubai" / "__init__.py").touch()
        (package / "__init__.py").touch()
        shutil.copy(ROOT / "liubai" / "errors.py", home / "liubai")
        for name in ("sandbox", "seccomp", "inside", "link", "code", "clock"):
            shutil.copy(ROOT / "liubai" / "grade" / f"{name}.py", package)
        code = (
            "from liubai.grade.code import code\nfrom liubai.grade.sandbox import run\n"
            "print(code('assert f(1) == 2', 'def f(x): return x + 1', {}), run('import os; os.fork()').why)"
        )
        command = ["/usr/bin/python3", "-B", "-c", code]
        env = {"PYTHONPATH": str(home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            command,
            env=env,
            cwd="/",
            user=12345,
            group=12345,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
    if "needs user namespaces" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert (done.stdout, done.stderr) == ("1.0 exit\n", "")


def test_numbers_of_system_calls_are_the_kernels() -> None:
    headers = ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"]
    checked = 0
    for which, header in enumerate(headers):
        if not Path(header).exists():
            continue
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text()))
        calls = {**seccomp.REFUSED, "clone": seccomp.CLONE, "clone3": (seccomp.CLONE3,) * 2}
        for name, numbers in calls.items():
            if numbers[which] is not None and name in known:
                assert (name, numbers[which]) == (name, int(known[name]))
                checked += 1
    if not checked:
        pytest.skip("no kernel headers")
    with pytest.raises(KeyError):
        seccomp.program("m68k")
