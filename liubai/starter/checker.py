"""A checker of your own: called as f(gold, answer, meta), returns True, False, or a score from 0 to 1.

It runs in a process that may be killed, so it may be slow or crash; the answer is then counted as an
error, not as wrong. `answer` is what stood in the answer tags or the last box, already stripped.
"""

from math import gcd


def lowest_terms(gold: str, answer: str, meta: dict) -> float:
    """The right fraction in lowest terms; half of the score for the right value alone."""
    try:
        over, under = (int(part) for part in answer.split("/"))
        right_over, right_under = (int(part) for part in gold.split("/"))
    except ValueError:
        return 0.0
    if under == 0 or over * right_under != right_over * under:
        return 0.0
    return 1.0 if under > 0 and gcd(over, under) == 1 else 0.5
