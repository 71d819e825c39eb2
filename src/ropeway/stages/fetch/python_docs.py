"""Text that every machine has: the documentation shipped with the running Python.

Topics (the reference manual that `help()` shows) are documents. Docstrings of the standard library become
conversations. The library's source is parsed, never imported, so no code runs and the order never changes.
"""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ropeway.models.conversation import Conversation

# Common modules: about 500,000 characters of conversations. With the topics, about 260,000 tokens of a 4k vocabulary,
# and an epoch of about a minute on two cores.
MODULES = (
    "argparse", "base64", "bz2", "calendar", "cmd", "collections", "concurrent", "configparser", "contextlib",
    "csv", "dataclasses", "datetime", "difflib", "enum", "fileinput", "fractions", "functools", "graphlib", "gzip",
    "heapq", "ipaddress", "json", "logging", "lzma", "numbers", "os", "pathlib", "pickle", "platform", "pprint",
    "queue", "random", "re", "sched", "selectors", "shelve", "shlex", "shutil", "socket", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "urllib",
    "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip

# Source: the model card's 16 system messages, verbatim: those that suit these answers (1, 2, 4, 5, 6, 13, 16).
_DETAILED = "Provide a detailed answer so user don\u2019t need to search outside to understand the answer."
_FINDS = "You are an AI assistant that helps people find information."
_TEACHER = (
    "You are a teacher. Given a task, you explain in simple steps what the task is asking, any guidelines it provides"
)
SYSTEM_MESSAGES = (
    "",
    f"You are an AI assistant. {_DETAILED}",
    "You are a helpful assistant, who always provide explanation. Think like you are answering to a five year old.",
    "You are an AI assistant that follows instruction extremely well. Help as much as you can.",
    f"{_FINDS} {_DETAILED}",
    f"{_TEACHER} and how to use those guidelines to find the answer.",
    _FINDS,
)

_ENTRIES_PER_CONVERSATION = 4
_WHAT = ("What does {name} do?", "Please explain {name}.", "What is {name} for?")
_HOW = ("How is it called?", "What are its arguments?", "Show me its signature.")
_MORE = ("Tell me more.", "What else should I know about it?", "Go on, please.")


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The documentation of one module, class, function or method."""

    name: str
    text: str
    signature: str | None


def iterate_topics() -> Iterator[str]:
    """Yield every topic of `help()` as a document, by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def iterate_docstrings(library: Path | None = None, modules: tuple[str, ...] = MODULES) -> Iterator[Conversation]:
    """Yield conversations about the documented modules and classes of a standard library, a few members each."""
    library = library or Path(sysconfig.get_path("stdlib"))
    number = 0
    for module in modules:
        for path in _source_files(library, module):
            for entries in plan_conversations(
                path.read_text(encoding="utf-8"), _module_name(path.relative_to(library))
            ):
                system = SYSTEM_MESSAGES[number % len(SYSTEM_MESSAGES)]
                yield Conversation(tuple(_make_conversation(entries, number)), system)
                number += 1


def plan_conversations(source: str, module: str) -> list[list[IndexEntry]]:
    """Return the entries of each conversation about a module, in the order of its source."""
    tree = ast.parse(source)
    conversations = _group_entries(
        _read_entry(tree, module), [_read_entry(node, f"{module}.{node.name}") for node in _public_functions(tree)]
    )
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            name = f"{module}.{node.name}"
            conversations += _group_entries(
                _read_entry(node, name), [_read_entry(part, f"{name}.{part.name}") for part in _public_functions(node)]
            )
    return conversations


def _group_entries(head: IndexEntry | None, members: list[IndexEntry | None]) -> list[list[IndexEntry]]:
    entries = [entry for entry in (head, *members) if entry]
    return [entries[at : at + _ENTRIES_PER_CONVERSATION] for at in range(0, len(entries), _ENTRIES_PER_CONVERSATION)]


def _public_functions(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        part
        for part in node.body
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_")
    ]


def _read_entry(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> IndexEntry | None:
    text = (ast.get_docstring(node) or "").strip()
    if not text:
        return None
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return IndexEntry(name, text, f"{name}({ast.unparse(node.args)})")
    return IndexEntry(name, text, None)


def _make_conversation(entries: list[IndexEntry], number: int) -> list[str]:
    """Return the turns about these entries; `number` selects the wording of the questions."""
    turns: list[str] = []
    for at, entry in enumerate(entries, start=number):
        first, _, rest = entry.text.partition("\n\n")
        turns += [_WHAT[at % len(_WHAT)].format(name=entry.name), first]
        if entry.signature:
            turns += [_HOW[at % len(_HOW)], entry.signature]
        if rest.strip():
            turns += [_MORE[at % len(_MORE)], rest.strip("\n")]
    return turns


def _source_files(library: Path, module: str) -> list[Path]:
    """Return a module's file, or its package's files without tests."""
    files = [library / f"{module}.py"] if (library / f"{module}.py").is_file() else []
    packaged = (path for path in (library / module).rglob("*.py") if not {"test", "tests"} & set(path.parts))
    return files + sorted(packaged, key=lambda path: path.as_posix())


def _module_name(path: Path) -> str:
    return ".".join(part for part in path.with_suffix("").parts if part != "__init__")
