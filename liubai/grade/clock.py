"""How long the verdict in hand may still take.

``GraderPool`` kills a worker that is late, and nothing is then known of the answer. A verifier that can
stop by itself, and say "wrong", asks here. Outside a worker there is no clock.
"""

from __future__ import annotations

import math
import time

_deadline = math.inf


def start(seconds: float) -> None:
    """A verdict begins, which has ``seconds`` (wall clock)."""
    global _deadline
    _deadline = time.monotonic() + seconds


def left() -> float:
    """Seconds until the pool gives up; infinite when nobody waits."""
    return _deadline - time.monotonic()
