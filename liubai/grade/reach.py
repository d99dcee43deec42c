"""Is anything tested when a test program runs? ``def test_f(): assert …`` that nothing calls passes always.

Decided by names, without running: what the module's own lines do, and in turn the bodies of the functions
and classes whose names stand there. That errs towards "yes": a function may be named and not be called, an
``assert`` may stand behind ``if False``. The gold decides what it proves; this finds the one that proves
nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

#: Names that may reach any other: whoever uses them is taken to call everything.
_DYNAMIC = {"globals", "locals", "vars", "dir", "exec", "eval", "getattr"}
#: Calls that end a run badly, as an ``assert`` does.
_ENDS = {"exit", "quit", "fail"}
_Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def reaches_test(piece: ast.Module, others: Iterable[ast.Module]) -> bool:
    """Does running ``piece`` reach an ``assert``, a ``raise``, an ``exit`` or ``unittest.main``?

    ``others``: modules whose definitions it may call, such as earlier pieces.
    """
    scopes: dict[str, list[_Scope]] = {}
    for module in (piece, *others):
        for node in ast.walk(module):
            if isinstance(node, _Scope):
                scopes.setdefault(node.name, []).append(node)
    seen: set[int] = set()
    todo: list[ast.AST] = [piece]
    while todo:
        names: set[str] = set()
        for node in _run(todo.pop()):
            if _tests(node):
                return True
            names |= _names(node)
        wanted = scopes.keys() if names & _DYNAMIC else names & scopes.keys()
        found = [scope for name in wanted for scope in scopes[name] if id(scope) not in seen]
        seen |= {id(scope) for scope in found}
        todo += found
    return False


def defines(module: ast.Module, name: str) -> bool:
    """Is there a function ``name`` on the module's own level?"""
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in module.body)


def calls(module: ast.Module, name: str) -> bool:
    """Does the module, outside of functions, name ``name``?"""
    return any(name in _names(node) for node in _run(module))


def _run(top: ast.AST) -> Iterator[ast.AST]:
    """What runs with ``top``: all of it but the bodies of the functions and methods inside.

    Where ``top`` is a class (one that is used) its methods belong to it.
    """
    todo = list(ast.iter_child_nodes(top))
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not isinstance(top, ast.ClassDef):
            todo += [*node.decorator_list, node.args]  # defaults are computed now
        else:
            todo += ast.iter_child_nodes(node)


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name):
        return {node.id}
    return {node.attr} if isinstance(node, ast.Attribute) else set()


def _tests(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert | ast.Raise):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = next(iter(_names(node.func)), "")
    if name == "main":  # unittest's; with exit=False nobody looks at what it found
        return not any(option.arg == "exit" for option in node.keywords)
    return name in _ENDS or name.lower().startswith("assert")
