"""Describe the origin of data and base model, for the model card, the review and run.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_FILES = 10  # listed individually; run.json lists all
_HUB = "https://huggingface.co"
_SHORT = 12


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of one input.

    Attributes:
        name: A file, a URL, a repository or a package.
        pin: Its version: a hash, a commit, a version number, or what its server stated.
        link: Its web page; None if there is none.
    """

    name: str
    pin: str = ""
    link: str | None = None

    def __str__(self) -> str:
        """Return `name (pin)`."""
        return f"{self.name} ({self.pin})" if self.pin else self.name


def describe_source(identity: Mapping[str, Any]) -> list[Origin]:
    """Return the origins of a source.

    Args:
        identity: As computed by `stages.fetch.sources` and stored in raw/manifest.json and run.json.
    """
    kind = identity["kind"]
    if kind == "huggingface":
        repo, commit = identity["repo"], identity["commit"]
        pin = f"commit {commit[:_SHORT]}, files {', '.join(identity['files'])}"
        return [Origin(repo, pin, f"{_HUB}/datasets/{repo}/tree/{commit}")]
    if kind == "python_docs":
        python = identity["python"]
        link = f"https://docs.python.org/{'.'.join(python.split('.')[:2])}/"
        return [Origin(f"the {identity['part']} of the documentation of Python {python}", link=link)]
    files = sorted(identity["files"].items())
    shown = [Origin(name, _pin(facts), _link(name)) for name, facts in files[:MOST_FILES]]
    more = len(files) - len(shown)
    return [*shown, *([Origin(f"{more:,} more files", "run.json lists them")] if more else [])]


def describe_base(model: Mapping[str, Any]) -> Origin:
    """Return the origin of the base model; `model` is that entry of base/manifest.json."""
    kind, name, origin = model["kind"], model["name"], model.get("origin") or {}
    if kind == "hub":
        return Origin(name, f"commit {origin['commit'][:_SHORT]}", f"{_HUB}/{name}/tree/{origin['commit']}")
    if kind == "gguf":
        return Origin(f"{origin['file']} in the Python package {origin['package']}", f"version {origin['version']}")
    if kind == "folder":
        return Origin("a local folder")
    return Origin("random weights, drawn from rng_seed")


def _pin(facts: str | Mapping[str, Any]) -> str:
    """Return the pin of a file: its sha256, or what its server stated."""
    if isinstance(facts, str):
        return f"sha256 {facts[:_SHORT]}…"
    words = {"etag": "ETag {}", "modified": "modified {}", "bytes": "{:,} bytes"}
    return ", ".join(text.format(facts[key]) for key, text in words.items() if facts.get(key) is not None)


def _link(name: str) -> str | None:
    return name if name.startswith(("https://", "http://")) and "?" not in name else None
