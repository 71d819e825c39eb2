"""Renders the generated parts of docs/reference as Markdown, from the code: `PAGES` maps a marker to its text.

docs/conf.py replaces a line `<!-- generated: NAME -->` by `PAGES[NAME]()` when the site is built, so a reference page
cannot be older than the code. Nothing here imports Sphinx: the tests read the same text.
"""

import ast
import importlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer
from pydantic import BaseModel

from ropeway.config import params as schema
from ropeway.config.describe import describe_field, first_paragraph, literal, sections
from ropeway.config.load_params import read_block
from ropeway.config.stages import READS, STAGES

ROOT = Path(__file__).parents[2]

# Classes of params.py whose own keys form a section of the page, in this order.
GROUPS = {
    "Sources": schema.FetchParams,
    "Mixture and loss mask": schema.RowParams,
    "Rows and epochs": schema.EpochParams,
    "Split and duplicates": schema.PrepareParams,
    "Base model": schema.BaseParams,
    "Training": schema.WeightParams,
    "Checkpoints and tracking": schema.TrainSettings,
    "Evaluation": schema.EvaluateParams,
    "Package": schema.PackageParams,
    "Gate": schema.Profile,
}


def render_params() -> str:
    """Return every key of a profile, then every section that a key can hold."""
    values = read_block(ROOT / "params.yaml", "laptop")
    lines: list[str] = []
    done: set[str] = set()
    for title, model in GROUPS.items():
        names = [name for name in schema.Profile.model_fields if name in _own_fields(model) and name not in done]
        done.update(names)
        lines += [f"## {title}", ""]
        rows = []
        for name in names:
            stages = ", ".join(stage for stage, keys in READS.items() if name in keys)
            rows.append((_anchored(name), *_describe_linked(model, name), literal(values[name]), stages or "none"))
        head = ("key", "type", "meaning", "in profile `laptop`", "read by stages")
        lines += [*_table(head, rows), ""]
    lines += ["## Sections", "", "The keys inside the values above.", ""]
    for section in sections():
        lines += [f"### {section.__name__}", "", first_paragraph(section), ""]
        rows = [(f"`{name}`", *_describe_linked(section, name)) for name in section.model_fields]
        lines += [*_table(("key", "type", "meaning"), rows), ""] if rows else []
    return "\n".join(lines)


def _describe_linked(model: type[BaseModel], name: str) -> tuple[str, str]:
    """Return (type, meaning) of a key, with links to the sections that they name."""
    kind, meaning = describe_field(model, name)
    return re.sub(r"(?<=mapping: )\w+(?: or \w+)*", _link_sections, kind), re.sub(
        r"(?<= See )\w+(?=\.$)", _link_sections, meaning
    )


def _link_sections(names: re.Match[str]) -> str:
    return " or ".join(f"[{name}](#{name.lower()})" for name in names[0].split(" or "))


def _own_fields(model: type[BaseModel]) -> list[str]:
    return [name for name in model.__annotations__ if name in model.model_fields]


def render_commands() -> str:
    """Return every command with its arguments and options."""
    from ropeway.cli.main import app

    lines: list[str] = []
    for name, command in commands(typer.main.get_command(app), "ropeway"):
        lines += [f"## {name}", "", " ".join(str(command.help).split()), ""]
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join([name, *(_usage(one) for one in arguments)])
        options = [one for one in command.params if one.param_type_name == "option" and "--help" not in one.opts]
        lines += ["```text", usage + (" [OPTIONS]" if options else ""), "```", ""]
        rows = [
            (_parameter_name(one), _parameter_default(one), _escape(one.help or "") + _parameter_range(one))
            for one in (*arguments, *options)
        ]
        lines += [*_table(("argument or option", "default", "meaning"), rows), ""] if rows else []
    return "\n".join(lines)


def commands(command: typing.Any, name: str) -> Iterator[tuple[str, typing.Any]]:  # noqa: ANN401 - typer's own click
    """Yield (full name, command) of every visible command below a group."""
    for key, child in getattr(command, "commands", {}).items():
        if child.hidden:
            continue
        if hasattr(child, "commands"):
            yield from commands(child, f"{name} {key}")
        else:
            yield f"{name} {key}", child


def _usage(parameter: typing.Any) -> str:  # noqa: ANN401
    name = parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _parameter_name(parameter: typing.Any) -> str:  # noqa: ANN401
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))


def _parameter_default(parameter: typing.Any) -> str:  # noqa: ANN401
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default == "":
        return ""
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else "off"
    return f"`{parameter.default}`"


def _parameter_range(parameter: typing.Any) -> str:  # noqa: ANN401
    if parameter.min is None:
        return ""
    return f" ({parameter.min} to {parameter.max})" if parameter.max is not None else f" (at least {parameter.min})"


def render_environment() -> str:
    """Return the environment variables, by what they are about."""
    from ropeway.runtime import environment

    lines: list[str] = []
    for title, variables in environment.VARIABLES.items():
        rows = [(f"`{one.name}`", one.meaning, one.default) for one in variables]
        lines += [f"## {title}", "", *_table(("variable", "meaning", "when not set"), rows), ""]
    renamed = ", ".join(f"`{old}` is now `{new}`" for old, new in environment.RENAMED.items())
    internal = ", ".join(f"`{name}`" for name in environment.INTERNAL)
    lines += [f"Renamed: {renamed}; the old name is an error.", ""]
    return "\n".join([*lines, f"Ropeway sets these for its own child processes; do not set them: {internal}."])


def render_exit_codes() -> str:
    """Return the table of exit codes, from the error classes."""
    from ropeway.runtime import errors

    table = importlib.import_module("ropeway.runtime.errors")
    rows = []
    for _name, error in inspect.getmembers(table, inspect.isclass):
        if issubclass(error, errors.RopewayError):
            rows.append((error.exit_code, error.__name__, first_paragraph(error)))
    rows.sort(key=lambda row: (row[0], row[1]))
    return "\n".join(
        _table(("code", "error", "meaning"), [(f"`{code}`", f"`{name}`", text) for code, name, text in rows])
    )


def render_stages() -> str:
    """Return what each stage reads and writes."""
    rows = []
    for stage in STAGES:
        inputs = [f"`{one}`" for one in stage.inputs] + [f"`.identity/{one}.json`" for one in stage.frozen]
        outputs = [f"`{one}`" for one in (*stage.outputs, *stage.metrics, *stage.plots)]
        rows.append((f"`{stage.name}`", ", ".join(inputs) or "nothing", ", ".join(outputs)))
    return "\n".join(_table(("stage", "reads, below runs/PROFILE", "writes, below runs/PROFILE"), rows))


_PLACE = re.compile(r'^    \w+ = _WorkspacePath\("(?P<path>[^"]+)"\)\s*(?:# (?P<text>.*))?$', re.MULTILINE)


def render_files() -> str:
    """Return the files and folders of a workspace, from `Workspace` and the outputs of the stages."""
    from ropeway.runtime import workspace

    writers = {
        f"runs/{{profile}}/{path}": stage.name
        for stage in STAGES
        for path in (*stage.outputs, *stage.metrics, *stage.plots)
    }
    source = Path(workspace.__file__).read_text(encoding="utf-8")
    rows = [
        (
            f"`{match['path'].replace('{profile}', 'PROFILE')}`",
            writers.get(match["path"], ""),
            _sentence(match["text"] or ""),
        )
        for match in _PLACE.finditer(source)
    ]
    return "\n".join(_table(("path", "written by stage", "holds"), rows))


# Modules whose first lines describe a format on disk.
FORMATS = {
    "Manifest": "ropeway.runtime.manifest",
    "Raw records": "ropeway.data.raw_records",
    "Tokens": "ropeway.data.tokenized",
    "Shards": "ropeway.data.shards",
    "Ledger": "ropeway.data.ledger",
    "Data profile": "ropeway.data.data_profile",
    "Records": "ropeway.data.record_index",
    "Digests of records": "ropeway.data.record_identity",
    "Drift": "ropeway.data.drift",
    "Checkpoints": "ropeway.stages.train.checkpoints",
    "Evaluation": "ropeway.stages.evaluate.stage",
    "Sample answers": "ropeway.stages.evaluate.samples",
    "Package": "ropeway.stages.package.stage",
    "Registry": "ropeway.registry.layout",
    "Logs of the registry": "ropeway.registry.log",
}


def render_formats() -> str:
    """Return the description of every format on disk, as its module has it."""
    lines: list[str] = []
    for title, name in FORMATS.items():
        path = ROOT / "src" / Path(*name.split(".")).with_suffix(".py")
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += [f"## {title}", "", f"`{name}`", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _anchored(name: str) -> str:
    """Return a key in code, with the anchor `param-NAME`."""
    return f"[`{name}`]{{#param-{name}}}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(str(cell).replace(chr(10), ' ') for cell in row)} |" for row in rows]


def render_families() -> str:
    """Return the table of model families that `make test-families` ran, from the file that it writes."""
    rows = json.loads((ROOT / "docs" / "measured" / "families.json").read_text(encoding="utf-8"))
    lines = ["| `model_type` | special | SDPA | our kernels | packed | layout trained | loss, first to last step |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows.values():
        proofs = " | ".join(row["proofs"][way] for way in ("sdpa", "variable length", "packed"))
        losses = f"{row['first_loss']:.2f} to {row['last_loss']:.2f}"
        lines.append(f"| `{row['model_type']}` | {row['special']} | {proofs} | {row['layout']} | {losses} |")
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "params": render_params,
    "commands": render_commands,
    "environment": render_environment,
    "exit-codes": render_exit_codes,
    "stages": render_stages,
    "files": render_files,
    "formats": render_formats,
    "families": render_families,
}
_MARKER = re.compile(r"(?m)^<!-- generated: ([a-z-]+) -->$")


def fill(text: str) -> str:
    """Return a page with its markers replaced; KeyError for a marker that nothing generates."""
    return _MARKER.sub(lambda match: PAGES[match[1]](), text)
