"""What a score of verse is made of: a whole score cannot say whether tones rose or rhymes did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liubai.grade.judge import NAMED
from liubai.grade.sonnet import hear_sonnet
from liubai.grade.verse import read_verse


def parts_of(verifier: str, gold: str, answer: str, meta: Mapping[str, Any]) -> dict[str, float]:
    """Shares from 0 to 1 of each part that ``verifier`` weighs, ``verse/tones`` and so on; none of a verifier
    without parts. Raises ``ValueError`` as that verifier does."""
    if verifier not in NAMED:
        return {}
    read = read_verse if verifier == "verse" else hear_sonnet
    return {f"{verifier}/{name}": share for name, share in read(gold, answer, meta).parts.items()}
