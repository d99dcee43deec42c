"""The first code inside the sandbox: set the limits, give up root, run the program.

Never imported: :mod:`liubai.grade.sandbox` passes this text to ``python -c`` with the arguments
``PROGRAM_FD UID CPU_S MEMORY_MB TASKS FILES FILE_MB``. ``UID`` is -1 when the caller was not root.
"""

from __future__ import annotations

import os
import resource
import sys
from types import ModuleType


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


def main() -> None:
    fd, *numbers = (int(word) for word in sys.argv[1:])
    confine(*numbers)
    with open(fd, encoding="utf-8", errors="surrogatepass", newline="") as file:
        source = file.read()
    del sys.argv[1:]
    sys.argv[0] = "program.py"
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)


main()
