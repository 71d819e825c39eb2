"""Digests of code that ignore comments, docstrings and message texts, but not constants.

A stage depends on the digests of its own package and of every module of `data` and `models` that it imports. An edited
comment therefore never invalidates a trained model, and a changed constant always does.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import ropeway
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import digest_of, file_sha256, write_json

PACKAGE = "ropeway"
CODE = "code.json"  # in .work: cache of parsed modules
# Packages that belong to a stage's code besides its own package. All other imports affect how a run is described,
# started, logged or stored, not its result.
DIGESTED_PACKAGES = ("data", "models")
# Functions that print or log a message; the text does not affect the result.
LOGGING_CALLS = ("print", "debug", "info", "warning", "error", "exception")


class Scan(TypedDict):
    """Cached result for one module: its digest and the names below the package that it may import."""

    digest: str
    names: list[str]


class Digests:
    """Digests of stages. Each module is parsed once; a cache file keeps the results by content.

    If the cache file is missing, damaged or from other code, every module is parsed again.
    """

    def __init__(self, source: Path, kept: Path | None = None) -> None:
        """Read the cache file `kept`; `source` is the folder `ropeway` with its modules."""
        self._source, self._file = source, kept
        # The dump of a tree depends on the Python version and on the version of this module.
        self._producer = f"{sys.version} {file_sha256(Path(__file__))}"
        self._kept: dict[str, Scan] = self._read()
        self._used: dict[str, Scan] = {}
        self._known: dict[str, bool] = {}

    @property
    def is_cold(self) -> bool:
        """Whether the cache file has nothing to use, so that every module must be parsed, which takes 1 s."""
        return not self._kept

    def modules(self, stage: str) -> dict[str, str]:
        """Return the digest of every module of a stage's code: name below the package -> digest."""
        found: dict[str, str] = {}
        own = _stage_package(stage)
        counted = (own, *DIGESTED_PACKAGES)
        waiting = _modules(self._source, own)
        while waiting:
            name = waiting.pop()
            scan = self._scan(name)
            found[name] = scan["digest"]
            ours = {other for other in scan["names"] if self._is_module(other)}
            waiting |= {other for other in ours if f"{other}.".startswith(tuple(f"{one}." for one in counted))} - set(
                found
            )
        return dict(sorted({**found, **_templates(self._source, own)}.items()))

    def keep(self) -> None:
        """Write the cache file if it changed."""
        if self._file and self._used != self._kept:
            write_json(self._file, {"maker": self._producer, "scans": self._used, "digest": digest_of(self._used)})

    def _is_module(self, name: str) -> bool:
        """Return whether a name is a module; stages import mostly the same names, and each look is a system call."""
        if name not in self._known:
            self._known[name] = _path(self._source, name).is_file()
        return self._known[name]

    def _scan(self, name: str) -> Scan:
        data = _path(self._source, name).read_bytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._used:
            self._used[key] = self._kept.get(key) or _scan(data.decode())
        return self._used[key]

    def _read(self) -> dict[str, Scan]:
        try:
            kept = json.loads(self._file.read_bytes()) if self._file else {}
            whole = kept["maker"] == self._producer and kept["digest"] == digest_of(kept["scans"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return kept["scans"] if whole else {}


def name_changed_code(before: Mapping[str, str], kept: Path, stage: str) -> list[str]:
    """Return a stage's modules whose digest differs from `before` (see `Digests.modules`), as dotted names."""
    now = Digests(Path(ropeway.__file__).parent, kept).modules(stage)
    return [f"{PACKAGE}.{name}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def check_code(before: Mapping[str, str], kept: Path, stage: str) -> None:
    """Raise DataError if a stage's code changed after its digests were taken; see `name_changed_code`."""
    changed = name_changed_code(before, kept, stage)
    if changed:
        raise DataError(
            f"{', '.join(changed)}: code changed after this run recorded its digests. Run `dvc repro` or "
            "`ropeway run`, which record new digests"
        )


def check_code_digest(digest: str, kept: Path, stage: str) -> None:
    """Raise DataError like `check_code`, given only the combined digest of all modules."""
    if digest_of(Digests(Path(ropeway.__file__).parent, kept).modules(stage)) != digest:
        raise DataError(
            f"stage {stage}: a worker process imported other code than this run recorded. Run `dvc repro` or "
            "`ropeway run`, which record new digests"
        )


def stage_code_digest(source: Path, stage: str) -> str:
    """Return the digest of a stage's code; `source` is the folder `ropeway` with its modules."""
    return digest_of(Digests(source).modules(stage))


@lru_cache(maxsize=256)  # stages share most modules, and parsing the package takes 1 s
def _scan(text: str) -> Scan:
    return {"digest": module_digest(text), "names": sorted(set(_imported_names(ast.parse(text))))}


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
    """Removes docstrings and message texts, on which no result depends, from a syntax tree."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):  # bare strings: docstrings, including those of attributes
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
    """Replaces every string constant below a node by an empty string."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _stage_package(stage: str) -> str:
    """Return the package of a stage, relative to ours; report stages are modules of `reporting`."""
    return "reporting" if stage.startswith("report_") else f"stages.{stage}"


def _modules(source: Path, package: str) -> set[str]:
    """Return the dotted names of the modules of a package, relative to our top package."""
    paths = source.joinpath(*package.split(".")).rglob("*.py")
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for path in paths}


def _templates(source: Path, package: str) -> dict[str, str]:
    """Return path -> sha256 of the files of a package that are not Python, e.g. page templates."""
    paths = source.joinpath(*package.split(".")).rglob("*")
    others = (path for path in paths if path.is_file() and path.suffix not in (".py", ".pyc"))
    return {path.relative_to(source).as_posix(): file_sha256(path) for path in others}


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of our modules that a module may import; `from ropeway.x import y` may mean x or x.y."""
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
