"""Digests of code by meaning: comments, docstrings and the text of messages do not count, constants do.

A stage depends on the digest of its room and of every module of ours the room imports, so a mended comment never makes
a trained model stale, and a changed constant on the floor always does.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ropeway.manifest import digest_of

PACKAGE = "ropeway"
# Left out: they decide how a run is described, started, logged or reported, not what it computes.
IGNORED = (
    "cli",
    "devices",
    "errors",
    "faults",
    "hub",
    "identity",
    "lock",
    "params",
    "s3_client",
    "storage",
    "supervise",
    "tracking",
    "train.disk",
    "train.flops",
    "train.progress",
    "train.stop",
    "train.watch",
    "workspace",
)
# A call of one of these says something to a person; its text is no part of the result.
SPEAKING = ("print", "debug", "info", "warning", "error", "exception")


def room_digest(source: Path, room: str) -> str:
    """Return the digest of a room's code; `source` is the folder `ropeway` with its modules."""
    modules = sorted(_reached(source, room))
    return digest_of({name: module_digest(_path(source, name).read_text(encoding="utf-8")) for name in modules})


@cache  # rooms share the floor: each module once per run, not once per room
def module_digest(text: str) -> str:
    """Return the sha256 of a module's syntax tree without docstrings and message texts.

    >>> module_digest("x = 1  # one") == module_digest("x = 1")
    True
    >>> module_digest("x = 1") == module_digest("x = 2")
    False
    """
    tree = _Meaning().visit(ast.parse(text))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _Meaning(ast.NodeTransformer):
    """Takes out of a tree what a person reads and a result does not depend on."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):  # strings standing alone: docstrings, also of attributes
            node.body = [part for part in body if not _is_text(part)] or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        _Silence().visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in SPEAKING:
            _Silence().visit(node)
            return node
        return self.generic_visit(node)


class _Silence(ast.NodeTransformer):
    """Empties every text below a node."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _reached(source: Path, room: str) -> set[str]:
    """Return the dotted names (below the package) of a room's modules and all they import of ours."""
    folder = source / room
    start = {".".join(path.relative_to(source).with_suffix("").parts) for path in folder.rglob("*.py")} or {room}
    waiting = {name.removesuffix(".__init__") for name in start} - set(IGNORED)
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        found.add(name)
        text = _path(source, name).read_text(encoding="utf-8")
        waiting |= (
            {other for other in _imports(source, text) if other.split(".")[0] not in IGNORED} - found - set(IGNORED)
        )
    return found


@cache
def _imports(source: Path, text: str) -> tuple[str, ...]:
    """Return modules of ours that a module imports; `from ropeway.x import y` may name x or x.y."""
    return tuple(_named(source, ast.parse(text)))


def _named(source: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            inner = node.module.removeprefix(PACKAGE).removeprefix(".")
            candidates = [inner, *(f"{inner}.{alias.name}".removeprefix(".") for alias in node.names)]
        elif isinstance(node, ast.Import):
            candidates = [alias.name.removeprefix(f"{PACKAGE}.") for alias in node.names if _is_ours(alias.name)]
        else:
            continue
        yield from (name for name in candidates if name and _path(source, name).is_file())


def _is_ours(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.")


def _path(source: Path, name: str) -> Path:
    path = source.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
