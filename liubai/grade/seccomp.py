"""Which system calls a sandboxed program may not make: a filter for ``bwrap --seccomp``.

Namespaces and resource limits leave holes, and this closes them:

* Without new processes (``fork``, and ``clone`` that is not a thread) the memory of a program is that of
  *one* process, which the limit on its address space bounds. No cgroup is needed, and a fork bomb has
  nothing to begin with, even where the caller is root (whom ``RLIMIT_NPROC`` does not bind).
* Shared memory, ``memfd`` and message queues would be memory outside that address space.
* New namespaces would bring capabilities and mounts, such as a tmpfs without a size limit.
* ``socket`` is refused as a whole: a network namespace does not cover AF_VSOCK, by which a virtual machine
  talks to its host. ``socketpair`` stays: asyncio needs it, and it reaches nobody.
* ``ptrace``, ``bpf``, io_uring, user faults, keyrings and performance events are ways into a kernel that
  no test of a program needs.

The format is the kernel's classic BPF (linux/filter.h, linux/seccomp.h).
"""

from __future__ import annotations

import struct

#: Refused with EPERM: name -> numbers on (x86_64, aarch64), or ``None`` where the call does not exist.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "socket": (41, 198),
    "personality": (135, 92),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
CLONE = (56, 220)
CLONE3 = 435

#: Machines that the numbers are for, and what the kernel calls them (AUDIT_ARCH_…).
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; of an argument the low half
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # on x86_64: the same calls by other numbers


def program(machine: str) -> bytes:
    """The filter for ``machine`` (as ``platform.machine()`` says). Raises ``KeyError`` for others."""
    which = list(MACHINES).index(machine) if machine in MACHINES else None
    if which is None:
        raise KeyError(machine)
    refused = [numbers[which] for numbers in REFUSED.values()]
    # Labels are resolved to distances below. A jump is (op, constant, label if true, label if false).
    code: list[tuple[int, int, str, str]] = [
        (_LOAD, _ARCH, "", ""),
        (_EQUAL, MACHINES[machine], "", "kill"),  # 32-bit calls have numbers of their own
        (_LOAD, _NR, "", ""),
        (_AT_LEAST, _X32, "refuse", ""),
        (_EQUAL, CLONE[which], "clone", ""),
        (_EQUAL, CLONE3, "missing", ""),  # its flags cannot be seen from here; libc then uses clone
        *[(_EQUAL, number, "refuse", "") for number in refused if number is not None],
        (_RETURN, _ALLOW, "", ""),
    ]
    labels = {"clone": len(code)}
    code += [(_LOAD, _ARG0, "", ""), (_ANY_BIT, _CLONE_THREAD, "allow", "refuse")]
    for label, value in [
        ("allow", _ALLOW),
        ("refuse", _ERRNO | _EPERM),
        ("missing", _ERRNO | _ENOSYS),
        ("kill", _KILL),
    ]:
        labels[label] = len(code)
        code.append((_RETURN, value, "", ""))

    def distance(at: int, label: str) -> int:
        return labels[label] - at - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", op, distance(at, yes), distance(at, no), value)
        for at, (op, value, yes, no) in enumerate(code)
    )
