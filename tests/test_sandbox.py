"""A program in the sandbox reaches no network, no file and no other process. Every attack is made."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import RAW, ROOT, attack, number, refusals, said

from liubai.errors import UserError
from liubai.grade import sandbox, seccomp
from liubai.grade.code import code
from liubai.grade.sandbox import Limits, require, run

try:
    require()
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

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
        lines = f"socket.create_connection(('127.0.0.1', {port}), 1)\nsocket.socket()\nsocket.socket(10)"
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
        lines += "\n".join(
            f"socket.socket({family}, {kind}, 0)" for family, kind in [(16, 3), (17, 3), (40, 1)]
        )
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
    source = """
    files = []
    try:
        while True: files.append(open("/dev/null"))
    except OSError as error: print(error.errno, len(files))
    """
    error, opened = map(int, said(source).split())
    assert (error, opened < 64) == (24, True)
    assert refusals("resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))") == {"ValueError"}


# --- where it does not work -------------------------------------------------------------------------


def test_without_bubblewrap_nothing_is_run(tmp_path: Path) -> None:
    script = "from liubai.grade.sandbox import run; run(\"open('ran', 'w')\")"
    env = {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert "UserError: programs are run in a sandbox: install the Debian package bubblewrap" in done.stderr
    broken = tmp_path / "bwrap"  # such as one that is not allowed to make namespaces
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        "no sandbox works here (the sandbox did not start (bwrap: No permissions to create new namespace))"
        in done.stderr
    )
    # one that runs the program as it is, in no sandbox at all
    broken.write_text('#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert "UserError: no sandbox works here" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_sandbox_that_does_not_come_up_is_nobodys_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_walls", lambda: ("/bin/sh", "-c", "echo no memory >&2; exit 1"))
    with pytest.raises(RuntimeError, match=r"did not start \(no memory\)"):
        run("print(1)")
    with pytest.raises(RuntimeError, match="did not start"):
        code("assert f(1)", "f = print", {})
    monkeypatch.setattr(sandbox, "_walls", lambda: ("/bin/sh", "-c", "exec sleep 60"))
    with pytest.raises(RuntimeError, match=r"did not start"):
        run("print(1)", limits=Limits(seconds=0.2))


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
        for name in ("sandbox", "seccomp", "inside", "link", "code", "reach", "clock"):
            shutil.copy(ROOT / "liubai" / "grade" / f"{name}.py", package)
        script = (
            "from liubai.grade.code import code\nfrom liubai.grade.sandbox import run\n"
            "print(code('assert f(1) == 2', 'def f(x): return x + 1', {}), run('import os; os.fork()').why)"
        )
        command = ["/usr/bin/python3", "-B", "-c", script]
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
    if "no sandbox works here" in done.stderr:
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
