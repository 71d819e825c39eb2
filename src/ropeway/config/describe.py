"""Descriptions of the keys of params.yaml from the schema: type with range, meaning, JSON Schema.

The texts are those below each key in `params` and `sections`; they are read from the source when somebody asks.
"""

import ast
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ropeway.config import params as schema
from ropeway.config import sections as values_schema
from ropeway.config.presets import KEY, MERGED_SECTIONS, SECTION
from ropeway.config.suggestion import did_you_mean
from ropeway.runtime.errors import ConfigError


def sections() -> list[type[BaseModel]]:
    """Return every model that a value of a profile can be, in order of appearance."""
    found: dict[type[BaseModel], None] = {}

    def visit(annotation: object) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found:
            found[annotation] = None
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for part in typing.get_args(annotation):
            visit(part)

    for field in schema.Profile.model_fields.values():
        visit(field.annotation)
    return list(found)


def describe_field(model: type[BaseModel], name: str) -> tuple[str, str]:
    """Return (type with range, meaning) of a key."""
    field = model.model_fields[name]
    hints = typing.get_type_hints(
        next(one for one in model.__mro__ if name in vars(one).get("__annotations__", {})), include_extras=True
    )
    kind = describe_type(hints[name])
    if field.default is not PydanticUndefined:
        kind += f"; default `{literal_text(field.default)}`"
    elif field.default_factory is not None:
        kind += "; default empty"
    return kind, field_text(model, name) or _target_text(hints[name])


def field_text(model: type[BaseModel], name: str) -> str:
    """Return the text below a key in the schema, of the class that declares it; empty if there is none."""
    return next((text for one in model.__mro__ if (text := _read_field_texts().get((one.__name__, name)))), "")


def _target_text(annotation: object) -> str:
    """Return the first sentence of the section that a key holds."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return f"{first_paragraph(part)} See {part.__name__}."
    return ""


@cache
def _read_field_texts() -> dict[tuple[str, str], str]:
    texts = {}
    files = [Path(str(one.__file__)) for one in (schema, values_schema)]
    for node in chain.from_iterable(ast.parse(path.read_text(encoding="utf-8")).body for path in files):
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    texts[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return texts


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


def describe_type(annotation: object) -> str:  # noqa: PLR0911 - one return per kind of type
    """Return a type as a reader of params.yaml knows it, with its range.

    >>> describe_type(values_schema.Fraction), describe_type(values_schema.Dtype)
    ('number, 0 to 1', '`fp16`, `bf16` or `fp32`')
    >>> describe_type(values_schema.Positive | None)
    'whole number, more than 0; or null'
    """
    if isinstance(annotation, type) and annotation in _NAMES:
        return _NAMES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping: {annotation.__name__}"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _describe_range(parts[0], parts[1:])
    if origin is typing.Literal:
        *first, last = (literal(part) for part in parts)
        return f"{', '.join(first)} or {last}" if first else str(last)
    if origin is list:
        return f"list of {describe_type(parts[0])}"
    if origin is dict:
        return f"mapping, name → {describe_type(parts[1])}"
    if origin in (typing.Union, types.UnionType):
        described = [describe_type(part) for part in parts]
        if all(text.startswith("mapping: ") for text in described):
            return "mapping: " + " or ".join(text.removeprefix("mapping: ") for text in described)
        return "; or ".join(described)
    raise TypeError(f"no description of {annotation}")


def _describe_range(annotation: object, metadata: Sequence[object]) -> str:
    limits: dict[str, object] = {}
    for one in metadata:
        for constraint in getattr(one, "metadata", ()):
            for name in ("ge", "gt", "le", "lt", "min_length", "pattern"):
                value = getattr(constraint, name, None)
                if value is not None:
                    limits[name] = value
    text = describe_type(annotation)
    if "pattern" in limits:
        return f"{text} that matches `{limits['pattern']}`"
    if "min_length" in limits:
        return f"{text}, not empty"
    if {"ge", "le"} <= limits.keys():
        return f"{text}, {limits['ge']}" + (f" to {limits['le']}" if limits["le"] != limits["ge"] else "")
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    said = [f"{words[name]} {limits[name]}" for name in ("gt", "ge", "le", "lt") if name in limits]
    return ", ".join([text, *said])


def first_paragraph(thing: type) -> str:
    """Return the first paragraph of a class's docstring."""
    text = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    return " ".join(text.split())


def literal_text(value: object) -> str:
    """Return a value as params.yaml has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def literal(value: object) -> str:
    """Return a value as code; lists and mappings are shortened."""
    if isinstance(value, dict | list):
        return "…" if value else f"`{value}`"
    return f"`{literal_text(value)}`"


SCHEMA_FILE = "params.schema.json"
_EXAMPLES = {  # of keys whose type does not show one
    "model_name": "models/my-base",
    "template": "base",
    "deepspeed_config": "configs/zero2_cpu.json",
    "learning_rate": 1e-5,
    "datasets": [{"chats": {"max_val_set": 200}}],
    "sources": {
        "chats": {
            "kind": "files", "paths": ["data/chats.jsonl"], "rows": "messages", "columns": {}, "expected_rows": None,
        }
    },
}  # fmt: skip


def build_json_schema() -> dict[str, typing.Any]:
    """Return the JSON Schema of params.yaml, for editors.

    No key of a profile is required in it, because a preset may state it; Ropeway itself requires every key.
    """
    profile = schema.Profile.model_json_schema()
    definitions = profile.pop("$defs")
    for section in sections():
        own = definitions[section.__name__]
        _add_texts(own, section)
        if section.__name__ in _merged_names():
            own.pop("required", None)
    _add_texts(profile, schema.Profile)
    for name, example in _EXAMPLES.items():
        profile["properties"][name]["examples"] = [example]
    profile["properties"][KEY] = {"type": "string", "description": "Preset, or profile, whose values this one takes."}
    profile.pop("required")
    definitions["Profile"] = profile
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Ropeway params.yaml",
        "type": "object",
        "properties": {
            "profile": {"type": "string", "description": "The profile that `ropeway run` and `dvc repro` use."},
            SECTION: {
                "type": "object",
                "description": "Values that profiles share.",
                "additionalProperties": {"$ref": "#/$defs/Profile"},
            },
        },
        "required": ["profile"],
        "additionalProperties": {"$ref": "#/$defs/Profile"},
        "$defs": definitions,
    }


def _add_texts(own: dict[str, typing.Any], model: type[BaseModel]) -> None:
    own.pop("title", None)
    for name, one in own["properties"].items():
        one.pop("title", None)
        if text := field_text(model, name):
            one["description"] = text


def _merged_names() -> set[str]:
    """Return the names of the sections that are merged with those of a preset."""
    fields = (schema.Profile.model_fields[key].annotation for key in MERGED_SECTIONS)
    return {one.__name__ for one in fields if isinstance(one, type)}


@dataclass(frozen=True, slots=True)
class Described:
    """A key of params.yaml for a person.

    Attributes:
        key: Its dotted name, e.g. `evaluation.passkey.lengths`.
        kind: Its type and range.
        meaning: What it does.
        keys: Keys inside it, if it is a section.
    """

    key: str
    kind: str
    meaning: str
    keys: tuple[str, ...]


def explain_key(key: str) -> list[Described]:
    """Return the descriptions of a dotted key; several where sections of different kinds have it.

    Raises:
        ConfigError: No profile has this key; the message names similar ones.
    """
    models: list[type[BaseModel]] = [schema.Profile]
    *path, last = key.split(".")
    for part in path:
        models = [inner for model in models if part in model.model_fields for inner in _inner(model, part)]
    found = []
    for model in models:
        if last in model.model_fields:
            kind, meaning = describe_field(model, last)
            inner = dict.fromkeys(name for one in _inner(model, last) for name in one.model_fields)
            found.append(Described(key, kind, meaning, tuple(inner)))
    if not found:
        every = [".".join(one) for one in _iterate_keys(schema.Profile)]
        inner_keys = [one for one in every if one.endswith(f".{key}")]
        near = f"; did you mean {', '.join(inner_keys)}?" if inner_keys else did_you_mean(key, every, count=3)
        raise ConfigError(f"{key}: no key of params.yaml{near or '. `ropeway params show` lists the keys'}")
    return list(dict.fromkeys(found))


def _inner(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Return the sections that a key can hold."""
    found: dict[type[BaseModel], None] = {}

    def visit(annotation: object) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found[annotation] = None
        for part in typing.get_args(annotation):
            visit(part)

    visit(model.model_fields[name].annotation)
    return list(found)


def _iterate_keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name in model.model_fields:
        yield (name,)
        for inner in _inner(model, name):
            yield from ((name, *rest) for rest in _iterate_keys(inner))
