"""What a client is told when there is no answer: a status and OpenAI's error object, and nothing of the
inside.

A text here is either fixed, or says which part of the client's own request cannot be: no traceback, no path,
no prompt, no answer. The log gets the kind of an unexpected error and where it was raised, and no more.
"""

from __future__ import annotations

import logging
import math
import traceback
from pathlib import Path
from typing import Any

import liubai
from liubai.errors import UserError
from liubai.serve.load import Busy, Unavailable

log = logging.getLogger("liubai.serve")

#: OpenAI's ``type`` by status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

#: The package: a place in a library says little.
HERE = Path(liubai.__file__).parent

WRONG = "the server had an error while it answered; the fault is not yours"


class Refused(Exception):
    """No answer: ``status`` and what the client is told. ``param`` names the part of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    @property
    def kind(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code},
        }


def bad(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """The request cannot be answered as it is."""
    return Refused(400, message, param=param, code=code)


def refusal_of(error: BaseException) -> Refused:
    """What a client may know of ``error``. What was not foreseen is logged by its kind and place."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(
            429,
            "too many requests are waiting; try again later",
            code="rate_limit_exceeded",
            retry_after_s=error.retry_after_s,
        )
    if isinstance(error, Unavailable):
        return Refused(
            503,
            "the model is not available at the moment; try again later",
            code="model_unavailable",
            retry_after_s=error.retry_after_s,
        )
    if isinstance(error, TimeoutError):
        return Refused(
            503,
            "the answer took longer than this server allows; ask for fewer tokens",
            code="timeout",
            headers={"X-Should-Retry": "false"},  # OpenAI's clients ask again after any other 503
        )
    if isinstance(error, UserError):  # one of ours: written for whoever asked
        return bad(" ".join(str(error).split()))
    note(error)
    return Refused(500, WRONG)


def note(error: BaseException) -> None:
    """For the log."""
    log.error("%s", named(error))


def named(error: BaseException) -> str:
    """The kind of an error and the place in our code: no message, which may hold anything."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(HERE)] or frames
    last = ours[-1] if ours else None
    place = "an unknown place"
    if last is not None:
        place = f"{Path(last.filename).stem}.{last.name}, line {last.lineno}"
    return f"unexpected {type(error).__name__} in {place}"
