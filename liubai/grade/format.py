"""Is a response written as asked: ``<think>…</think> <answer>…</answer>`` and nothing else?

Judged on the whole assistant turn, i.e. on what the template prefilled plus what the model wrote. A
grader that looks at the response alone stays at 0 for ever when the template writes ``<think>``.
"""

from __future__ import annotations

from liubai.grade.extract import ANSWER, END_ANSWER, END_THINK, MAX_RESPONSE, TAGS, THINK


def check_format(response: str, prefilled: str) -> bool:
    """True when the turn is one thought and one answer.

    ``prefilled`` is the text that the template put at the beginning of the assistant's turn: ``""``,
    ``"<think>"``, ``"<think>\\n"``, ``"<think> </think>"``. Each tag once and in order, only white
    space around and between the two parts. The thought may be empty, the answer may not (an empty
    answer tag would earn the format reward for nothing). The end-of-text token is already stripped.
    """
    if len(response) > MAX_RESPONSE:
        return False
    turn = (prefilled + response).strip()
    if any(turn.count(tag) != 1 for tag in TAGS):
        return False
    if not (turn.startswith(THINK) and turn.endswith(END_ANSWER)):
        return False
    # every tag stands there once, so these four positions are all there is
    thought_end, answer = turn.find(END_THINK), turn.find(ANSWER)
    between = turn[thought_end + len(END_THINK) : answer]
    inside = turn[answer + len(ANSWER) : -len(END_ANSWER)]
    return thought_end < answer and not between.strip() and bool(inside.strip())
