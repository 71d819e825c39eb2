"""Digests of code by meaning: comments, docstrings and the text of messages do not count, constants do.

A stage depends on the digest of its package and of every module of `data` and `models` that it imports, so an edited
comment never makes a trained model stale, and a changed constant always does.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import ropeway
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import digest_of, file_sha256, write_json

PACKAGE = "ropeway"
CODE = "code.json"  # in .work: what was parsed
# What a stage's code consists of besides its own package. Whatever else it imports decides how a run is described,
# started, logged or stored, not what it computes.
DIGESTED_PACKAGES = ("data", "models")
# A call of one of these says something to a person; its text is no part of the result.
LOGGING_CALLS = ("print", "debug", "info", "warning", "error", "exception")


class Scan(TypedDict):
    """What is kept of a module: its digest, and the names below the package that it may import."""

    digest: str
    names: list[str]


class Digests:
    """Digests of stages, each module parsed once; what was parsed is kept in a file by content, since a parse costs.

    A file that is missing, damaged or another code's is as good as none: everything is parsed again.
    """

    def __init__(self, source: Path, kept: Path | None = None) -> None:
        """Read what was kept; `source` is the folder `ropeway` with its modules."""
        self._source, self._file = source, kept
        # Another Python dumps a tree otherwise, another version of this module otherwise again.
        self._maker = f"{sys.version} {file_sha256(Path(__file__))}"
        self._kept: dict[str, Scan] = self._read()
        self._used: dict[str, Scan] = {}

    def modules(self, stage: str) -> dict[str, str]:
        """Return the digest of every module that a stage's code consists of, by its name below the package."""
        found: dict[str, str] = {}
        own = _own(stage)
        counted = (own, *DIGESTED_PACKAGES)
        waiting = _modules(self._source, own)
        while waiting:
            name = waiting.pop()
            scan = self._scan(name)
            found[name] = scan["digest"]
            ours = {other for other in scan["names"] if _path(self._source, other).is_file()}
            waiting |= {other for other in ours if f"{other}.".startswith(tuple(f"{one}." for one in counted))} - set(
                found
            )
        return dict(sorted({**found, **_templates(self._source, own)}.items()))

    def keep(self) -> None:
        """Write what was parsed, if it is not there already."""
        if self._file and self._used != self._kept:
            write_json(self._file, {"maker": self._maker, "scans": self._used, "digest": digest_of(self._used)})

    def _scan(self, name: str) -> Scan:
        data = _path(self._source, name).read_bytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._used:
            self._used[key] = self._kept.get(key) or _scan(data.decode())
        return self._used[key]

    def _read(self) -> dict[str, Scan]:
        try:
            kept = json.loads(self._file.read_bytes()) if self._file else {}
            whole = kept["maker"] == self._maker and kept["digest"] == digest_of(kept["scans"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return kept["scans"] if whole else {}


def name_changed_code(before: Mapping[str, str], kept: Path, stage: str) -> list[str]:
    """Return the modules of a stage whose digest is not as `before` (`Digests.modules`), as Python names them."""
    now = Digests(Path(ropeway.__file__).parent, kept).modules(stage)
    return [f"{PACKAGE}.{name}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def check_code(before: Mapping[str, str], kept: Path, stage: str) -> None:
    """Raise DataError when the code that a process imported is not what the digests are of; see `name_changed_code`."""
    changed = name_changed_code(before, kept, stage)
    if changed:
        raise DataError(
            f"{', '.join(changed)} changed after the digests of this run were taken, so it would compute by other code "
            "than is recorded. Run `dvc repro` or `ropeway run`, which take new digests"
        )


def check_code_digest(digest: str, kept: Path, stage: str) -> None:
    """Raise DataError as `check_code`, where only the digest of all modules is at hand."""
    if digest_of(Digests(Path(ropeway.__file__).parent, kept).modules(stage)) != digest:
        raise DataError(
            f"stage {stage}: a worker process imported other code than the digests of this run are of. Run `dvc repro` "
            "or `ropeway run`, which take new digests"
        )


def stage_code_digest(source: Path, stage: str) -> str:
    """Return the digest of a stage's code; `source` is the folder `ropeway` with its modules."""
    return digest_of(Digests(source).modules(stage))


def _scan(text: str) -> Scan:
    return {"digest": module_digest(text), "names": sorted(set(_named(ast.parse(text))))}


def module_digest(text: str) -> str:
    """Return the sha256 of a module's syntax tree without docstrings and message texts.

    >>> module_digest("x = 1  # one") == module_digest("x = 1")
    True
    >>> module_digest("x = 1") == module_digest("x = 2")
    False
    """
    tree = _StripText().visit(ast.parse(text))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _StripText(ast.NodeTransformer):
    """Takes out of a tree what a person reads and a result does not depend on."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):  # strings standing alone: docstrings, also of attributes
            node.body = [part for part in body if not _is_text(part)] or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        _EmptyStrings().visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in LOGGING_CALLS:
            _EmptyStrings().visit(node)
            return node
        return self.generic_visit(node)


class _EmptyStrings(ast.NodeTransformer):
    """Empties every text below a node."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _own(stage: str) -> str:
    """Return a stage's own package, below ours: stages that only show are modules of `reporting`."""
    return "reporting" if stage.startswith("report_") else f"stages.{stage}"


def _modules(source: Path, package: str) -> set[str]:
    """Return the dotted names (below ours) of a package's own modules."""
    paths = source.joinpath(*package.split(".")).rglob("*.py")
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for path in paths}


def _templates(source: Path, package: str) -> dict[str, str]:
    """Return path -> sha256 of a package's files that are no Python, e.g. the templates of pages."""
    paths = source.joinpath(*package.split(".")).rglob("*")
    others = (path for path in paths if path.is_file() and path.suffix not in (".py", ".pyc"))
    return {path.relative_to(source).as_posix(): file_sha256(path) for path in others}


def _named(tree: ast.AST) -> Iterator[str]:
    """Yield what may be modules of ours that a module imports; `from ropeway.x import y` may name x or x.y."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            inner = node.module.removeprefix(PACKAGE).removeprefix(".")
            yield from filter(None, [inner, *(f"{inner}.{alias.name}".removeprefix(".") for alias in node.names)])
        elif isinstance(node, ast.Import):
            ours = (alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
            yield from (name.removeprefix(f"{PACKAGE}.") for name in ours)


def _path(source: Path, name: str) -> Path:
    path = source.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
