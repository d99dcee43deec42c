"""One path, token by token: thoughts of a bounded length, tools in them, and nothing encoded twice.

``Parrot`` writes what a script says: its next token is a function of all tokens before it, so every cut,
replacement and result that was put in shows in what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from conftest import tiny_config, tiny_model
from families import QWEN2, QWEN_SPECIAL, THOUGHT, byte_level
from hypothesis import given
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.rollout.engine import Request, generate
from liubai.rollout.local import LocalWriter, run
from liubai.rollout.thinking import Ask, Path, Spent, Use, completing, is_open, one, split
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.writer import Heard, Judge, Piece
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import END_THINK, TextTokenizer, word_level
from liubai.types import Sample, Span, Stop

WORDS = word_level(["a", "b", "c", "x", "wait", "等等", "甲", "乙", "1", "2", "3"])
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENED = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"


def bpe(tags: Sequence[str]) -> TextTokenizer:
    backend = byte_level(QWEN2, QWEN_SPECIAL, tags)
    return TextTokenizer(backend, "<|im_end|>", None)


#: tags as single tokens (Qwen3), and as several (a base model that never had any)
ONE_TOKEN, SEVERAL = bpe((*THOUGHT, "<tool_call>", "</tool_call>")), bpe(())


class Parrot:
    """A writer of scripts: ``says(text so far)`` is the rest of the answer from there."""

    def __init__(self, tokenizer: TextTokenizer, says: Callable[[str], str]) -> None:
        self.tokenizer, self.says, self.requests = tokenizer, says, list[Request]()
        self.prompt, self.written = 0, 0

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        self.requests.append(request)
        before = self.tokenizer.decode(request.prompt_ids[self.prompt :])
        ids = [*self.tokenizer.encode(self.says(before)), self.tokenizer.eos_id][: request.max_tokens]
        ends = (*self.tokenizer.eos_ids, *request.stop_ids)
        stopped = next((i for i, token in enumerate(ids) if token in ends), None)
        if stopped is not None:
            ids = ids[: stopped + 1]
        self.written += len(ids)
        logprobs = tuple(-0.5 - 0.01 * i for i in range(len(ids)))
        for i, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            if heard:
                heard(Piece((token,), (logprob,), (((i, -1.0),),) if request.alternatives else ()))
        stop = Stop.LENGTH if stopped is None else Stop.EOS
        return Sample(request.prompt_ids, tuple(ids), logprobs, stop, (Span(3, len(ids)),))

    async def beams(self, request: Request, width: int) -> list[Sample]:
        raise NotImplementedError

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        raise NotImplementedError

    def judges(self) -> frozenset[Judge]:
        return frozenset()


def told(
    tokenizer: TextTokenizer,
    says: Callable[[str], str] | str,
    *,
    source: str = BARE,
    thinking: bool = True,
    max_tokens: int = 100,
    budget: int | None = None,
    at_least: int = 0,
    use: Use | None = None,
    alternatives: int = 0,
) -> tuple[Path, Parrot, Spent]:
    """The path, and that what was heard is its very tokens."""
    import asyncio

    template = Template(tokenizer, source, thinking=thinking)
    prompt = tuple(template.prompt_ids("a b"))
    parrot = Parrot(tokenizer, says if callable(says) else follow(says))
    parrot.prompt = len(prompt)
    ask = Ask(
        question="a b", template=template, prompt_ids=prompt, max_tokens=max_tokens, seed=5,
        budget=budget, at_least=at_least, use=use, alternatives=alternatives,
    )  # fmt: skip
    pieces, spent = list[Piece](), Spent()
    path = asyncio.run(one(parrot, ask, pieces.append, spent))
    assert tuple(i for p in pieces for i in p.ids) == path.sample.completion_ids
    assert tuple(x for p in pieces for x in p.logprobs) == path.sample.logprobs
    if alternatives:
        assert [len(p.alternatives) for p in pieces] == [len(p.ids) for p in pieces]
    assert path.tokens <= max_tokens
    assert len(path.given) == path.tokens
    # every request begins with the tokens that stand, as they stand
    for request in parrot.requests:
        assert request.prompt_ids[: len(prompt)] == prompt
    assert spent.written == parrot.written >= path.given.count(False)
    assert spent.read == sum(len(r.prompt_ids) for r in parrot.requests)
    return path, parrot, spent


def follow(script: str) -> Callable[[str], str]:
    """Says ``script`` word by word from where the text so far leaves it, whatever that says."""
    words = script.split(" ")
    return lambda before: " ".join(words[len(before.split()) :])


def along(*lines: str) -> Callable[[str], str]:
    """Goes on as the first of ``lines`` does that begins with the text so far."""

    def says(before: str) -> str:
        [line, *_] = [line for line in lines if line.startswith(before)] or [before]
        return line[len(before) :]

    return says


def test_undisturbed_it_is_one_request() -> None:
    path, parrot, spent = told(WORDS, "a b c </think> <answer> 3 </answer>")
    assert [r.seed for r in parrot.requests] == [5]
    assert (path.thought, path.content, path.answer) == ("a b c", "<answer> 3 </answer>", "3")
    assert path.response == "a b c </think> <answer> 3 </answer>"
    assert (path.thought_tokens, path.tokens, spent.written) == (3, 8, 8)
    assert path.logprob == pytest.approx(sum(path.sample.logprobs))
    assert path.ended
    assert not any(path.given)


def test_it_is_what_the_engine_writes() -> None:
    model = tiny_model(9, tiny_config(vocab_size=WORDS.vocab_size))
    engine = TorchEngine(model, eos_ids=WORDS.eos_ids, slots=4, max_length=80)
    engine.load(model.state_dict(), 0)
    template = Template(WORDS, BARE)
    asks = [
        Ask(question=q, template=template, prompt_ids=tuple(template.prompt_ids(q)), max_tokens=40, seed=i)
        for i, q in enumerate(("a", "b c", "1 2 3"))
    ]
    wanted = generate(
        engine, [Request(id=a.seed, prompt_ids=a.prompt_ids, max_tokens=40, seed=a.seed) for a in asks]
    )
    writer = LocalWriter(engine, eos_ids=WORDS.eos_ids)
    assert [p.sample for p in run(writer, [one(writer, ask) for ask in asks])] == wanted


def test_a_thought_that_has_its_budget_is_closed() -> None:
    def says(before: str) -> str:
        return "<answer> 2 </answer>" if "</think>" in before else "a b " * 40

    path, parrot, spent = told(WORDS, says, budget=6)
    assert path.response == "a b a b a b </think> <answer> 2 </answer>"
    assert path.forced
    assert path.given == (False,) * 6 + (True,) + (False,) * 4
    assert (path.answer, path.thought_tokens, spent.written) == ("2", 6, 10)
    assert path.sample.logprobs[6] == 0.0
    assert path.logprob == pytest.approx(sum(path.sample.logprobs))
    assert [r.max_tokens for r in parrot.requests] == [6, 93]
    assert len({r.seed for r in parrot.requests}) == 2


def test_a_budget_that_is_not_reached_changes_nothing() -> None:
    script = "a </think> <answer> 1 </answer>"
    assert told(WORDS, script, budget=30)[0] == told(WORDS, script)[0]
    path, parrot, _ = told(WORDS, script, budget=4)  # the answer is longer than the budget of the thought
    assert (path.response, path.forced) == (script, False)
    assert len(parrot.requests) == 2


def test_a_budget_of_nothing_is_an_answer_at_once() -> None:
    def says(before: str) -> str:
        return "<answer> 2 </answer>" if "</think>" in before else "a a a a"

    path, _, _ = told(WORDS, says, budget=0)
    assert path.response == "</think> <answer> 2 </answer>"
    assert path.thought == ""


def test_the_end_of_tokens_is_the_end_also_of_a_thought() -> None:
    path, _, _ = told(WORDS, "a " * 50, max_tokens=9, budget=20)
    assert (path.tokens, path.ended, path.answer, path.content) == (9, False, None, "")
    assert path.thought == "a " * 8 + "a"
    cut, _, _ = told(WORDS, "a </think> <answer> 1 </answer>", max_tokens=5)  # right, and not ended
    assert cut.response == "a </think> <answer> 1 </answer>"
    assert cut.answer is None


def test_a_thought_that_ends_too_soon_goes_on() -> None:
    """Once after each end, until it is long enough; the ends and their log-probabilities are gone."""

    says = along(
        "a </think> <answer> 3 </answer>",
        "a wait b c </think> <answer> 2 </answer>",
        "a wait b c wait b c </think> <answer> 1 </answer>",
    )
    path, _, spent = told(WORDS, says, at_least=5, alternatives=1)
    assert path.response == "a wait b c wait b c </think> <answer> 1 </answer>"
    assert [i for i, given in enumerate(path.given) if given] == [1, 4]
    assert spent.written == path.tokens - 2 + 2  # two ends were written for nothing
    assert not path.forced


def test_to_end_everything_in_a_thought_is_ending_too_soon() -> None:
    says = along("a", "a wait b </think> <answer> 1 </answer>")
    path, _, _ = told(WORDS, says, at_least=3)
    assert path.response == "a wait b </think> <answer> 1 </answer>"


def test_who_was_made_to_think_on_gets_to_the_answer() -> None:
    """Nobody who asks for a longer thought wants it in the place of the answer."""
    says = along("a", "a wait b", "a wait b </think> <answer> 1 </answer>")
    path, parrot, _ = told(WORDS, says, at_least=3)
    assert path.response == "a wait b </think> <answer> 1 </answer>"
    assert (path.answer, path.forced, path.thought_tokens) == ("1", True, 3)
    assert [i for i, given in enumerate(path.given) if given] == [1, 3]
    assert len(parrot.requests) == 3
    # one who says no more than the word it is given is let go at last, too
    mute, _, _ = told(
        WORDS, lambda b: "<answer> 1 </answer>" if "</think>" in b else "", at_least=90, max_tokens=200
    )
    assert (mute.thought, mute.answer) == (" ".join(["wait"] * 64), "1")
    # who ends by itself in a thought that nobody prolonged has said what it had to say
    own, _, _ = told(WORDS, "a b", at_least=2)
    assert (own.response, own.answer, own.thought_tokens, own.tokens) == ("a b", None, 2, 3)


def test_a_thought_that_is_opened_behind_the_answer_is_left_as_it_is() -> None:
    """Its end has been told already, and cannot be taken back."""
    path, _, _ = told(WORDS, lambda b: "<think>" if "</think>" in b else "a", at_least=2, budget=2)
    assert path.response == "a wait </think> <think>"
    assert path.ended


def test_a_chinese_thought_waits_in_chinese() -> None:
    says = along("甲 </think>", "甲 等等 乙 </think> <answer> 1 </answer>")
    assert told(WORDS, says, at_least=2)[0].thought == "甲 等等 乙"


def test_the_budget_outranks_the_least() -> None:
    def says(before: str) -> str:
        return "<answer> 1 </answer>" if "</think>" in before else "a </think>"

    path, _, _ = told(WORDS, says, at_least=50, budget=5)
    assert path.response == "a wait a wait a </think> <answer> 1 </answer>"


def test_an_end_is_not_replaced_for_ever() -> None:
    path, parrot, _ = told(
        WORDS,
        lambda b: "<answer> 1 </answer>" if "</think>" in b else "</think>",
        at_least=90,
        max_tokens=200,
    )
    assert path.ended
    assert path.thought == " ".join(["wait"] * 64)
    assert len(parrot.requests) < 70


def test_without_a_word_to_go_on_with() -> None:
    silent = word_level(["a"])
    with pytest.raises(UserError, match="no word for 'wait'"):
        told(silent, "a </think>", at_least=5)


def test_without_thinking_there_is_nothing_to_bound() -> None:
    script = "<answer> a b c a b c </answer>"
    path, _, _ = told(WORDS, script, thinking=False, budget=2, at_least=50)
    assert path.response == script
    assert (path.thought, path.thought_tokens, path.forced) == ("", 0, False)
    assert path.answer == "a b c a b c"
    assert not any(path.given)


@pytest.mark.parametrize("tokenizer", [ONE_TOKEN, SEVERAL], ids=["one token", "several"])
@pytest.mark.parametrize("source", [CHAT, OPENED], ids=["own tag", "opened"])
def test_tags_of_one_token_or_several(tokenizer: TextTokenizer, source: str) -> None:
    """Whether the model opens its thought itself or the template does."""
    opening = "" if source == OPENED else "<think>\n"
    thought = "so 3 > 2 >3 and 12 345."
    first = f"{opening}{thought}\n</think>\n\n\\boxed{{5}}"

    whole, parrot, _ = told(tokenizer, along(first), source=source)
    assert (whole.thought, whole.answer) == (thought, "5")
    assert len(parrot.requests) == 1
    ids, size = whole.sample.completion_ids, whole.thought_tokens
    assert tokenizer.decode(ids[:size]).rstrip() == f"{opening}{thought}"
    assert not f"{opening}{thought}\n".startswith(tokenizer.decode(ids[: size + 1]))

    second = f"{opening}{thought}\n\nWait, then 4.</think>\\boxed{{4}}"
    longer, _, _ = told(tokenizer, along(first, second), source=source, at_least=size + 1)
    assert (longer.thought, longer.answer) == (f"{thought}\n\nWait, then 4.", "4")
    assert longer.given.count(True) == len(tokenizer.encode("\nWait,"))

    short = tokenizer.decode(ids[: size - 4])
    third = f"{short}\n</think>\n\n\\boxed{{3}}"
    shorter, _, _ = told(tokenizer, along(first, third), source=source, budget=size - 4)
    if shorter.thought != thought:  # of a tag of several tokens, some are within the budget
        assert shorter.forced
    assert shorter.answer == "3"
    assert shorter.sample.completion_ids[: size - 4] == ids[: size - 4]


def test_a_token_may_hold_the_end_of_a_word_and_of_the_tag() -> None:
    """What is cut off with the tag is written again, and the thought is whole."""
    tokenizer = bpe((".</", "think", ">"))
    assert len(tokenizer.encode("so.</think>")) < len(SEVERAL.encode("so.</think>"))

    says = along("a.</think>\\boxed{2}", "a.\nWait, b.</think>\\boxed{1}")
    path, _, _ = told(tokenizer, says, source=OPENED, at_least=6)
    assert path.thought == "a.\nWait, b."
    assert path.answer == "1"


def test_what_completes_a_tag() -> None:
    assert completing(WORDS, END_THINK) == (WORDS.id_of(END_THINK),)
    assert completing(WORDS, "</tool_call>") == ()  # it cannot be written
    assert completing(ONE_TOKEN, "</tool_call>") == (ONE_TOKEN.id_of("</tool_call>"),)
    ends = completing(SEVERAL, END_THINK)
    for text in ("</think>", "so </think>", ".</think>\n\n", "x</think>3"):
        ids = SEVERAL.encode(text)
        first = next(i for i in range(len(ids) + 1) if END_THINK in SEVERAL.decode(ids[:i]))
        assert ids[first - 1] in ends
    assert not set(SEVERAL.encode("a = 3 + 4 wait")) & set(ends)


async def double(call: str) -> str | None:
    return None if call == "not mine" else call.replace("3", "33")


@pytest.mark.parametrize("tokenizer", [ONE_TOKEN, SEVERAL], ids=["one token", "several"])
def test_a_call_is_answered_where_it_stands(tokenizer: TextTokenizer) -> None:
    called = "I'll 1>2 <tool_call>\n{3}\n</tool_call>"
    answered = f"{called}\n<tool_response>\n{{33}}\n</tool_response>\nso 33"
    says = along(f"{called} and never this", f"{answered} </think>\\boxed{{33}}")
    path, _, _ = told(tokenizer, says, source=OPENED, use=double, max_tokens=300)
    assert path.thought == answered
    assert [(c.call, c.result) for c in path.calls] == [("{3}", "{33}")]
    given = [i for i, on in enumerate(path.given) if on]
    assert tokenizer.decode([path.sample.completion_ids[i] for i in given]).strip() == (
        "<tool_response>\n{33}\n</tool_response>"
    )
    assert path.answer == "33"


def test_calls_of_others_stand_as_they_are() -> None:
    script = "a <tool_call>not mine</tool_call> b</think>\\boxed{1}"
    path, _, _ = told(ONE_TOKEN, lambda before: script[len(before) :], source=OPENED, use=double)
    assert path.response == script
    assert path.calls == ()
    without, parrot, _ = told(ONE_TOKEN, script.replace("not mine", "3"), source=OPENED)
    assert without.calls == ()
    assert len(parrot.requests) == 1


def test_a_long_result_is_cut_and_leaves_room() -> None:
    async def much(call: str) -> str:
        return "3 4 " * 1000

    def says(before: str) -> str:
        return "b</think>\\boxed{1}" if "…" in before else "<tool_call>x</tool_call>"

    path, _, _ = told(ONE_TOKEN, says, source=OPENED, use=much, max_tokens=120)
    assert path.calls[0].result.endswith("…")
    assert path.calls[0].result.startswith("3 4 3 4")
    assert path.answer == "1"


@pytest.mark.parametrize("tokenizer", [ONE_TOKEN, SEVERAL], ids=["one token", "several"])
@pytest.mark.parametrize("length", [1, 2000])
def test_a_result_that_no_text_can_be_is_mended(tokenizer: TextTokenizer, length: int) -> None:
    """A call in JSON may hold half a surrogate pair, which whoever refuses it may quote."""

    async def refuse(call: str) -> str:
        return "no\ud800 3 " * length

    def says(before: str) -> str:
        _, told, since = before.rpartition("</tool_response>\n")
        return ("b</think>\\boxed{1}" if told else "<tool_call>x</tool_call>")[len(since) :]

    path, _, _ = told(tokenizer, says, source=OPENED, use=refuse, max_tokens=600)
    assert path.calls[0].result.startswith("no? 3")
    assert path.answer == "1"


def test_calls_come_to_an_end() -> None:
    def says(before: str) -> str:
        return "<tool_call>3</tool_call>"

    path, _, _ = told(ONE_TOKEN, says, source=OPENED, use=double, max_tokens=5000)
    assert len(path.calls) == 16


def test_an_error_of_a_tool_is_the_callers() -> None:
    async def broken(call: str) -> str:
        raise UserError("the tool is gone")

    with pytest.raises(UserError, match="gone"):
        told(ONE_TOKEN, "<tool_call>3</tool_call>", source=OPENED, use=broken)


@given(
    st.lists(
        st.sampled_from(["a", "b", "</think>", "<think>", "wait", "<answer>", "</answer>"]), max_size=20
    ),
    st.none() | st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 30),
)
def test_any_script_any_bounds(script: list[str], budget: int | None, at_least: int, max_tokens: int) -> None:
    """The invariants that ``told`` checks, and: no thought outgrows its budget, nothing goes on for ever."""
    path, parrot, _ = told(
        WORDS, follow(" ".join(script)), budget=budget, at_least=at_least, max_tokens=max_tokens
    )
    if budget is not None and script.count("<think>") == 0:
        assert path.thought_tokens <= budget
    assert path.ended or path.tokens == max_tokens
    assert len(parrot.requests) <= 70


def test_split_and_open() -> None:
    opened, bare = Template(WORDS, BARE), Template(ONE_TOKEN, CHAT)
    assert split(opened, "a b </think> c") == ("a b", "c")
    assert split(opened, "a b") == ("a b", "")
    assert split(bare, "a b") == ("", "a b")
    assert split(bare, "<think>a</think> b") == ("a", "b")
    assert is_open(opened, "a")
    assert not is_open(opened, "a </think>")
    assert not is_open(bare, "a")
    assert is_open(bare, "<think> a")
    assert not is_open(Template(WORDS, BARE, thinking=False), "a")
