"""Run a Python program that nobody trusts: bubblewrap, resource limits and a filter of system calls.

Inside there is one process of an unprivileged user in namespaces of its own, the Python interpreter and
its standard library (read-only), an empty /tmp of a few megabytes, four devices, and nothing else: no
network, no /proc, no /etc, no home, no environment of ours, no other packages. It cannot start processes
(threads it can). Memory is bounded by the address space of that one process plus /tmp, wall clock by a kill
that takes the whole pid namespace with it. See :mod:`liubai.grade.seccomp` for what the kernel refuses.

What remains: empty files in /tmp cost kernel memory that no limit here counts (about 100 MB for each second
that a program does nothing but create them). The program uses processor time while it runs, sees the
system's clock, can read the interpreter's files and the machine's shared libraries, and talks to the
running kernel, whose bugs no sandbox of this kind can rule out. Linux only; without a working bubblewrap
nothing is run at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import marshal
import math
import os
import platform
import re
import select
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import IO

from liubai.errors import UserError
from liubai.grade import seccomp


def compiled(name: str) -> CodeType:
    """The module ``name`` of this folder, as code to be run in a sandbox (compiling it there takes longer
    than all the rest)."""
    path = Path(__file__).with_name(f"{name}.py")
    return compile(path.read_text(encoding="utf-8"), path.name, "exec", dont_inherit=True)


INSIDE = compiled("inside")

#: Reads, from the file whose number is its first argument: the code of INSIDE, a prelude and the program.
BOOT = """import marshal, sys
with open(int(sys.argv[1]), "rb") as file:
    inside, *job = marshal.loads(file.read())
exec(inside)
main(*job)"""

#: Flags of the interpreter: no site-packages, no user's settings, UTF-8 whatever the locale.
PYTHON_FLAGS = ("-I", "-S", "-B", "-X", "utf8")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
STDERR_TAIL = 4096  #: bytes
INFO_S = 1.0  #: that bwrap has to fork, on a machine however busy

_counter = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """``seconds`` of wall clock (processor time gets one more); ``output_bytes`` of stdout and stderr
    together; ``tasks``: threads, with two to spare for the sandbox itself."""

    seconds: float = 5.0
    memory_mb: int = 512
    output_bytes: int = 1 << 20
    tmp_mb: int = 16
    tasks: int = 16
    files: int = 64


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended. ``status`` is its exit code, 128 + n for signal n, ``None`` when we killed it.

    ``why``: ``ok`` (exit code 0), ``exit`` (another), ``memory`` (it died of a MemoryError), ``signal``,
    ``timeout`` (wall clock or processor time), ``output`` (too much of it). ``stderr`` is the tail.
    """

    status: int | None
    stdout: bytes
    stderr: bytes
    why: str
    seconds: float


class Sandbox:
    """A sandbox that is running: ``process`` is bwrap, outside; what it holds is inside a pid namespace."""

    def __init__(self, process: subprocess.Popen[bytes], started: IO[bytes], info: IO[bytes]) -> None:
        self.process, self._started, self._info = process, started, info

    def check(self) -> None:
        """Raises ``RuntimeError`` when the program has not begun: it is then not to blame for anything.

        A byte says so that is written before the program's first line. For use when the process has ended
        or is no longer wanted: the byte is read but once.
        """
        if not self._started.read(1):
            raise RuntimeError("the sandbox did not start")

    def kill(self) -> None:
        """End it now, with all that is in it. Harmless when it has ended.

        The pid namespace is killed by its first process: with that one the kernel ends all others, daemons
        and other sessions included. To kill bwrap alone is not enough: its child asks to die with it
        (--die-with-parent) only once it has set up everything.
        """
        if self.process.poll() is None:
            first = self._first()
            with contextlib.suppress(ProcessLookupError):
                if first:
                    os.kill(first, signal.SIGKILL)
            self.process.kill()

    def _first(self) -> int:
        """The number, outside, of the namespace's first process; 0 if there is none. bwrap tells it as soon
        as it has made it, and until then there is nothing that could be left behind."""
        said, deadline = b"", time.monotonic() + INFO_S
        while (
            b"}" not in said and select.select([self._info], [], [], max(0.0, deadline - time.monotonic()))[0]
        ):
            part = os.read(self._info.fileno(), 4096)
            if not part:
                break
            said += part
        found = re.search(rb'"child-pid": (\d+)', said)
        return int(found[1]) if found else 0


def run(source: str, stdin: bytes = b"", limits: Limits | None = None, fds: Sequence[int] = ()) -> Result:
    """Run the program ``source`` to its end, or to a limit; nothing of it is left when this returns.

    ``fds`` stay open in the program. Raises ``UserError`` where no sandbox can be had, ``RuntimeError`` when
    this one did not come up in time.
    """
    limits = limits or Limits()
    with spawn(source, stdin, limits, fds, subprocess.PIPE) as sandbox:
        return watch(sandbox, limits)


@contextlib.contextmanager
def spawn(
    source: str,
    stdin: bytes = b"",
    limits: Limits | None = None,
    fds: Sequence[int] = (),
    output: int = subprocess.DEVNULL,
    prelude: CodeType | None = None,
) -> Iterator[Sandbox]:
    """The program as a process, killed at the end of the ``with``. Nobody watches its wall clock.

    ``prelude`` runs before it in the same module: code of ours, from :func:`compiled`.
    """
    require()
    with _spawn(source, stdin, limits or Limits(), fds, output, prelude) as sandbox:
        yield sandbox


@functools.cache
def require() -> None:
    """Raises ``UserError`` unless a sandbox works here, and holds. Tried once a process (about 30 ms)."""
    if shutil.which("bwrap") is None:
        raise UserError("programs are run in a sandbox: install the Debian package bubblewrap (Linux)")
    if platform.machine() not in seccomp.MACHINES:
        raise UserError(f"the sandbox knows {', '.join(seccomp.MACHINES)}, not {platform.machine()}")
    limits = Limits(seconds=10.0, tasks=8)
    try:
        with _spawn(PROBE, b"", limits, (), subprocess.PIPE) as sandbox:
            result = watch(sandbox, limits)
    except RuntimeError as error:
        said = str(error)
    else:
        if result.stdout == b"contained\n":
            return
        said = f"{result.why}: {result.stderr.decode(errors='replace').strip()}"
    raise UserError(
        f"no sandbox works here ({said.splitlines()[-1][-200:]}): the Debian package bubblewrap needs user "
        "namespaces, or root and the right to mount, which containers often withhold"
    )


#: What must not work, tried: new processes, and threads without end (old kernels count them otherwise).
PROBE = """
import os, socket, sys, threading
for forbidden in (os.fork, socket.socket):
    try:
        forbidden()
    except PermissionError:
        continue
    sys.exit("the kernel does not apply the filter of system calls")
hold = threading.Event()
threads = [threading.Thread(target=hold.wait, daemon=True) for _ in range(20)]
threading.stack_size(1 << 16)
try:
    for thread in threads:
        thread.start()
    sys.exit("the kernel does not limit the number of threads")
except RuntimeError:
    hold.set()
print("contained")
"""


@contextlib.contextmanager
def _spawn(
    source: str,
    stdin: bytes,
    limits: Limits,
    fds: Sequence[int],
    output: int,
    prelude: CodeType | None = None,
) -> Iterator[Sandbox]:
    with contextlib.ExitStack() as files:
        program = files.enter_context(_sealed(marshal.dumps((INSIDE, prelude, source))))
        typed = files.enter_context(_sealed(stdin))
        filters = files.enter_context(_sealed(seccomp.program(platform.machine())))
        started, ready = pipe(files)
        info, told = pipe(files)
        os.set_blocking(started.fileno(), False)
        try:
            process = subprocess.Popen(
                _command(program.fileno(), ready.fileno(), filters.fileno(), told.fileno(), limits),
                stdin=typed,
                stdout=output,
                stderr=output,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
                pass_fds=[*(file.fileno() for file in (program, ready, filters, told)), *fds],
            )
        except OSError as error:
            raise RuntimeError(f"no sandbox could be started: {error}") from error
        told.close()
        with process:
            sandbox = Sandbox(process, started, info)
            try:
                yield sandbox
            finally:
                sandbox.kill()


def pipe(files: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Its end for reading, its end for writing; closed at the latest with ``files``."""
    reading, writing = os.pipe()
    return files.enter_context(os.fdopen(reading, "rb", 0)), files.enter_context(os.fdopen(writing, "wb", 0))


def _sealed(data: bytes) -> IO[bytes]:
    """A file in memory that is at its beginning and that its reader cannot make any larger."""
    file = os.fdopen(os.memfd_create("liubai", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b")
    file.write(data)
    file.flush()
    file.seek(0)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _command(program: int, ready: int, filters: int, told: int, limits: Limits) -> list[str]:
    # Root needs no user namespace. It would map onto root outside, whom the kernel lets have any number
    # of threads; so the program becomes a user of its own instead, once it is inside.
    root = os.geteuid() == 0
    user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
    return [
        *_walls(),
        *user,
        *("--size", str(limits.tmp_mb << 20), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/", "--seccomp", str(filters), "--info-fd", str(told), "--"),
        *(_interpreter(), *PYTHON_FLAGS, "-c", BOOT, str(program), str(ready)),
        *(str(_uid() if root else -1), str(math.ceil(limits.seconds) + 1), str(limits.memory_mb)),
        *(str(limits.tasks), str(limits.files), str(limits.tmp_mb)),
    ]


@functools.cache
def _walls() -> tuple[str, ...]:
    """The arguments that are the same for every run: namespaces, and the read-only system."""
    system = _system()
    parents = {str(parent) for place in (*system, *DEVICES) for parent in Path(place).parents} - {"/"}
    binds = [word for parent in sorted(parents) for word in ("--dir", parent)]  # or they would be root's
    for place in system:
        link = Path(place).is_symlink()
        binds += ["--symlink", os.readlink(place), place] if link else ["--ro-bind", place, place]
    for device in DEVICES:
        binds += ["--dev-bind", device, device]
    for packages in {sysconfig.get_path(kind, vars=_base()) for kind in ("purelib", "platlib")}:
        if Path(packages).is_dir():  # what the user has installed is nobody's business
            binds += ["--tmpfs", packages, "--remount-ro", packages]
    return (
        shutil.which("bwrap") or "bwrap",
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent"),
        *("--cap-drop", "ALL", *binds),
    )


def _system() -> list[str]:
    """What an interpreter needs: its file, the standard library, the system's shared libraries."""
    libraries = ["/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64"]
    own = [_interpreter(), *(sysconfig.get_path(k, vars=_base()) for k in ("stdlib", "platstdlib"))]
    shared = [str(path) for path in Path(sys.base_prefix, "lib").glob("libpython*.so*")]
    places = [place for place in dict.fromkeys([*libraries, *own, *shared]) if Path(place).exists()]
    inner = {p for p in places for q in libraries if p != q and Path(q) in Path(p).parents}
    return [place for place in places if place not in inner]


@functools.cache
def _interpreter() -> str:
    """The base interpreter: what a virtual environment adds is of no use inside."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _base() -> dict[str, str]:
    """Paths of the base installation, seen from within a virtual environment."""
    return {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}


def _uid() -> int:
    """A user whom nobody else has: the kernel counts its threads by user. From the upper half of what
    this user namespace (a container's, perhaps) has."""
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        span = min(max(int(first) + int(count) for first, _, count in map(str.split, lines)), 1 << 31)
    return span // 2 + (os.getpid() * 256 + next(_counter) % 256) % max(1, span // 2 - 1)


def watch(sandbox: Sandbox, limits: Limits) -> Result:
    """Read what the program prints until it ends or reaches a limit, then see that it is dead.

    For a sandbox of :func:`spawn` whose ``output`` is ``subprocess.PIPE``. Raises ``RuntimeError`` when the
    program has never begun.
    """
    started, process = time.monotonic(), sandbox.process
    assert process.stdout is not None
    assert process.stderr is not None
    output: dict[int, bytearray] = {
        process.stdout.fileno(): bytearray(),
        process.stderr.fileno(): bytearray(),
    }
    why = ""
    with selectors.DefaultSelector() as selector:
        for fd in output:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and not why:
            left = started + limits.seconds - time.monotonic()
            ready = selector.select(max(0.0, left)) if left > 0 else []
            if not ready:
                why = "timeout"
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                output[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
            if sum(map(len, output.values())) > limits.output_bytes:
                why = "output"
    if not why:  # it has closed its output, which is not yet its end
        try:
            process.wait(max(0.0, started + limits.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            why = "timeout"
    sandbox.kill()
    status = process.wait()
    stdout, stderr = (bytes(data) for data in output.values())
    try:
        sandbox.check()
    except RuntimeError as error:
        raise RuntimeError(f"{error} ({why or stderr.decode(errors='replace').strip()[-200:]})") from None
    return Result(
        None if why else status,
        stdout[: limits.output_bytes],
        stderr[-STDERR_TAIL:],
        why or _why(status, stderr),
        time.monotonic() - started,
    )


def _why(status: int, stderr: bytes) -> str:
    if status == 0:
        return "ok"
    if status > 128:
        return "timeout" if status == 128 + 24 else "signal"  # SIGXCPU: processor time
    last = stderr.rstrip().rpartition(b"\n")[2]
    return "memory" if last.startswith(b"MemoryError") else "exit"
