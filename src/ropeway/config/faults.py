"""Validation errors of params.yaml as text: one line each, with the key, the expected and the found value."""

import typing
from pathlib import Path
from typing import TypeGuard, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ropeway.config.suggestion import did_you_mean
from ropeway.runtime.errors import DataError

T = TypeVar("T")

_EXPECTED = {
    "float_type": "a number", "int_type": "a whole number", "int_from_float": "a whole number",
    "bool_type": "true or false", "string_type": "text", "list_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "model_attributes_type": "a mapping",
    "greater_than": "more than {gt}", "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}", "less_than_equal": "at most {le}",
    "literal_error": "{expected}", "string_pattern_mismatch": "text like {pattern}",
}  # fmt: skip


def check_json(value: object, schema: type[T], *, where: Path | str, remedy: str) -> T:
    """Return `value`, read from the JSON at `where`, as the TypedDict `schema`; keys outside the schema are ignored.

    Raises:
        DataError: A key is missing or its value has another type. The message names file, key and `remedy`.
    """
    try:
        TypeAdapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        expected = _EXPECTED.get(fault["type"], "").format(**fault.get("ctx", {}))
        found = f"expected {expected}, found {_shown(fault['input'])}" if expected else fault["msg"]
        what = "missing" if fault["type"] == "missing" else found
        raise DataError(f"{where}: {'.'.join(map(str, fault['loc']))}: {what}. {remedy}") from None
    return cast("T", value)


def explain_faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one indented line per error, e.g. `  learning_rate: expected a number, found '1e-5x'`."""
    return [f"  {_explain(fault, model)}" for fault in error.errors(include_url=False)]


def _explain(fault: ErrorDetails, model: type[BaseModel]) -> str:
    kind = fault["type"]
    key, siblings = _locate(fault["loc"], model)
    context = fault.get("ctx", {})
    if kind in _EXPECTED:
        return f"{key or 'this profile'}: expected {_EXPECTED[kind].format(**context)}, found {_shown(fault['input'])}"
    if kind == "extra_forbidden":
        near = did_you_mean(str(fault["loc"][-1]), siblings)
        return f"{key}: unknown key" + (near or f"; known keys: {', '.join(siblings)}")
    if kind == "missing":
        return f"{key}: missing"
    if kind == "union_tag_invalid":
        return f"{key}.kind: expected one of {context['expected_tags']}, found {context['tag']!r}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _shown(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else repr(value)


def _locate(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, list[str]]:
    """Return the dotted key as written in the file, and the known keys of the section that contains it."""
    here: object = model
    key: list[str] = []
    known: list[str] = []
    for part in location:
        members = _members(here)
        tagged = [m for m in members if _is_model(m) and _tag(m) == part]
        if tagged:  # pydantic adds the union's tag to the location; the file has no such key
            here = tagged[0]
            continue
        key.append(str(part))
        known = []
        for member in members:
            if _is_model(member):
                known = list(member.model_fields)
                here = member.model_fields[str(part)].annotation if part in member.model_fields else None
            elif typing.get_origin(member) in (list, dict):
                here = typing.get_args(member)[-1]
    return ".".join(key), known


def _members(annotation: object) -> list[object]:
    """Return the members of a (possibly annotated) union; for any other annotation, the annotation itself."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if _is_model(annotation) or typing.get_origin(annotation) in (list, dict, typing.Literal):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in _members(part)] or [annotation]


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tag(model: type[BaseModel]) -> object:
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind else None
