"""`ropeway inspect` in the terminal: colours where there are some, else marks; and the same for programs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ropeway.config.params import Profile
from ropeway.reporting.inspection import (
    Inspection,
    Prepared,
    inspect_row,
    inspect_sequence,
    list_sources,
    open_prepared,
    pair_tokens,
    to_json,
)
from ropeway.reporting.token_view import DisplayToken, TextKind, next_token, split_visible
from ropeway.reporting.turns import Cut, Turns, show_turn
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.workspace import Workspace

_SHOWN_CHARACTERS = 2_000  # of a value in a conversation; --json has all
_SUPERVISED, _MASKED, _OUTSIDE = "black on green", "dim", "dim italic"
_OPEN, _CLOSE, _BORDER = "⟦", "⟧", "│"  # where there are no colours


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """What to look at: a row of an epoch if one is named, else a sequence of a source, else the list of sources."""

    source: str | None
    number: int
    row: int | None
    epoch: int | None


def inspect(workspace: Workspace, profile: Profile, request: InspectRequest, *, as_json: bool) -> None:
    """Print what is wished for.

    Raises:
        ConfigError: It does not exist, or source and row are named together.
        DataError: The data is not prepared, or not what it says it is.
    """
    if request.epoch is not None and request.row is None:
        raise ConfigError("--epoch needs --row: a stored sequence does not depend on the epoch")
    if request.source is not None and request.row is not None:
        raise ConfigError("SOURCE and --row cannot be combined: a row can contain several sources")
    prepared = open_prepared(workspace, profile)
    found: Inspection | None
    if request.row is not None:
        found = inspect_row(prepared, request.row, epoch=request.epoch or 0)
    elif request.source is not None:
        found = inspect_sequence(prepared, request.source, request.number)
    else:
        found = None
    if as_json:
        print(json.dumps(list_sources(prepared)) if found is None else to_json(found, prepared))
    elif found is None:
        print_sources(prepared)
    else:
        print_inspection(found, prepared)


def print_inspection(inspection: Inspection, prepared: Prepared, console: Console | None = None) -> None:
    """Print an inspection: colours where the terminal has them, else marks."""
    console = console or Console(highlight=False)
    is_colourful = console.color_system is not None and not console.no_color
    for line in draw_inspection(inspection, prepared, is_colourful=is_colourful):
        encoding = console.encoding
        if not encoding.lower().startswith("utf"):  # a terminal that lacks a sign gets its escape, not an error
            console.print(Text(line.plain.encode(encoding, "backslashreplace").decode(encoding)), soft_wrap=True)
        else:
            console.print(line, soft_wrap=True)


def draw_inspection(inspection: Inspection, prepared: Prepared, *, is_colourful: bool) -> Iterator[Text]:
    """Yield an inspection's lines: title, legend, then each piece."""
    readings = inspection.readings
    tokens, supervised = sum(len(one.tokens) for one in readings), sum(one.supervised for one in readings)
    yield Text(
        f"{inspection.title}\n{tokens:,} tokens, {supervised:,} supervised", style="bold" if is_colourful else ""
    )
    yield _legend(is_colourful=is_colourful)
    for reading in readings:
        piece = reading.piece
        if len(readings) > 1 or len(reading.tokens) < reading.length:
            where = (
                f"tokens {piece.begin:,} to {piece.end - 1:,} of {reading.length:,}, {reading.supervised:,} supervised"
            )
            yield Text(f"\n── {reading.source} #{piece.sequence:,}, {where}", style="bold" if is_colourful else "")
        else:
            yield Text("")
        line = draw_tokens(pair_tokens(reading, prepared), is_colourful=is_colourful)
        following = next_token(reading, prepared.shards, prepared.profile, prepared.vocabulary)
        if following is not None:
            line.append(f" + {following} (supervised)", style=_OUTSIDE if is_colourful else "")
        yield line
    if inspection.note:
        yield Text(f"\n{inspection.note}")
    if inspection.turns:
        yield from draw_turns(inspection.turns, is_colourful=is_colourful)


def draw_turns(turns: Turns, *, is_colourful: bool) -> Iterator[Text]:
    """Yield a conversation's lines: the tools offered, then each message with its use."""
    bold, dim = ("bold", _MASKED) if is_colourful else ("", "")
    yield Text(f"\n── {turns.title}", style=bold)
    if turns.tools:
        yield Text("tools offered:")
    for name, description in turns.list_tools(_SHOWN_CHARACTERS):
        yield Text(f"  {show_plainly(name)}: {_say(description)}" if description.text else f"  {show_plainly(name)}")
    for turn in turns.turns:
        shown = show_turn(turn, _SHOWN_CHARACTERS)
        style = _SUPERVISED if is_colourful and shown.is_trained else dim
        yield Text.assemble("\n", (show_plainly(shown.heading), bold), "  ", (f"({shown.use})", style))
        if shown.reasoning.text:
            yield Text(_indent(f"[{shown.reasoning_title}] {_say(shown.reasoning)}"), style=dim)
        if shown.text.text or not (shown.reasoning.text or shown.calls):
            yield Text(_indent(_say(shown.text) or "(empty)"))
        for name, arguments in shown.calls:
            yield Text(f"  [tool call: {show_plainly(name)}]\n{_indent(_indent(_say(arguments)))}")


def show_plainly(text: str) -> str:
    """Return text with its spaces and line breaks; other invisible characters are shown by their code points."""
    plain = {TextKind.SPACE: " ", TextKind.BREAK: "\n", TextKind.TAB: "    "}
    return "".join(
        plain.get(sort, f"<{part}>" if sort is TextKind.CODE else part) for sort, part in split_visible(text)
    )


def _say(cut: Cut) -> str:
    more = f" … ({cut.left_out:,} more characters; --json has all)" if cut.left_out else ""
    return show_plainly(cut.text) + more


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.split("\n"))


def draw_tokens(pairs: Iterator[tuple[DisplayToken, bool]], *, is_colourful: bool) -> Text:
    """Return tokens as a terminal shows them; without colours, supervised spans are marked ⟦ ⟧, borders │."""
    line, was_supervised, begun = Text(), False, False
    for shown, supervised in pairs:
        if not is_colourful:
            turned = supervised != was_supervised
            line.append((_CLOSE if was_supervised else _OPEN) if turned else _BORDER if begun else "")
        style = (_SUPERVISED if supervised else _MASKED) if is_colourful else ""
        for sort, part in _parts(shown):
            text = f"{part}\n" if sort is TextKind.BREAK else f"<{part}>" if sort is TextKind.CODE else part
            line.append(text, style=f"{style} bold" if shown.is_special and style else style)
        if is_colourful:
            line.append(_BORDER, style="dim")
        was_supervised, begun = supervised, True
    if was_supervised and not is_colourful:
        line.append(_CLOSE)
    return line


def _parts(shown: DisplayToken) -> list[tuple[TextKind, str]]:
    if not shown.is_bytes:
        return split_visible(shown.text)
    return [(TextKind.PLAIN, f"<{shown.text}>{'=' if shown.completes else ''}"), *split_visible(shown.completes)]


def _legend(*, is_colourful: bool) -> Text:
    words = Text()
    if is_colourful:
        words.append("supervised", style=_SUPERVISED).append(" ").append("masked", style=_MASKED)
    else:
        words.append(f"{_OPEN}supervised{_CLOSE} masked")
    return words.append(f"  {_BORDER} between tokens, · blank, ⏎ new line, <0A> byte; <|…|>, <s>, </s> special tokens")


def print_sources(prepared: Prepared) -> None:
    """Print what can be looked at, and how."""
    rows = list_sources(prepared)
    ignored = [(row["source"], row.pop("ignored_keys")) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in rows[0] if rows else ():
        table.add_column(head, justify="left" if head in ("source", "kind") else "right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    console = Console(highlight=False)
    console.print(table)
    for name, keys in ignored:
        if isinstance(keys, dict) and keys:
            listed = ", ".join(f"{key} in {count:,} records" for key, count in keys.items())
            console.print(Text(f"{name}: ignored keys: {listed}"), soft_wrap=True)
    console.print(
        "\nropeway inspect SOURCE NUMBER shows a sequence, ropeway inspect --row N [--epoch E] a row", soft_wrap=True
    )
