"""Errors that are the user's to mend. The command line prints one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked (a flag, a file, a value). The message says what to do."""


class Diverged(UserError):
    """Training cannot go on from here: not a bug to trace, but a setting to change."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU or one of its libraries, or of the CPU: there PyTorch raises a plain RuntimeError."""
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def nearest(word: str, valid: Iterable[str]) -> str:
    """ " — did you mean 'x'?" for the closest valid word, or the list when nothing is close."""
    options = sorted(valid)
    # of three letters two may be the same by chance
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5 if len(word) > 3 else 0.7)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid: " + ", ".join(options)
