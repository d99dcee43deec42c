"""One seed derives every stream of a run: data, initialisation, sampling.

No stage keeps a stateful generator across steps. Every draw is keyed by (seed, names…), so a run
that resumes at step k draws what the uninterrupted run drew, and "the random state" of a
checkpoint is just the step number.
"""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called ``names`` under ``seed``. Stable across machines."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *names: str | int) -> random.Random:
    """A fresh ``random.Random`` for the stream called ``names``."""
    return random.Random(derive(seed, *names))
