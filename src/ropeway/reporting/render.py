"""HTML and Markdown from the files in `templates/`. All output of a template is escaped for its format."""

import base64
import hashlib
import json
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ropeway.reporting import markdown
from ropeway.reporting.colors import DARK, LIGHT
from ropeway.reporting.token_view import name_visibly, split_visible

_FENCE = 2  # index of the captured fence among the three parts per block in `collapse`
# Control characters, lone surrogates and bidirectional control characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def render(template: str, **values: object) -> str:
    """Return a rendered template of `templates/`; equal values give equal text, encodable as UTF-8.

    `*.md.jinja` is Markdown, everything else HTML. A `markupsafe.Markup` is not escaped, everything else
    is.
    """
    return _environment(is_markdown=template.endswith(".md.jinja")).get_template(template).render(values)


def collapse(text: str) -> str:
    """Return Markdown with one blank line between blocks; code blocks are unchanged."""
    parts = re.split(r"(?ms)(^(`{3,})[^\n]*\n.*?^\2$)", text.strip())
    return "".join(
        part if at % 3 == 1 else re.sub(r"\n{3,}", "\n\n", part) for at, part in enumerate(parts) if at % 3 != _FENCE
    )


@cache
def _environment(*, is_markdown: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("ropeway.reporting"),
        autoescape=True,
        finalize=_escape_markdown if is_markdown else _show_unsafe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_markdown,
    )
    environment.globals.update(light=LIGHT, dark=DARK)
    environment.filters.update(
        commas=lambda number: f"{number:,}",
        count=lambda number, what: f"{number:,} {what}{'' if number == 1 else 's'}",
        percent=lambda share, digits=1: f"{share:.{digits}%}",
        json=lambda value, indent=None: json.dumps(value, indent=indent, sort_keys=True),
        general=lambda number: f"{number:g}",
        yaml=lambda value: trusted(json.dumps(value)),  # a JSON string is a YAML string
        script_hash=_hash_script,
        stretches=split_visible,
        visibly=name_visibly,
        cell=lambda value: trusted(markdown.plain(value)),
        text=lambda value: trusted(markdown.escape(value)),
        code=lambda value: trusted(markdown.code(value)),
        fence=lambda value, language="": trusted(markdown.fence(str(value), language)),
        table=lambda rows, *, numbers=False: trusted(markdown.table(rows, numbers=numbers)),  # of Markdown cells
    )
    return environment


def _hash_script(script: str) -> str:
    """Return the source expression by which a page's content security policy admits its own script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _show_unsafe(value: object) -> object:
    """Return text with unsafe characters replaced by their code point; Jinja escapes it for HTML afterwards."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNSAFE.sub(lambda found: f"U+{ord(found[0]):04X}", value)


def _escape_markdown(value: object) -> Markup:
    return value if isinstance(value, Markup) else trusted(markdown.escape(value))


def trusted(text: str) -> Markup:
    """Mark text that is already escaped for its format as safe."""
    return Markup(text)  # noqa: S704 - the only place that marks text as safe
