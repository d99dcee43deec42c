"""Words in, tokens, the same words out; and a template that says what it wrote of the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from liubai.errors import UserError
from liubai.problems import world_vocabulary
from liubai.text.template import BARE, THINK_ANSWER, Template, require_readable, template_for, text_of
from liubai.text.tokenizer import BOS, EOS, TAGS, UNKNOWN, TextTokenizer, word_level
from liubai.types import Sample, Span, Stop

WORDS = world_vocabulary()
TOKENIZER = word_level(WORDS)

#: The form of the templates of Qwen2.5 and others: every turn between marks, nothing prefilled.
QWEN = (
    "{%- if messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}\n"
)


# ---- the small world's tokenizer ----


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, *TAGS, BOS, EOS]), max_size=30))
def test_words_come_back(words: list[str]) -> None:
    text = " ".join(words)
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(words)  # one token a word, whole numbers and their signs too
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


@pytest.mark.parametrize("word", ["0", "7", "42", "99", "=81", ":13", "->99", "=big", ":far", "等等", *TAGS])
def test_a_whole_number_is_one_token(word: str) -> None:
    ids = TOKENIZER.encode(word)
    assert len(ids) == 1
    assert ids[0] == TOKENIZER.id_of(word)
    assert TOKENIZER.decode(ids) == word


def test_words_need_no_space_where_their_form_tells_them_apart() -> None:
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode("(3+4)*5=35:0->35<think></think>wait等等12")]
    assert " ".join(pieces) == "( 3 + 4 ) * 5 =35 :0 ->35 <think> </think> wait 等等 12"


def test_an_unknown_word_is_said_to_be_one() -> None:
    ids = TOKENIZER.encode("3 xylophone 4")
    assert [TOKENIZER.decode([i]) for i in ids] == ["3", UNKNOWN, "4"]


def test_special_ids_are_named() -> None:
    assert TOKENIZER.decode([TOKENIZER.eos_id]) == EOS
    assert TOKENIZER.bos_id is not None
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("<think> 3"), TOKENIZER.eos_id]
    assert TOKENIZER.decode(ids) == f"{BOS} <think> 3 {EOS}"
    assert TOKENIZER.decode(ids, skip_special=True) == "<think> 3"
    assert TOKENIZER.vocab_size == len({UNKNOWN, BOS, EOS, *TAGS, *WORDS})


def test_a_new_word_moves_no_old_id() -> None:
    more = word_level([*WORDS, "new"])
    assert [more.id_of(w) for w in WORDS] == [TOKENIZER.id_of(w) for w in WORDS]


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = TextTokenizer(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    text = f"{BOS} 3 4 5 ->35 <think> 3 + 4 =7 等等 </think>{EOS}"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text)) == TOKENIZER.decode(TOKENIZER.encode(text))
    assert (again.eos_id, again.bos_id) == (TOKENIZER.eos_id, TOKENIZER.bos_id)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="no end token '<end>'"):
        TextTokenizer(Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a")), eos="<end>")


# ---- templates ----


@pytest.mark.parametrize(
    ("source", "thinking", "prefilled", "end"),
    [
        (BARE, True, "<think>", f"{BOS} 1 2 <think>"),
        (BARE, False, "<think> </think>", f"{BOS} 1 2 <think> </think>"),
        (THINK_ANSWER, True, "<think>", "User: 1 2\nAssistant: <think>"),
        (THINK_ANSWER, False, "<think> </think>", "User: 1 2\nAssistant: <think>\n</think>"),
        (QWEN, True, "", "<|im_start|>user\n1 2<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN, False, "<think> </think>", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_a_template_says_what_it_prefilled(source: str, thinking: bool, prefilled: str, end: str) -> None:
    template = Template(TOKENIZER, source, thinking=thinking)
    assert template.render("1 2").endswith(end)
    assert template.prefilled == prefilled
    assert template.prompt_ids("1 2") == TOKENIZER.encode(template.render("1 2"))


def test_tags_in_the_question_are_not_taken_for_a_prefill() -> None:
    template = Template(TOKENIZER, QWEN)
    assert template.prefilled == ""
    assert template.render("say <think>").endswith("say <think><|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_without_a_template_gets_ours(tmp_path: Path) -> None:
    assert template_for(TOKENIZER, tmp_path).source == THINK_ANSWER
    (tmp_path / "chat_template.jinja").write_text(BARE)
    template = template_for(TOKENIZER, tmp_path, thinking=False)
    assert (template.source, template.thinking) == (BARE, False)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ messages[0].content",
        "{{ nothing.at.all }}",
        "{{ raise_exception('no system turn') }}",
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages | no_such_filter }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_broken_template_is_the_users_to_mend(source: str) -> None:
    with pytest.raises(UserError, match=r"chat template does not (parse|work)"):
        Template(TOKENIZER, source)


def test_a_template_may_leave_a_loop_as_in_transformers() -> None:
    source = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}!"
    assert Template(TOKENIZER, source).render("ok") == "ok!"


def test_a_template_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja' is not UTF-8"):
        template_for(TOKENIZER, tmp_path)


def test_a_template_says_itself_what_it_refuses() -> None:
    source = "{% if enable_thinking %}{{ raise_exception('Not so, please') }}{% endif %}"
    with pytest.raises(UserError, match=r"does not work: Not so, please; mend .*chat_template\.jinja"):
        Template(TOKENIZER, source + BARE)
    assert Template(TOKENIZER, source + BARE, thinking=False).render("1") == Template(
        TOKENIZER, BARE, thinking=False
    ).render("1")


def test_a_template_that_leaves_the_question_out_is_refused() -> None:
    with pytest.raises(UserError, match="the same prompt for different questions"):
        Template(TOKENIZER, "User: {{ message }} <think>")


def test_a_template_that_breaks_on_one_question_says_so() -> None:
    template = Template(TOKENIZER, "{{ messages[0].content }}{{ 1 / (messages[0].content | length - 2) }}")
    template.render("1")
    with pytest.raises(UserError, match="chat template does not work: division by zero"):
        template.prompt_ids("12")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(UserError, match="chat template does not work"):
        Template(TOKENIZER, source)


# ---- questions that a model can read ----


def test_a_model_that_cannot_read_the_questions_is_refused() -> None:
    """Their text looks well in every log; what the model is given are unknowns."""
    template = Template(TOKENIZER, BARE)
    with pytest.raises(UserError, match=r"cannot read these questions: \d+% of their tokens are unknown"):
        require_readable(template, ["What is the molar mass of water?"])
    require_readable(template, ["3 + 4 water"])
    bytes_ = Tokenizer(models.BPE())  # has no unknown
    bytes_.add_tokens([EOS])
    require_readable(Template(TextTokenizer(bytes_, bos=None), BARE), ["What?"])


# ---- answers as text ----


@pytest.mark.parametrize("stop", list(Stop))
def test_only_a_real_end_token_is_taken_off(stop: Stop) -> None:
    ids = tuple(TOKENIZER.encode(f"3 + 4 </think>{EOS}"))
    sample = Sample((1,), ids, (0.0,) * len(ids), stop, (Span(0, len(ids)),))
    wanted = "3 + 4 </think>" if stop is Stop.EOS else f"3 + 4 </think> {EOS}"
    assert text_of(Template(TOKENIZER, BARE), sample) == wanted


def test_a_template_has_what_transformers_gives_it() -> None:
    """A fixed date, so that a run can be repeated; a generation block is what stands in it."""
    said = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    source = "{{ strftime_now('%d %b %Y') }} " + said
    template = Template(word_level(["a"]), source)
    assert template.render("a") == "20 Jan 2025 a"
