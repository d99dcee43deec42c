"""The sentence for a request that is none: what pydantic found, in the words of whoever asked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from liubai.errors import nearest
from liubai.serve.errors import Refused, bad

#: Why a field is refused, where "it is wrong" would not say it.
WHY = {
    "logit_bias": "this server cannot bias tokens; leave 'logit_bias' out",
    "frequency_penalty": "this server has no penalties; leave 'frequency_penalty' out, or 0",
    "presence_penalty": "this server has no penalties; leave 'presence_penalty' out, or 0",
    "repetition_penalty": "this server has no penalties; leave 'repetition_penalty' out, or 1",
    "top_k": "this server samples by 'temperature' and 'top_p' only; leave 'top_k' out",
    "min_p": "this server samples by 'temperature' and 'top_p' only; leave 'min_p' out",
    "response_format": "this server cannot promise a format; leave 'response_format' out",
    "modalities": "this server writes text only; leave 'modalities' out",
    "audio": "this server writes text only; leave 'audio' out",
    "web_search_options": "this server does not search the web; leave 'web_search_options' out",
    "verbosity": "this server has no verbosity; say in a message how long the answer may be",
    "functions": "'functions' is an old form; use 'tools'",
    "function_call": "'function_call' is an old form; use 'tool_choice'",
    "best_of": "this server has no 'best_of'; for the best of several use 'paths' in /v1/chat/completions",
    "suffix": "this server cannot fill in the middle; leave 'suffix' out",
}

#: What pydantic says of a value, in words for whoever sends it. Fields are those of its ``ctx``.
WORDS = {
    "too_short": "must not be empty",  # no field asks for more than one
    "too_long": "must have {max_length} entries at most",
    "string_too_short": "must not be empty",
    "string_too_long": "must have {max_length} characters at most",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
}
#: Of fields that may have several forms, all of them: the errors tell of one.
FORMS = {
    "paths": "a text such as 'vote:8', or an object with 'kind' and 'n'",
    "tool_choice": "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': …}}",
    "thinking": "true, false or {'type': 'enabled', 'budget_tokens': …}",
    "prompt": "a text, a list of texts, or tokens",
    "stop": "a text, or a list of up to four",
}


def sentence(kind: type[BaseModel], value: dict[str, Any], error: ValidationError) -> Refused:
    """The first thing that is wrong with ``value``, which is no ``kind``, and its place."""
    errors = error.errors(include_input=False, include_url=False)
    found = [(_place(value, one["loc"], one["type"] == "missing"), one) for one in errors]
    first = found[0][0][:1]
    # of the forms that a field may have, the error that goes deepest is about the form that was meant
    place, one = max(
        (pair for pair in found if pair[0][:1] == first),
        key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")),
    )
    param = _named(place)
    if place and place[0] in WHY:
        return bad(WHY[str(place[0])], param, "unsupported_parameter")
    if one["type"] == "extra_forbidden":
        name = _named(place[-1:])
        hint = nearest(name, kind.model_fields) if len(place) == 1 else ""
        hint = f"; {hint}" if hint.startswith("did you mean") else ""
        return bad(f"unknown parameter '{param}'{hint}", param, "unknown_parameter")
    if one["type"] == "missing":
        return bad(f"'{param}' is missing", param, "missing_required_parameter")
    if one["type"] == "union_tag_invalid":  # pydantic's sentence quotes the request
        roles = " or ".join(one["ctx"]["expected_tags"].rsplit(", ", 1))
        return bad(f"'{param}.role' must be {roles}", f"{param}.role", "invalid_value")
    if len(place) == 1 and param in FORMS and one["type"].endswith(("_type", "literal_error")):
        return bad(f"'{param}' must be {FORMS[param]}", param, "invalid_value")
    if one["type"] in WORDS:
        bounds = {name: _plain(bound) for name, bound in one.get("ctx", {}).items()}
        said = WORDS[one["type"]].format(**bounds)
        return bad(f"'{param}' {said}", param, "invalid_value")
    message = str(one["msg"]).removeprefix("Value error, ")
    if not place:  # of several fields
        return bad(message, None, "invalid_value")
    return bad(f"'{param}': {message[:1].lower()}{message[1:]}", param, "invalid_value")


def _plain(bound: Any) -> Any:
    """2 for 2.0."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _place(value: Any, location: tuple[int | str, ...], missing: bool) -> tuple[int | str, ...]:
    """The keys and indices among ``location``, which also names the forms that were tried."""
    place: list[int | str] = []
    for i, step in enumerate(location):
        if isinstance(value, list):
            inside = isinstance(step, int) and step < len(value)
        else:
            inside = isinstance(value, dict) and step in value
        if inside:
            value = value[step]
        elif not (missing and i == len(location) - 1):
            continue
        place.append(step)
    return tuple(place)


def _named(place: tuple[int | str, ...]) -> str:
    """As OpenAI names it: ``messages[0].content``."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= 100 else f"{printable[:99]}…"
