"""The program in one sandbox, its tests in another: calls go over, plain values come back.

Both ends run this module, in the sandbox, before a call of :func:`serve` or of :func:`examine`.
The program's end holds no test and no expected result (it is told the names that the tests use), so there
is nothing for it to read, patch or leave early; the tests' end holds nothing of the program's but values of
exact built-in types, whose ``==`` is Python's own. What is not plain (an instance, a generator, a module)
stays where it is, and the other end has a :class:`Remote` for it; a remote is never equal to a plain value.

What does not come over, so that a right program may fail: the program can call a function or method of the
tests', but not look into an instance of a class that they define (a ``TreeNode``: let the program define
it); what it does in place to a list, dict, set or bytearray comes back where that is an argument itself,
as a new content: a list inside of it, or inside a tuple, that the tests still hold elsewhere is not changed.

On the wire: 8 bytes of length, then one encoded tuple: a request (``call``, ``bind``, ``operate``) or the
answer to one (``return``, ``raise``). Requests nest: a program may call a function that it was given.
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
from types import CodeType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:  # to import typing takes as long as to start Python
    from collections.abc import Callable, Iterable
    from typing import Any

MAX_MESSAGE = 64 << 20  #: bytes
MAX_DEPTH = 200  #: of nested values

#: What may be done to a remote, and how. No arithmetic, no order, no ``in``: an object that is close to
#: everything, or holds everything, would be right everywhere.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "__len__": len,
    "__bool__": bool,
    "__iter__": iter,
    "__next__": next,
    "__reversed__": reversed,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__str__": str,
    "__repr__": repr,
    "__hash__": hash,
    "__getattr__": getattr,
    "__setattr__": setattr,
    "__eq__": lambda value, other: bool(value == other),
}


class Broken(Exception):
    """The other end is gone, or does not keep to the format."""


class Link:
    """One end. ``open_all``: may the other end use what is offered in every way, or only call it?"""

    def __init__(self, inbox: int, outbox: int, open_all: bool) -> None:
        self.inbox, self.outbox, self.open_all = inbox, outbox, open_all
        self.names: dict[str, Any] = {}  # what "bind" gives out
        self.offered: list[Any] = []

    def ask(self, *request: Any) -> Any:
        """The other end's answer. Raises what was raised there, if it is built in.

        To the tests' end ``StopIteration`` comes from ``next`` alone, and is a ``RuntimeError`` elsewhere:
        raised by a function in ``map(f, cases)`` it would end the tests' loop as if all cases were done.
        """
        self._send(request)
        return self.wait(may_stop=self.open_all or request[:2] == ("operate", "__next__"))

    def wait(self, may_stop: bool = False) -> Any:
        """Answer requests until the answer to ours is there."""
        while True:
            kind, *fields = self._receive()
            if kind == "return":
                return fields
            if kind == "raise":
                raise _rebuilt(may_stop, *fields)
            try:
                answer = self._answer(kind, *fields)
            except Broken:
                raise
            except BaseException as error:  # SystemExit, too: it ends the call and not the link
                self._send(("raise", type(error).__name__, _text(error)))
            else:
                self._send(("return", *answer))

    def _answer(self, kind: str, *fields: Any) -> tuple[Any, ...]:
        if kind == "bind" and self.open_all:
            return ({name: self.names[name] for name in fields[0] if name in self.names},)
        if kind == "call":
            function, args, options = fields
            given = dict(enumerate(args)) | options  # by number or by name
            before = {key: self.encode(arg) for key, arg in given.items() if type(arg) in _IN_PLACE}
            value = function(*args, **options)
            return value, {k: given[k] for k, old in before.items() if self.encode(given[k]) != old}
        if kind == "operate" and self.open_all:
            operation, value, args = fields
            return (_OPERATIONS[operation](value, *args),)
        raise Broken(kind)

    def _send(self, message: tuple[Any, ...]) -> None:
        data = self.encode(message)
        view = memoryview(len(data).to_bytes(8, "big") + data)
        try:
            while view:
                view = view[os.write(self.outbox, view) :]
        except OSError:
            raise Broken("it is gone") from None

    def _receive(self) -> Any:
        size = int.from_bytes(self._read(8), "big")
        if size > MAX_MESSAGE:
            raise Broken("too long a message")
        try:
            message = Decoder(self, self._read(size)).value()
        except Exception as error:
            raise Broken("not in the format") from error
        if type(message) is not tuple or not message:
            raise Broken("not a message")
        return message

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self.inbox, min(size - len(data), 1 << 20))
            if not part:
                raise Broken("it is gone")
            data += part
        return bytes(data)

    def encode(self, value: Any) -> bytes:
        parts: list[bytes] = []
        self._encode(value, parts.append, 0)
        return b"".join(parts)

    def _encode(self, value: Any, put: Callable[[bytes], None], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise RecursionError("values are nested too deeply")
        kind: Any = next((base for base in type(value).__mro__ if base in _TAGS), None)
        if value is None:
            put(b"N")
        elif kind is bool:
            put(b"T" if value else b"F")
        elif kind is int:
            put(b"i%s;" % format(int.__index__(value), "x").encode())
        elif kind is float:
            put(b"f%s;" % float.hex(value).encode())
        elif kind is complex:
            put(b"c%s;%s;" % (float.hex(value.real).encode(), float.hex(value.imag).encode()))
        elif kind is str:
            data = str.encode(value, "utf-8", "surrogatepass")
            put(b"s%d;%s" % (len(data), data))
        elif kind in (bytes, bytearray):
            put(b"%s%d;%s" % (_TAGS[kind], len(value), bytes(value)))
        elif kind is dict:
            put(b"d%d;" % dict.__len__(value))
            for key, item in dict.items(value):
                self._encode(key, put, depth + 1)
                self._encode(item, put, depth + 1)
        elif kind is not None:
            put(b"%s%d;" % (_TAGS[kind], kind.__len__(value)))
            for item in kind.__iter__(value):
                self._encode(item, put, depth + 1)
        elif type(value) is Remote:
            put(b"y%d;" % object.__getattribute__(value, "_number"))
        elif type(value).__name__ in ("Fraction", "Decimal") and type(value).__module__ in _NUMBERS:
            text = str(value).encode()
            put(b"q%s;%s;" % (type(value).__module__.encode(), text))
        elif type(value) is ModuleType:
            put(b"m%s;" % value.__name__.encode())
        else:
            self.offered.append(value)
            put(b"o%d;" % (len(self.offered) - 1))


_NUMBERS = {"fractions": "Fraction", "decimal": "Decimal"}
_COLLECTIONS: dict[bytes, Callable[[Iterable[Any]], Any]] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"Z": frozenset,
}
_TAGS: dict[Any, bytes] = {  # bool before int: an instance of both is a bool
    bool: b"?",
    int: b"i",
    float: b"f",
    complex: b"c",
    str: b"s",
    bytes: b"b",
    bytearray: b"B",
    dict: b"d",
    **{kind: tag for tag, kind in _COLLECTIONS.items()},
}
_IN_PLACE = (list, dict, set, bytearray)


class Decoder:
    """Reads one value. Whatever the bytes are, it makes built-in types and remotes, or raises."""

    def __init__(self, link: Link, data: bytes) -> None:
        self.link, self.data, self.at = link, data, 0

    def value(self, depth: int = 0) -> Any:
        if depth > MAX_DEPTH + 2:
            raise ValueError("nested too deeply")
        tag = self.data[self.at : self.at + 1]
        self.at += 1
        if tag in (b"N", b"T", b"F"):
            return {b"N": None, b"T": True, b"F": False}[tag]
        word = self._word()
        if tag == b"i":
            return int(word, 16)
        if tag == b"f":
            return float.fromhex(word)
        if tag == b"c":
            return complex(float.fromhex(word), float.fromhex(self._word()))
        if tag == b"q":
            module = __import__(word) if word in _NUMBERS else None
            return getattr(module, _NUMBERS[word])(self._word())
        if tag == b"m":
            if word.partition(".")[0] not in sys.stdlib_module_names:
                raise ValueError("not a module of the standard library")
            __import__(word)
            return sys.modules[word]
        number = int(word)
        if tag == b"s":
            return self._bytes(number).decode("utf-8", "surrogatepass")
        if tag in (b"b", b"B"):
            return self._bytes(number) if tag == b"b" else bytearray(self._bytes(number))
        if tag == b"d":
            return {self.value(depth + 1): self.value(depth + 1) for _ in range(number)}
        if tag == b"o":
            return Remote(self.link, number)
        if tag == b"y":
            return self.link.offered[number]
        return _COLLECTIONS[tag](self.value(depth + 1) for _ in range(number))

    def _word(self) -> str:
        end = self.data.index(b";", self.at)
        word = self.data[self.at : end].decode("ascii")
        self.at = end + 1
        return word

    def _bytes(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError("shorter than it says")
        self.at += count
        return self.data[self.at - count : self.at]


class Remote:
    """Something that stays at the other end. What is done to it is done there."""

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **options: Any) -> Any:
        value, changed = _link(self).ask("call", self, args, options)
        given = dict(enumerate(args)) | options
        for key, new in changed.items():  # what the function did to its arguments
            arg = given[key]
            arg.clear()
            arg.extend(new) if type(arg) in (list, bytearray) else arg.update(new)
        return value

    def __eq__(self, other: object) -> bool:
        # two of the program's own objects are as equal as it says; nothing plain is equal to any of them
        return self is other or (type(other) is Remote and _operate(self, "__eq__", other) is True)


def _operation(name: str) -> Callable[..., Any]:
    def operate(self: Remote, *args: Any) -> Any:
        return _operate(self, name, *args)

    return operate


for _name in _OPERATIONS.keys() - {"__eq__"}:
    setattr(Remote, _name, _operation(_name))


def _link(remote: Remote) -> Link:
    link: Link = object.__getattribute__(remote, "_link")
    return link


def _operate(remote: Remote, operation: str, *args: Any) -> Any:
    (value,) = _link(remote).ask("operate", operation, remote, args)
    return value


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return ""


def _rebuilt(may_stop: bool, name: Any = "", text: Any = "", *_: Any) -> Exception:
    """An exception of the other end as one of this end. ``may_stop``: may it end an iteration?"""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    stops = kind in (StopIteration, StopAsyncIteration) and not may_stop
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or kind in _PARTICULAR or stops:
        kind, text = RuntimeError, f"{name}: {text}"
    error: Exception = kind(text)
    error.remote = True  # type: ignore[attr-defined]
    return error


#: Exceptions that cannot be made from a text.
_PARTICULAR = (
    UnicodeDecodeError,
    UnicodeEncodeError,
    UnicodeTranslateError,
    BaseExceptionGroup,
    ExceptionGroup,
)


def serve(inbox: int, outbox: int, source: str) -> None:
    """The program's end: run it once, then do as the tests ask until they are gone."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    link = Link(inbox, outbox, open_all=True)
    link.names = module.__dict__
    try:
        link.wait()
    except Broken:
        os._exit(0)


def examine(inbox: int, outbox: int, pieces: list[str], entry_point: str) -> None:
    """The tests' end: run ``pieces`` one after the other in one namespace, and write a line for each.

    On the standard output that this process began with: ``pass``, ``fail`` or ``broken`` and why (the
    piece needs what is not there). What the tests print goes nowhere.
    """
    report = os.dup(1)
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    codes = [compile(piece, "tests.py", "exec", dont_inherit=True) for piece in pieces]
    # a program must not replace what is built in, such as abs, unless it is asked to
    names = set[str]().union(*map(_names, codes)) - (set(dir(builtins)) - {entry_point})
    link = Link(inbox, outbox, open_all=False)
    try:
        (bound,) = link.ask("bind", sorted(names))
        module.__dict__.update({name: bound[name] for name in names & bound.keys() if name[:2] != "__"})
    except Exception:
        os._exit(0)  # the program did not come up: nothing passes
    for code in codes:
        said = "pass"
        try:
            exec(code, module.__dict__)
        except SystemExit as error:  # of the tests' own: the program's does not come through
            said = "fail" if error.code else "pass"
        except BaseException as error:
            own = isinstance(error, ImportError) and not hasattr(error, "remote")
            said = f"broken {_text(error)[:200]!r}" if own else "fail"
        os.write(report, said.encode("ascii", "backslashreplace") + b"\n")
    os._exit(0)


def _names(code: CodeType) -> set[str]:
    """All names that ``code`` may look up in its module."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
