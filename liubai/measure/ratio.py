"""A mean over texts of unequal size, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def ratio_and_error(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    """``Σ totals / Σ sizes`` and its standard error, the texts being a sample of many (the ratio estimator,
    Cochran 1977, chapter 6). Of paired differences on the same texts it is the paired error: what makes one
    text harder than another for both models cancels out. The error is NaN below two texts, both are without
    a size. Raises ``ValueError`` when the two differ in number."""
    if len(totals) != len(sizes):
        raise ValueError(f"{len(totals)} totals of {len(sizes)} texts")
    n, whole = len(sizes), math.fsum(sizes)
    if not whole:
        return math.nan, math.nan
    ratio = math.fsum(totals) / whole
    if n < 2:
        return ratio, math.nan
    squares = math.fsum((total - ratio * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / whole
