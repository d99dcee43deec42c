"""The first code inside the sandbox: set the limits, give up root, run the program.

Never imported: :mod:`liubai.grade.sandbox` compiles this text, and its ``BOOT`` runs it and calls ``main``.
The arguments of the process are ``FD STARTED UID CPU_S MEMORY_MB TASKS FILES FILE_MB``. A byte is written to
the file ``STARTED`` when all is set up; ``UID`` is -1 when the caller was not root.
"""

from __future__ import annotations

import os
import resource
import sys
from types import CodeType, ModuleType


def confine(uid: int, cpu_s: int, memory_mb: int, tasks: int, files: int, file_mb: int) -> None:
    """Limits that the program cannot raise again, and a user whom they bind."""
    for limit, value in [
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CPU, cpu_s),
    ]:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            os.setresuid(0, 0, 0)
        except PermissionError:
            return
        os._exit(99)  # still root: nothing may run


def main(prelude: CodeType | None, source: str) -> None:
    started, *limits = map(int, sys.argv[2:])
    # A session of its own, and no terminal. Not bwrap's --new-session: its processes stay in the caller's
    # process group, which may be killed as one.
    os.setsid()
    confine(*limits)
    os.write(started, b"1")  # raises when the caller is dead: nothing runs then
    os.close(started)
    sys.argv[:] = ["program.py"]
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    if prelude is not None:
        exec(prelude, module.__dict__)
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
