"""Which models a registry has and which aliases a model has, also while a listing is out of date.

Some S3 servers answer a listing with an older state of the bucket, while reads of single objects are right. What a
listing leaves out is shown later, which is enough for a person. It is not enough for garbage collection and
withdrawal, where a model or alias that is not seen is deleted or withdrawn. So each name is also an entry of a numbered
log, written before the first event of that name. Its end is found by reading: the listing is a hint.

names/models/00000001.json              {"name": "laptop"}
names/aliases/laptop/00000001.json      {"name": "candidate"}

Names that an older Ropeway created have no entry until `register_listed`, which garbage collection calls.
"""

from ropeway.registry.layout import (
    Log,
    alias_log,
    aliases_folder,
    check_name_case,
    list_models,
    reviews_log,
    versions_log,
)
from ropeway.registry.log import count_numbered
from ropeway.runtime.errors import DataError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store

_MODELS = "names/models/"


def register_model(store: Store, name: str) -> None:
    """Record that a model exists, before its first version; raise RegistryError if another differs only in case."""
    registered = _read(store, _MODELS)
    check_name_case(store, name, registered)
    _register(store, _MODELS, name, registered)


def register_alias(store: Store, model: str, alias: str) -> None:
    """Record that a model has an alias, before the first event of it."""
    folder = _aliases(model)
    _register(store, folder, alias, _read(store, folder))


def register_listed(store: Store) -> None:
    """Record every listed name that has no entry: those of an older Ropeway."""
    registered = _read(store, _MODELS)
    for name in list_models(store):
        _register(store, _MODELS, name, registered)
    for name in all_models(store):
        for alias in store.list_folders(aliases_folder(name)):
            register_alias(store, name, alias)


def all_models(store: Store) -> list[str]:
    """Return the names of all models, listed or recorded; a recorded one can have no version yet."""
    return sorted({*list_models(store), *_read(store, _MODELS)})


def all_alias_names(store: Store, model: str) -> list[str]:
    """Return the names of all aliases of a model, listed or recorded; a recorded one can have no event yet."""
    return sorted({*store.list_folders(aliases_folder(model)), *_read(store, _aliases(model))})


def model_logs(store: Store, name: str) -> list[Log]:
    """Return every log of a model, the versions log first."""
    aliases = all_alias_names(store, name)
    return [versions_log(name), reviews_log(name), *(alias_log(name, alias) for alias in aliases)]


def _aliases(model: str) -> str:
    return f"names/aliases/{model}/"


def _key(folder: str, number: int) -> str:
    return f"{folder}{number:08d}.json"


def _read(store: Store, folder: str) -> list[str]:
    """Return the names in a log, oldest first."""
    keys = [_key(folder, number) for number in range(1, count_numbered(store, folder) + 1)]
    return [_parse(store, key, document) for key, document in zip(keys, store.get_many(keys), strict=True)]


def _register(store: Store, folder: str, name: str, registered: list[str]) -> None:
    """Append a name to a log and to `registered`, its content so far, unless it is there."""
    document = canonical_json({"name": name})
    while name not in registered:
        key = _key(folder, len(registered) + 1)
        if store.put_if_absent(key, document):
            registered.append(name)
        else:  # another writer was first
            registered.append(_parse(store, key, store.get(key)))


def _parse(store: Store, key: str, document: bytes) -> str:
    try:
        name = parse_json(document)["name"]
    except (ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str):
        raise DataError(
            f'{store.url}: {key} is damaged; expected {{"name": …}}. Restore it from a backup of the registry'
        )
    return name
