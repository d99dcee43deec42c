"""How an answer is judged. Knows nothing of models and training.

An answer is right, wrong, missing, or — when its checker failed — an *error*, which is counted and never
mistaken for "wrong". Every rule about what counts as the answer stands in :mod:`liubai.grade.extract`.
"""

from liubai.grade.extract import Extracted, extract
from liubai.grade.format import check_format
from liubai.grade.judge import GradeItem, Verdict, check_verifier, grade, is_bounded, is_ours
from liubai.grade.language import consistency, words
from liubai.grade.pool import GraderPool, grade_lines
from liubai.grade.readable import ReadableConfig, unreadable
from liubai.grade.rewards import RewardWeights, reward, shuffled
from liubai.grade.verifiers import VERIFIERS, Verifier

__all__ = [
    "VERIFIERS",
    "Extracted",
    "GradeItem",
    "GraderPool",
    "ReadableConfig",
    "RewardWeights",
    "Verdict",
    "Verifier",
    "check_format",
    "check_verifier",
    "consistency",
    "extract",
    "grade",
    "grade_lines",
    "is_bounded",
    "is_ours",
    "reward",
    "shuffled",
    "unreadable",
    "words",
]
