"""Where questions come from. A family is one file and one class; it is registered here."""

from collections.abc import Iterable

from liubai.errors import UserError, nearest
from liubai.problems.chain import Chain
from liubai.problems.compare import Compare
from liubai.problems.countdown import Countdown
from liubai.problems.errand import Errand
from liubai.problems.family import Family, Habits, Split, problem_at, split_of
from liubai.problems.greater import Greater
from liubai.problems.gym import PREFIX, gym_family
from liubai.problems.make import Make
from liubai.problems.passage import Passage
from liubai.problems.solve import Solve
from liubai.problems.total import Total
from liubai.problems.verse import Verse

#: The small world: figures and symbols. The order fixes the token ids of ``world_vocabulary``.
SMALL: tuple[Family, ...] = (Countdown(), Chain(), Compare())
#: The wide world: the same kinds of problems in words and in two languages, and prompts of other kinds.
WIDE: tuple[Family, ...] = (Make(), Total(), Greater(), Solve(), Passage(), Errand())
#: Families whose words no other one needs: each adds its own, where it is asked for.
APART: tuple[Family, ...] = (Verse(),)
FAMILIES: dict[str, Family] = {f.name: f for f in (*SMALL, *WIDE, *APART)}


def family(name: str) -> Family:
    """The family called ``name``: ours or ``gym:NAME``. Raises ``UserError`` that says which may be meant."""
    if name.startswith(PREFIX):
        return gym_family(name)
    try:
        return FAMILIES[name]
    except KeyError:
        raise UserError(f"there is no problem family '{name[:80]}'; {nearest(name, FAMILIES)}") from None


def world_vocabulary(names: Iterable[str] = ()) -> tuple[str, ...]:
    """Every token text of the small world, each once; with a family of the wide world among ``names``, of
    both; then those of the families of :data:`APART` among them. A new family only ever adds to the end of
    its world."""
    asked = set(names)
    wide = asked & {f.name for f in WIDE}
    families = (*SMALL, *(WIDE if wide else ()), *(f for f in APART if f.name in asked))
    return tuple(dict.fromkeys(word for f in families for word in f.vocabulary))


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
