"""Writes the two files that the story begins with: questions with answers, and notes of colleagues.

    python examples/calendar/make.py            # needs: pip install reasoning-gym

``questions.jsonl`` are calendar questions of reasoning-gym, in its words and with its answers.
``notes.jsonl`` is what hurried colleagues wrote under *training* questions: some guess, some leave out the
counting, all slip now and then, and a few do it all again to check. Nothing marks the good notes.
"""

from __future__ import annotations

import argparse
import json
import random
from calendar import month_name
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from liubai.problems.questions import Questions, read_questions
from liubai.seeds import stream

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

GUESS = 0.18  #: of the notes: no thought, any answer
SKIP = 0.2  #: of the others: the counting is left out, and half of these are a day off
SLIP = 0.03  #: of the steps: the result is one off, and the rest goes on from there
CHECK = 0.2  #: of the notes with a thought: all of it once more; and again, should the two differ


class Author:
    """One colleague with one question: remembers nothing, slips now and then."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.skips = rng.random() < SKIP
        self.slips = 0

    def off(self, share: float) -> int:
        """What a result is off by."""
        if self.rng.random() >= share:
            return 0
        self.slips += 1
        return self.rng.choice((-1, 1))

    def number(self, value: int) -> int:
        """The result of a step."""
        return max(0, value + self.off(SLIP))

    def count(self, start: int, steps: int, way: int = 1) -> tuple[str, int]:
        """From weekday ``start`` on, one by one: ``Friday 1 Saturday 2 Sunday``."""
        if self.skips:
            day = (start + way * steps + self.off(0.5)) % 7
            return f"so {DAYS[day]}", day
        day, said = start, DAYS[start]
        for step in range(1, steps + 1):
            day = (day + way + self.off(SLIP)) % 7
            said += f" {step} {DAYS[day]}"
        return said, day


def weeks(author: Author, days: int) -> tuple[str, int]:
    """``73=10*7+3``, and the 3."""
    whole, rest = divmod(days, 7)
    rest = min(6, author.number(rest))
    return f"{days}={whole}*7+{rest}", rest


# Each kind of question: what the author writes, and the answer at its end.


def weekday_offset(about: dict[str, Any], author: Author) -> tuple[str, str]:
    said, rest = weeks(author, abs(about["offset_days"]))
    back = about["offset_days"] < 0
    counted, day = author.count(date.fromisoformat(about["start_date"]).weekday(), rest, -1 if back else 1)
    return f"{said}. {'Back: ' if back else ''}{counted}.", DAYS[day]


def weekday_of_date_from_first_date(about: dict[str, Any], author: Author) -> tuple[str, str]:
    end = date.fromisoformat(about["target_date"])
    before = (end.replace(day=1) - date(end.year, 1, 1)).days
    days = author.number(before + end.day - 1)
    said, rest = weeks(author, days)
    counted, day = author.count(DAYS.index(about["first_day"]), rest)
    return f"{month_name[end.month]} {end.day}: {before}+{end.day}-1={days}. {said}. {counted}.", DAYS[day]


KINDS = {work.__name__: work for work in (weekday_offset, weekday_of_date_from_first_date)}


@dataclass(frozen=True)
class Note:
    """``habit`` and ``slips`` are for the tests and the guide: the model never sees them."""

    thought: str
    answer: str
    habit: str
    slips: int

    @property
    def text(self) -> str:
        return f"<think> {self.thought} </think> <answer> {self.answer} </answer>"


def note(about: dict[str, Any], rng: random.Random) -> Note:
    """What one colleague writes under a question; ``about`` is what reasoning-gym says about it."""
    if rng.random() < GUESS:
        answer = rng.choice(DAYS)
        return Note(f"Looks like {answer}.", answer, "guess", 0)
    author, work = Author(rng), KINDS[about["task"]]
    thought, answer = work(about, author)
    habit = "skip" if author.skips else "count"
    if rng.random() < CHECK:
        habit += " and check"
        more, again = work(about, author)
        thought += f" Check: {more}"
        if again != answer:
            more, again = work(about, author)
            thought += f" No, again: {more}"
        answer = again
    return Note(thought, answer, habit, author.slips)


def ask(size: int) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(row, what it is about): ``size`` questions of each kind, no two about the same days."""
    import reasoning_gym

    for number, kind in enumerate(KINDS):
        seen: set[str] = set()
        asked = reasoning_gym.create_dataset(
            "calendar_arithmetic",
            tasks=[kind],
            seed=number * 1_000_000,
            size=100 * size,
        )
        for i in range(100 * size):
            entry = asked[i]
            about = entry["metadata"]
            key = json.dumps({k: v for k, v in about.items() if not k.startswith(("source", "diff"))})
            if key in seen:
                continue
            seen.add(key)
            yield {"question": entry["question"], "answer": entry["answer"]}, about
            if len(seen) == size:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--size", type=int, default=1200, help="questions of each kind, if there are as many")
    parser.add_argument("--notes", type=int, default=6, help="notes under each training question")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    asked = list(ask(options.size))
    random.Random(0).shuffle(asked)
    path = options.out / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in asked))
    notes: list[tuple[str, Note, bool]] = []  # prompt, note, is it right?
    for question in read_questions(Questions(path=str(path))):
        if question.held_out or question.left_out:
            continue
        for number in range(options.notes):
            made = note(asked[question.line - 1][1], stream(0, "note", question.line, number))
            notes.append((question.problem.prompt, made, made.answer == question.problem.gold))
    lines = (json.dumps({"prompt": prompt, "text": made.text}) + "\n" for prompt, made, _ in notes)
    (options.out / "notes.jsonl").write_text("".join(lines))
    print(f"{len(asked)} questions; {len(notes)} notes under those to train on")
    for habit in ("", *sorted({made.habit for _, made, _ in notes})):
        own = [right for _, made, right in notes if habit in ("", made.habit)]
        share, good = len(own) / len(notes), sum(own) / len(own)
        print(f"  {habit or 'all':16} {share:6.1%} of the notes, {good:.1%} right")


if __name__ == "__main__":
    main()
