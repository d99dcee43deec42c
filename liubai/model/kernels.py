"""Optional compiled kernels: ``kernels.c``, built by the machine's C compiler where there is one.

A small model on a CPU spends half its time in passes over memory between matrix products. ``kernels.c``
makes each pass once. Nothing depends on it: where it cannot be built, on another device or in another
precision, the PyTorch code beside each call computes the same, more slowly. Set ``LIUBAI_KERNELS=off``
to do without.

The library lies in the user's cache folder, named after source, flags, compiler and processor. It shares
PyTorch's own OpenMP threads: a second pool would fight the first for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-std=gnu11", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
#: numbers of a head that fit the scratch space of decoding attention
LARGEST_HEAD = 256
#: what the first compilation may take, in seconds; it takes one
PATIENCE = 60

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
#: result and arguments of each function in kernels.c; a result that is not 0 is a failure
SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [None, _P, _P, _F, _I, _I, _P, _P],
    "rms_norm_backward": [ctypes.c_int, _P, _P, _P, _P, _I, _I, _P, _P],
    "swiglu": [None, _P, _P, _I, _P],
    "swiglu_backward": [None, _P, _P, _P, _I, _P, _P],
    "rotate": [None, _P, _I, _I, _I, _I, _I, _P, _P, _F, _I, _I, _P],
    "decode_attention": [ctypes.c_int, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _F, _P],
    "attention": [ctypes.c_int, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _P, _P],
    "attention_backward": [ctypes.c_int, *[_P] * 6, *[_I] * 6, _F, _P, _P, _P],
    "token_logprobs": [ctypes.c_int, _P, _P, _F, _I, _I, _P, _P],
    "token_logprobs_backward": [None, _P, _P, _P, _F, _I, _I, _P],
    "sample": [ctypes.c_int, _P, _P, _P, _I, _I, _P, _P],
}


class BadValue(ArithmeticError):
    """What PyTorch's operators refuse, too: an index out of range, logits that are NaN."""


class NoKernels(Exception):
    """Why there are none; shown in ``environment.json``."""


@cache
def library() -> ctypes.CDLL | NoKernels:
    """The compiled library, built if need be, or the reason why there is none."""
    try:
        if os.environ.get("LIUBAI_KERNELS", "on").lower() in ("off", "0", "no", "false"):
            raise NoKernels("LIUBAI_KERNELS=off")
        found = ctypes.CDLL(str(_built()))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except NoKernels as error:
        return error
    # they are optional: nothing about building them may stop a run (no HOME is a RuntimeError)
    except (OSError, ValueError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        return NoKernels(f"{type(error).__name__}: {error}")
    return found


def status() -> str:
    """For people: ``compiled``, or why not."""
    found = library()
    return f"none ({found})" if isinstance(found, NoKernels) else "compiled"


def ready(*tensors: Tensor) -> bool:
    """Can the kernels work on all of these: contiguous, on the CPU, single precision? While torch.compile
    looks on, no: it makes kernels of its own from what stands beside each call."""
    return (
        not torch.compiler.is_compiling()
        and not isinstance(library(), NoKernels)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    )


def _call(name: str, *arguments: Tensor | float) -> None:
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    failed = getattr(library(), name)(*values)
    if failed and failed & 2:
        raise BadValue(f"the kernel {name} was given an index out of range, or what is not a number")
    if failed:
        raise MemoryError(f"the kernel {name} found no memory for its scratch space")


# ---- one function a kernel; all tensors are `ready`, what is returned is new ----


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows of ``x [..., D]`` and their scales ``[..., 1]``."""
    _check(weight_D.shape == x.shape[-1:])
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    _call("rms_norm", x, weight_D, eps, scale.numel(), x.shape[-1], out, scale)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the weight."""
    _check(grad.shape == x.shape and weight_D.shape == x.shape[-1:] and scale.shape == (*x.shape[:-1], 1))
    of_x, of_weight_D = torch.empty_like(x), torch.empty_like(weight_D)
    _call("rms_norm_backward", grad, x, scale, weight_D, scale.numel(), x.shape[-1], of_x, of_weight_D)
    return of_x, of_weight_D


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate.shape == up.shape)
    out = torch.empty_like(gate)
    _call("swiglu", gate, up, gate.numel(), out)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check(grad.shape == gate.shape == up.shape)
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _call("swiglu_backward", grad, gate, up, gate.numel(), of_gate, of_up)
    return of_gate, of_up


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """``x [N, H, E]`` or ``[B, T, H, E]`` may have any strides but within a head; each of its rows has an
    angle of its own."""
    return (
        ready(cos, sin)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim in (3, 4)
        and x.stride(-1) == 1
        and cos.shape == sin.shape == (*x.shape[:-2], 1, x.shape[-1])
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = x.new_empty(x.shape)
    (outer, inner), (far, near) = ((*x.shape[:-2], 1)[:2], (*x.stride()[:-2], 0)[:2])
    H, E = x.shape[-2:]
    _call("rotate", x, outer, inner, far, near, x.stride(-2), cos, sin, direction, H, E, out)
    return out


def decode_attention(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    at_N: Tensor,
    keys_NKWE: Tensor,
    values_NKWE: Tensor,
    out_NHE: Tensor,
) -> None:
    """Write each row's key and value into its cache at ``at_N``, then attend to all up to there."""
    N, H, E = q_NHE.shape
    K, W = keys_NKWE.shape[1:3]
    _check(k_NKE.shape == v_NKE.shape == (N, K, E) and keys_NKWE.shape == values_NKWE.shape == (N, K, W, E))
    _check(out_NHE.shape == q_NHE.shape and H % K == 0 and E <= LARGEST_HEAD and _whole(at_N, N))
    _call(
        "decode_attention", q_NHE, k_NKE, v_NKE, at_N, keys_NKWE, values_NKWE, N, H, K, E, W, E**-0.5, out_NHE
    )


def attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention, and the logarithms of the softmax's denominators ``[B, H, T]``."""
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    _check(k_BSKE.shape == v_BSKE.shape == (B, S, K, E) and H % K == 0 and S >= T)
    out_BTHE, lse_BHT = torch.empty_like(q_BTHE), q_BTHE.new_empty(B, H, T)
    _call("attention", q_BTHE, k_BSKE, v_BSKE, B, T, S, H, K, E, E**-0.5, out_BTHE, lse_BHT)
    return out_BTHE, lse_BHT


def attention_backward(
    grad_BTHE: Tensor, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; the last two are what ``attention`` returned."""
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    _check(grad_BTHE.shape == q_BTHE.shape)
    seen = (grad_BTHE, q_BTHE, k_BSKE, v_BSKE, out_BTHE, lse_BHT)
    found = (torch.empty_like(q_BTHE), torch.empty_like(k_BSKE), torch.empty_like(v_BSKE))
    _call("attention_backward", *seen, B, T, S, H, K, E, E**-0.5, *found)
    return found


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and entropies, ``[N]`` in nats. ``logits_NV`` becomes the
    probabilities."""
    N, V = logits_NV.shape
    _check(_whole(targets_N, N))
    logprobs_N, entropy_N = logits_NV.new_empty(2, N)
    _call("token_logprobs", logits_NV, targets_N, temperature, N, V, logprobs_N, entropy_N)
    return logprobs_N, entropy_N


def token_logprobs_backward(
    grad_N: Tensor, probs_NV: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    N, V = probs_NV.shape
    _check(_whole(targets_N, N) and grad_N.shape == (N,))
    of_logits_NV = torch.empty_like(probs_NV)
    _call("token_logprobs_backward", grad_N, probs_NV, targets_N, temperature, N, V, of_logits_NV)
    return of_logits_NV


def sample(logits_SV: Tensor, uniform_S: Tensor, temperature_S: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`liubai.rollout.sampling.sample`; ``uniform_S`` is float64. Raises ``BadValue`` for logits
    that are not numbers."""
    S, V = logits_SV.shape
    _check(uniform_S.shape == temperature_S.shape == (S,))
    _check(uniform_S.dtype == torch.float64 and uniform_S.is_contiguous())
    ids_S, logprobs_S = torch.empty_like(uniform_S, dtype=torch.long), logits_SV.new_empty(S)
    _call("sample", logits_SV, uniform_S, temperature_S, S, V, ids_S, logprobs_S)
    return ids_S, logprobs_S


def _check(fits: bool) -> None:
    """C looks at no shape: a tensor that does not fit must not get there."""
    if not fits:
        raise ValueError("tensors of these shapes or types do not go together")


def _whole(numbers: Tensor, n: int) -> bool:
    return numbers.dtype == torch.long and numbers.is_contiguous() and numbers.shape == (n,)


# ---- building ----


def _built() -> Path:
    command = shlex.split(os.environ.get("CC") or "cc")
    compiler = shutil.which(command[0]) if command else None
    if compiler is None:
        raise NoKernels("no C compiler")
    version = _run([*command, "--version"])
    if "clang" in version:
        raise NoKernels("clang brings another OpenMP than PyTorch's; CC=gcc would do")
    openmp = _openmp()
    flags = [*FLAGS, f"-DLARGEST_HEAD={LARGEST_HEAD}"]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    facts = [SOURCE.read_text(encoding="utf-8"), *flags, *command, version, openmp, _processor()]
    folder = _folder()
    target = folder / f"kernels-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]}.so"
    if not _is_ours(target):
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
            fresh = Path(work) / "kernels.so"
            # PyTorch's own OpenMP library, and no other: a second pool of threads would fight the first
            linked = ["-Wl,--as-needed", openmp, "-lm"]
            _run([*command, *flags, "-shared", "-fPIC", "-o", str(fresh), str(SOURCE), *linked])
            fresh.replace(target)  # atomic: another process may be building the same
        _sweep(folder)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    if done.returncode:
        raise NoKernels(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _openmp() -> str:
    """The file of the OpenMP library that PyTorch runs on."""
    mapped = _mapped()
    home = Path(torch.__file__).parent
    own = [
        p for p in mapped if "libgomp" in p and Path(p).parent in (home / "lib", home.parent / "torch.libs")
    ]
    if len(own) != 1 or any("libomp" in p or "libiomp" in p for p in mapped):
        raise NoKernels("PyTorch does not run on a GNU OpenMP of its own here")
    return own[0]


def _mapped() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        raise NoKernels("only Linux tells which OpenMP library PyTorch runs on") from None
    return sorted({line.split(maxsplit=5)[-1] for line in maps.splitlines()})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return chr(10).join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))


def _folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "liubai"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NoKernels(f"no cache folder: {error}") from None
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NoKernels(f"{folder} is not ours alone to write to")  # code from there might be anyone's
    return folder


def _is_ours(path: Path) -> bool:
    """A library that we built: of this user, whole. Another one is built in its place."""
    try:
        found = path.lstat()
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()


def _sweep(folder: Path) -> None:
    """What was built for older sources, and what killed builders left, after a month."""
    for old in [*folder.glob("kernels-*.so"), *folder.glob("build-*")]:
        with suppress(OSError):
            if old.lstat().st_mtime < time.time() - 30 * 86400:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
