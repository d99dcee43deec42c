"""On what a run was made: the facts without which a figure cannot be compared."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from liubai import ranks

PACKAGES = ("liubai", "torch", "numpy", "tokenizers", "safetensors")


def describe(threads: int) -> dict[str, str | int]:
    """A flat JSON object: versions, processor, cores, threads, and how a stage that computes does so.
    Imports nothing heavy."""
    kernels = sys.modules.get("liubai.model.kernels")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        **({"ranks": ranks.world()} if ranks.world() > 1 else {}),
        **({"kernels": kernels.status()} if kernels else {}),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The processor's name and the vector units that decide its speed; empty where /proc is not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    lines = {name.strip(): value.strip() for name, value in pairs}
    flags = lines.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{lines.get('model name', platform.processor())} ({', '.join(units) or 'no AVX2'})"
