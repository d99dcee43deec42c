"""Where questions come from. A family is one file and one class; it is registered here."""

from liubai.errors import UserError, nearest
from liubai.problems.chain import Chain
from liubai.problems.compare import Compare
from liubai.problems.countdown import Countdown
from liubai.problems.family import Family, Habits, Split, problem_at, split_of
from liubai.problems.gym import PREFIX, gym_family

#: In the order in which they joined: it fixes the token ids of ``world_vocabulary``.
FAMILIES: dict[str, Family] = {f.name: f for f in (Countdown(), Chain(), Compare())}


def family(name: str) -> Family:
    """The family called ``name``: ours or ``gym:NAME``. Raises ``UserError`` that says which may be meant."""
    if name.startswith(PREFIX):
        return gym_family(name)
    try:
        return FAMILIES[name]
    except KeyError:
        raise UserError(f"there is no problem family '{name[:80]}'; {nearest(name, FAMILIES)}") from None


def world_vocabulary() -> tuple[str, ...]:
    """Every token text of every family, each once. A new family only ever adds to the end."""
    return tuple(dict.fromkeys(word for f in FAMILIES.values() for word in f.vocabulary))


__all__ = [
    "FAMILIES",
    "Family",
    "Habits",
    "Split",
    "family",
    "problem_at",
    "split_of",
    "world_vocabulary",
]
