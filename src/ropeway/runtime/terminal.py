"""Terminal output: tables, paragraphs and commands that fit the width and never break a word, a key or a digest.

The width is that of the terminal, else `COLUMNS`, else 80. rich is imported here, so import this module only where
something is printed.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.table import Table
from rich.text import Text

SHORT_DIGITS = 12  # of a digest, where a person reads; `--json` has all of them
_MAX_WORD = 50  # cells; a longer run without blanks is no key but data, e.g. a model's "tartartar…", and is folded
_MAX_LINE = 110  # of a paragraph, on however wide a terminal
_GAP = 2  # between columns
_HEX = re.compile(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{40,64}\b")
_NUMERIC = re.compile(r"[-+]?[\d,]+(\.\d+)?( ?[KMGT]i?B| [KMB]|%)?")


@dataclass(frozen=True, slots=True)
class AlignedTable:
    """Rows of text under headings, as columns where the width allows it, else one block of lines per row.

    A column is never narrower than its longest word. Columns of numbers are set to the right.

    Attributes:
        heads: One heading per column; all empty: no headings, e.g. for a list of facts.
        rows: Cells, as many as `heads`: text, or rich's Text for a styled cell.
    """

    heads: tuple[str, ...]
    rows: Sequence[Sequence[str | Text]]
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines for rich."""
        if self.title:
            yield Text(self.title, style="bold")
        cells = [[cell if isinstance(cell, Text) else printable(cell) for cell in row] for row in self.rows]
        heads = [printable(head, "bold") for head in self.heads]
        columns = [[head, *cells_of] for head, *cells_of in zip(heads, *cells, strict=True)]
        widths = _fit_widths(columns, options.max_width - _GAP * (len(columns) - 1))
        if widths is None:
            yield from _stack(heads, cells)
            return
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=any(self.heads))
        for head, width, column in zip(heads, widths, columns, strict=True):
            is_number = all(_NUMERIC.fullmatch(cell.plain) for cell in column[1:] if cell.plain) and len(column) > 1
            table.add_column(head, justify="right" if is_number else "left", width=width, overflow="fold")
        for row in cells:
            table.add_row(*row)
        yield table


def _fit_widths(columns: Sequence[Sequence[Text]], total: int) -> list[int] | None:
    """Return each column's width; None where their longest words do not fit side by side.

    rich's own widths of a table that is too wide do not respect the longest word of each column (15.0.0).
    """
    least = [max(map(_longest_word, column)) for column in columns]
    natural = [max(max(map(cell_len, cell.plain.splitlines() or [""])) for cell in column) for column in columns]
    spare = total - sum(least)
    if spare < 0:
        return None
    missing = [most - few for most, few in zip(natural, least, strict=True)]
    if sum(missing) <= spare:
        return natural
    widths = list(least)
    for place, column in enumerate(sorted(range(len(columns)), key=missing.__getitem__)):  # short columns stay whole
        taken = min(missing[column], spare // (len(columns) - place))
        widths[column] += taken
        spare -= taken
    return widths


def _stack(heads: Sequence[Text], rows: Sequence[Sequence[Text]]) -> Iterator[RenderableType]:
    """Yield each row as a block: its first cell, then a line per other cell."""
    width = max((head.cell_len for head in heads[1:]), default=0)
    for first, *others in rows:
        yield Text("", end="") if not first.plain else first
        for head, cell in zip(heads[1:], others, strict=True):
            if cell.plain:
                line = Table(box=None, show_header=False, pad_edge=False, padding=(0, _GAP, 0, 0))
                line.add_column(min_width=2 + width if width else 0, no_wrap=True)
                line.add_column(overflow="fold")
                line.add_row(Text("  ") + head, cell)
                yield line


def _longest_word(cell: Text) -> int:
    return max((min(cell_len(word), _MAX_WORD) for word in cell.plain.split()), default=0)


def escape_controls(words: object) -> str:
    r"""Return text whose control characters, but for line ends, are written as escapes: a terminal obeys none.

    >>> escape_controls("a\x1b[31mred\u202e\nb")
    'a\\x1b[31mred\\u202e\nb'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(words))


def printable(words: object, style: str = "") -> Text:
    """Return text without its power over a terminal: markup and escape sequences in it have no effect."""
    return Text(escape_controls(words), style)


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Sentences, wrapped between words; a word longer than a line, e.g. a path, stays whole.

    Attributes:
        indent: Blanks before every line but the first.
    """

    words: str
    indent: int = 0
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines for rich."""
        for line in self.words.splitlines() or [""]:
            lead = " " * (len(line) - len(line.lstrip()))
            wrapped = textwrap.wrap(
                line.strip(),
                min(options.max_width, _MAX_LINE),
                initial_indent=lead,
                subsequent_indent=lead + " " * self.indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for part in wrapped or [""]:
                text = printable(part, self.style)
                text.no_wrap, text.overflow = True, "ignore"
                yield text


@dataclass(frozen=True, slots=True)
class Command:
    """A command to copy; one that is too long for a line continues after a backslash.

    Attributes:
        label: What it is for; stands before it.
    """

    command: str
    label: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines for rich."""
        lead = f"{self.label}  " if self.label else ""
        for line in _continue(self.command, options.max_width - cell_len(lead)):
            yield Text(lead + line, no_wrap=True, overflow="ignore")
            lead = " " * cell_len(lead)


def _continue(command: str, width: int) -> Iterator[str]:
    r"""Yield the lines of a command, broken before its options.

    >>> list(_continue("ropeway review 5f3e --approve --reviewer NAME", 34))
    ['ropeway review 5f3e --approve \\', '  --reviewer NAME']
    """
    line = ""
    for part in re.split(r" (?=--)", command):
        if line and len(line) + len(part) + 3 > width:
            yield f"{line} \\"
            line = f"  {part}"
        else:
            line = f"{line} {part}" if line else part
    yield line


class _FittedTable(TableElement):
    """A Markdown table drawn as an `AlignedTable`."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = [cell.content.plain for cell in self.header.row.cells] if self.header and self.header.row else []
        rows = [[cell.content.copy() for cell in row.cells] for row in self.body.rows] if self.body else []
        for cell in (cell for row in rows for cell in row):
            cell.justify = None  # the column's
        yield AlignedTable(tuple(head.strip() for head in heads), rows)


class _PlainCode(CodeBlock):
    """A Markdown code block as commands to copy: no frame, no padding."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in str(self.text).rstrip().splitlines():
            yield Command(f"  {line}")


class _LeftHeading(Heading):
    """A Markdown heading, to the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.stylize("bold")
        yield text


class TerminalMarkdown(Markdown):
    """Markdown for a terminal, its tables and commands unbroken."""

    elements = {  # noqa: RUF012 - as rich declares it
        **Markdown.elements,
        "table_open": _FittedTable,
        "fence": _PlainCode,
        "code_block": _PlainCode,
        "heading_open": _LeftHeading,
    }


def show(*parts: RenderableType) -> None:
    """Print parts one under the other to stdout; a str is a `Paragraph`."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        _print(console, parts)
    else:
        print(render(*parts), flush=True)


def render(*parts: RenderableType, width: int | None = None) -> str:
    """Return what `show` prints, without colors; `width` in characters, by default the terminal's."""
    console = Console(width=width, highlight=False, markup=False, emoji=False, color_system=None, force_terminal=False)
    with console.capture() as captured:
        _print(console, parts)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _print(console: Console, parts: Sequence[RenderableType]) -> None:
    for part in parts:
        console.print(Paragraph(part) if isinstance(part, str) else part, crop=False)


def shorten_digests(words: str) -> str:
    """Return text whose digests and commits have their first 12 digits.

    >>> shorten_digests(f"made by {'0a' * 20}, clean")
    'made by 0a0a0a0a0a0a, clean'
    """
    return _HEX.sub(lambda found: found[0][:SHORT_DIGITS], words)


def format_number(value: object) -> str:
    """Return a value for a person: whole numbers with commas, others with 3 decimals, digests short.

    >>> format_number(13257552), format_number(8.325262546539307), format_number(2e-05), format_number(None)
    ('13,257,552', '8.325', '2e-05', 'none')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(format_number(item) for item in value) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}" if not value or abs(value) >= 0.001 else f"{value:.3g}"  # noqa: PLR2004 - of the 3 decimals
    return shorten_digests(str(value))


def format_count(number: int, noun: str) -> str:
    """Return how many of something.

    >>> format_count(1, "rank"), format_count(1200, "step")
    ('1 rank', '1,200 steps')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_large(number: float) -> str:
    """Return a large number with its unit, to two digits or more.

    >>> format_large(3165312), format_large(13_015_864_320), format_large(57_504)
    ('3.2 M', '13.0 B', '57.5 K')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def format_moment(at: str) -> str:
    """Return an ISO time in UTC to the minute.

    >>> format_moment("2026-11-29T14:57:33+00:00")
    '2026-11-29 14:57 UTC'
    """
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(\+00:00|Z)$", r"\1 \2 UTC", at)
