"""Real text that the benchmark's own environment holds: prose with code, the same for the same installed packages.

Documents: every package's long description (its README), text and Markdown files, then Python sources in the order of
the hash of their path, until there is enough. Conversations: questions and answers made of docstrings, as the fetch
stage's `python_docs` makes them, of sources in the same order.
"""

import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from ropeway.data.raw_records import Record, iterate_texts
from ropeway.models.conversation import Conversation
from ropeway.stages.fetch.python_docs import SYSTEM_MESSAGES, IndexEntry, plan_conversations

_SMALLEST, _LARGEST = 1_000, 1_000_000  # bytes of a file: neither stubs nor tables written as code
_ASK, _GO_ON, _CALL = "What does {name} do?", "Tell me more.", "How is it called?"


def documents(megabytes: float) -> list[str]:
    """Return documents of at least `megabytes` MB of UTF-8, or all there are."""
    site = Path(sysconfig.get_path("purelib"))
    prose = [
        path for pattern in ("*.dist-info/METADATA", "**/*.md", "**/*.rst", "**/*.txt") for path in site.glob(pattern)
    ]
    ordered = sorted(set(prose), key=lambda path: path.relative_to(site).as_posix())
    return _take((text for path in (*ordered, *_sources(site)) if (text := _read(path))), megabytes)


def conversations(megabytes: float) -> list[Conversation]:
    """Return conversations of at least `megabytes` MB of UTF-8, or all there are."""
    return _take(_talks(), megabytes)


def size(record: Record) -> int:
    """Return a record's bytes of UTF-8."""
    return sum(len(text.encode()) for text in iterate_texts(record))


def digest(records: Sequence[Record]) -> str:
    """Return which text it is: two benchmarks compare only where this is equal."""
    return sha256("\0".join(text for record in records for text in iterate_texts(record)).encode()).hexdigest()[:16]


def _take(records: Iterator[Record], megabytes: float) -> list[Record]:
    taken, so_far = [], 0
    for record in records:
        taken.append(record)
        so_far += size(record)
        if so_far >= megabytes * 1e6:
            break
    return taken


def _talks() -> Iterator[Conversation]:
    number = 0
    site, library = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))
    for folder in (library, site):
        for path in _sources(folder):
            for entries in _plan(path, ".".join(path.relative_to(folder).with_suffix("").parts)):
                turns = [turn for entry in entries for turn in _turns(entry)]
                yield Conversation(tuple(turns), SYSTEM_MESSAGES[number % len(SYSTEM_MESSAGES)])
                number += 1


def _plan(path: Path, module: str) -> list[list[IndexEntry]]:
    try:
        with warnings.catch_warnings(action="ignore"):  # a foreign source's invalid escapes
            return plan_conversations(_read(path) or "", module)
    except (SyntaxError, ValueError, RecursionError):  # templates, old Python: not this benchmark's text
        return []


def _turns(entry: IndexEntry) -> Iterator[str]:
    first, _, rest = entry.text.partition("\n\n")
    yield from (_ASK.format(name=entry.name), first)
    if entry.signature:
        yield from (_CALL, entry.signature)
    if rest.strip():
        yield from (_GO_ON, rest.strip("\n"))


def _sources(folder: Path) -> list[Path]:
    """Return the Python sources below a folder, mixed by hash, so that no package stands for all."""
    named = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    if folder.name != "site-packages":
        named = {path: name for path, name in named.items() if "site-packages" not in name}
    return sorted(named, key=lambda path: sha256(named[path].encode()).digest())


def _read(path: Path) -> str | None:
    """Return a file's text; None where it is too small, too large or not UTF-8."""
    if not _SMALLEST <= path.stat().st_size <= _LARGEST:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
