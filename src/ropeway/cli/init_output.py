"""`ropeway init` in the terminal: what was found, the plan, a sample with its loss mask, the next command."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.text import Text

from ropeway.cli.inspect_output import draw_tokens
from ropeway.onboarding.start import InitRequest, Started, start_profile
from ropeway.planning.plan_text import summarize_plan
from ropeway.reporting.token_view import Vocabulary
from ropeway.runtime.terminal import AlignedTable, Command, format_number, show

_SHOWN_TOKENS = 120


def init(root: Path, request: InitRequest, *, as_json: bool) -> None:
    """Write the profile and print what it was derived from."""
    started = start_profile(root, request)
    planned, base = started.plan, started.measured.base
    if as_json:
        facts = {
            "profile": request.name,
            "sources": {one.name: _describe_source(started, number) for number, one in enumerate(started.data)},
            "base": {"family": base.family, "context": base.context, "rope": base.rope},
            "block": started.block,
            "to_check": list(started.open_points),
            "ignored": [{"file": file, "line": line} for file, line in started.ignored.lines],
            "plan": json.loads(planned.as_json()),
        }
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    heads = ("source", "layout", "records", "refused", "sequences", "median tokens", "longest", "contains")
    rows = [
        [format_number(value) for value in _describe_source(started, at).values()] for at in range(len(started.data))
    ]
    show(AlignedTable(heads, rows), "")
    print(started.block)
    show(Text("Plan", style="bold"), summarize_plan(planned), Command("ropeway plan", "all of it:"), "")
    ids, _ = started.measured.sample
    more = f" (the first {_SHOWN_TOKENS} of {len(ids):,} tokens)" if len(ids) > _SHOWN_TOKENS else ""
    show(f"The first sequence{more}; ⟦supervised⟧, │ between tokens:", _draw_sample(started), "")
    if started.open_points:
        show(Text("To check", style="bold"), *(f"- {one}" for one in started.open_points), "")
    written = started.ignored.files
    show(
        f"params.yaml: profile {request.name} added and selected.",
        *(
            f"{file}: {line} added, so git ignores the data; DVC records it by digest."
            for file, line in started.ignored.lines
        ),
        Command(_commit_command(request.name, written), "next:"),
        Command("ropeway run", "then:"),
    )


def _commit_command(name: str, ignoring: Sequence[str]) -> str:
    """Return the command that commits a profile and the .gitignore files that were written for it."""
    files = " ".join(shlex.quote(file) for file in ignoring)
    commit = f'git commit -m "Profile {name}" params.yaml'
    return f"git add {files} && {commit} {files}" if files else commit


def _draw_sample(started: Started) -> Text:
    ids, supervised = started.measured.sample
    pairs = zip(Vocabulary(started.measured.encoder.tokenizer).show(ids[:_SHOWN_TOKENS]), supervised, strict=False)
    return draw_tokens(pairs, is_colourful=False).append(" …" if len(ids) > _SHOWN_TOKENS else "")


def _describe_source(started: Started, number: int) -> dict[str, object]:
    data = started.data[number]
    tokens = started.measured.lengths[data.name].tokens
    contains = [*data.roles, *(["tools"] if data.has_tools else []), *(["reasoning"] if data.has_reasoning else [])]
    return {
        "name": data.name,
        "rows": data.source["rows"],
        "records": f"{data.read:,}{'' if data.is_complete else '+'}",
        "refused": sum(data.refused.values()),
        "sequences": len(tokens),  # conversations, or chunks of documents
        "median_tokens": int(np.median(tokens)),
        "longest_tokens": int(tokens.max()),
        "contains": ", ".join(contains) or "text",
    }
