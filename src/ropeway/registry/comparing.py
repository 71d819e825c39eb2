"""How two versions differ: every fact in their JSON files (parameters, metrics, ledger), and which files changed."""

import json
from typing import Any

from ropeway.registry.blobs import read_blob
from ropeway.registry.core import Core, Facts
from ropeway.registry.rules import PackageFile
from ropeway.runtime.errors import DataError
from ropeway.storage import Store

# run.json holds parameters, metrics and ledger; a tokenizer's table would be a hundred thousand lines.
COMPARED = ("run.json", "config.json", "generation_config.json")
_MOST_BYTES = 8 << 20
_ABSENT = "absent"


def compare_cores(store: Store, old: Core, new: Core) -> Facts:
    """Return `{facts: {"run.json: params.seed": [1, 2]}, files: {path: added | removed | changed}}`.

    Raises:
        DataError: One of them is damaged.
    """
    before, after = _facts(store, old), _facts(store, new)
    changed = {
        key: [before.get(key, _ABSENT), after.get(key, _ABSENT)]
        for key in sorted({*before, *after})
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    }
    return {"facts": changed, "files": compare_files(old.files, new.files)}


def compare_files(old: tuple[PackageFile, ...], new: tuple[PackageFile, ...]) -> dict[str, str]:
    """Return what became of every path that is not the same in both."""
    before, after = ({file.path: file.sha256 for file in files} for files in (old, new))
    kinds = dict.fromkeys(before.keys() - after.keys(), "removed")
    kinds |= dict.fromkeys(after.keys() - before.keys(), "added")
    kinds |= {path: "changed" for path in before.keys() & after.keys() if before[path] != after[path]}
    return dict(sorted(kinds.items()))


def flatten(tree: Any, prefix: str = "") -> Facts:  # noqa: ANN401 - JSON
    """Return a JSON tree's leaves under dotted keys.

    >>> flatten({"a": {"b": 1}, "c": [2, 3]})
    {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    if isinstance(tree, list):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: Facts = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _facts(store: Store, core: Core) -> Facts:
    facts = flatten(dict(core.facts), "facts") if core.facts else {}
    for file in core.files:
        if file.path in COMPARED and file.bytes <= _MOST_BYTES:
            facts |= flatten(_read_json(store, file), f"{file.path}: ")
    return {key.replace(": .", ": "): value for key, value in facts.items()}


def _read_json(store: Store, file: PackageFile) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(read_blob(store, file))
    except ValueError as error:
        raise DataError(f"{store.url}: {file.path} is not JSON ({error})") from None
