"""The page of report.html: HTML out of counts and samples. Whatever comes from data passes through `escape`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ropeway.config.params import Profile
from ropeway.data.shards import Shards, SourceShards
from ropeway.reporting.data_pictures import draw_bar, draw_histogram, draw_key
from ropeway.reporting.ledger_steps import Step, list_steps, split_tokens
from ropeway.reporting.page_style import SCRIPT, STYLE
from ropeway.reporting.token_html import draw_legend, draw_reading
from ropeway.reporting.token_view import Reading, Vocabulary, name_visibly

_OPEN_SOURCES = 5  # with more, sections begin folded
_SHOWN_TOKENS = 900  # of a sample; `ropeway inspect` prints all
_FEWEST_TOKENS = 24  # of one piece of a packed row


@dataclass(frozen=True)
class Page:
    """What the page is about.

    Attributes:
        profile: As prepare reads it.
        name: The profile's.
        shards: Of the closed data folder.
        ledger: As ledger.json holds it.
        raw: Source -> its entry in the raw manifest.
        vocabulary: Tokens in characters.
    """

    profile: Profile
    name: str
    shards: Shards
    ledger: Mapping[str, Any]
    raw: Mapping[str, Any]
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Sample:
    """A few readings under a title: one sequence, or the pieces of a row."""

    title: str
    words: str
    readings: tuple[Reading, ...]


def draw_page(page: Page, samples: Iterable[Iterable[Sample]], rows: Sequence[Sample]) -> str:
    """Return the whole file.

    Args:
        page: What it is about.
        samples: For each source in order; taken one source after another, since a sequence may be large.
        rows: Packed rows, none in the padded layout.
    """
    title = f"{escape(page.name)}: prepared data"
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<style>{STYLE}</style></head>\n<body>",
        f"<header><h1>{title}</h1><p>{_summary(page)}</p></header>\n<main>",
        _overview(page),
        draw_legend(page.profile),
    ]
    if rows:
        parts.append('<section class="card"><h2>Packed rows</h2>')
        parts.append("<p>Each piece begins anew: positions restart, and its first token is never learned.</p>")
        parts += [_sample(page, sample) for sample in rows]
        parts.append("</section>")
    for number, chosen in enumerate(samples):
        parts += _source(page, number, chosen)
    parts.append(f"</main>\n<script>{SCRIPT}</script></body></html>\n")
    return "\n".join(parts)


def _summary(page: Page) -> str:
    accounts, epochs = page.ledger["sources"], page.ledger["epochs"]
    tokens = sum(account["tokens"]["all"] for account in accounts)
    facts = [
        _count(len(accounts), "source"),
        f"{tokens:,} tokens stored",
        f"layout {page.profile.layout}, max_length {page.profile.max_length:,}",
    ]
    facts += [
        f"epoch {epoch['epoch']}: {epoch['rows']:,} rows = {epoch['steps']:,} steps &times; "
        f"{epoch['global_batch_size']:,} + {epoch['left_over']:,} left over"
        for epoch in epochs
    ]
    return " &middot; ".join(f"<span>{fact}</span>" for fact in facts)


def _overview(page: Page) -> str:
    heads = ("source", "kind", "read", "refused", "sequences", "tokens", "over max_length", "where the tokens are")
    filter_ = '<input id="filter" type="search" placeholder="filter sources" aria-label="filter sources" hidden>'
    lines = []
    for number, (account, source) in enumerate(zip(page.ledger["sources"], page.shards.sources, strict=True)):
        over, refused = count_over(source, page.profile), _count_refused(account)
        cells = [f"<td>{escape(account['kind'])}</td>", f'<td class="n">{account["records"]["read"]:,}</td>']
        cells.append(f'<td class="n{" warn" if refused else ""}">{refused:,}</td>')
        cells += [f'<td class="n">{account[unit]["all"]:,}</td>' for unit in ("sequences", "tokens")]
        cells += [
            f'<td class="n{" warn" if over else ""}">{over:,}</td>',
            f"<td>{draw_bar(split_tokens(account))}</td>",
        ]
        name = escape(account["name"])
        lines.append(f'<tr data-name="{name}"><th><a href="#s{number}">{name}</a></th>{"".join(cells)}</tr>')
    head = "".join(f"<th{_number_class(head)}>{head}</th>" for head in heads)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return f'<section class="card"><h2>Sources</h2>{filter_}{draw_key()}{table}</section>'


def _number_class(head: str) -> str:
    return ' class="n"' if head in ("read", "refused", "sequences", "tokens", "over max_length") else ""


def _source(page: Page, number: int, samples: Iterable[Sample]) -> Iterator[str]:
    account, source = page.ledger["sources"][number], page.shards.sources[number]
    name, over = escape(source.name), count_over(source, page.profile)
    is_open = " open" if len(page.shards.sources) <= _OPEN_SOURCES else ""
    first = account["epochs"][0]
    share = first["supervised"] / max(first["row_tokens"], 1)
    yield f'<details class="card source" id="s{number}" data-name="{name}"{is_open}><summary><h2>{name}</h2>'
    what = "chunk" if source.is_document else "conversation"
    yield f"<span>{_count(account['sequences']['all'], what)}, {account['tokens']['all']:,} tokens, "
    yield f"{share:.1%} of what epoch 0 reads supervised</span></summary>"
    yield f'<div class="two"><div><h3>Lengths</h3>{draw_histogram(source.lengths, page.profile.max_length)}'
    yield f"<p>{over:,} of {_count(len(source.lengths), 'sequence')} longer than max_length "
    yield f"{page.profile.max_length:,}.</p>{_refused(page, account)}{_findings(account['findings'])}</div>"
    yield f"<div><h3>Ledger</h3>{_ledger(list_steps(account))}</div></div><h3>Samples</h3>"
    shown = [_sample(page, sample) for sample in samples]
    yield from shown or ["<p>No sequence: there is nothing to show.</p>"]
    yield "</details>"


def _ledger(steps: Sequence[Step]) -> str:
    later = [step for step in steps if step.epoch]
    folded = f"<details><summary>later epochs</summary>{_steps_table(later)}</details>" if later else ""
    return _steps_table([step for step in steps if not step.epoch]) + folded


def _steps_table(steps: Sequence[Step]) -> str:
    signs = {"=": ("=", "stays"), "-": ("&minus;", "leaves"), "+": ("+", "leaves")}
    lines = []
    for step in steps:
        count = "" if step.count is None else f"{step.count:,} <small>{step.unit}</small>"
        tokens = "" if step.tokens is None else f"{step.tokens:,}"
        sign, kind = signs[step.sign]
        zero = "" if step.count or step.tokens else " zero"
        where = "" if step.epoch is None else f" <small>epoch {step.epoch}</small>"
        cells = f'<td>{sign}</td><th>{step.name}{where}</th><td class="n">{count}</td><td class="n">{tokens}</td>'
        lines.append(f'<tr class="{kind}{zero}">{cells}</tr>')
    head = '<tr><th></th><th>step</th><th class="n">how many</th><th class="n">tokens</th></tr>'
    return f'<div class="wide"><table class="ledger"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _refused(page: Page, account: Mapping[str, Any]) -> str:
    """Return the refused records: how many for which reason, and where the first ones stand."""
    total, ignored = _count_refused(account), account["records"].get("ignored_keys", {})
    left_out = "".join(f"<li><code>{escape(key)}</code> in {count:,} records</li>" for key, count in ignored.items())
    left_out = f"<h3>Ignored keys</h3><ul>{left_out}</ul>" if ignored else ""
    files = account["records"].get("files", {})
    if files:
        listed = "".join(f"<li><code>{escape(file)}</code> {count:,} records</li>" for file, count in files.items())
        left_out += f"<details><summary>{len(files):,} files read</summary><ol>{listed}</ol></details>"
    if not total:
        return f"<h3>Refused</h3><p>No record was refused.</p>{left_out}"
    lines = "".join(
        f'<tr><td class="n">{count:,}</td><td>{escape(reason)}</td><td>{room}</td></tr>'
        for room in ("fetch", "tokenize")
        for reason, count in sorted(account["records"][f"refused_by_{room}"].items())
    )
    head = '<tr><th class="n">records</th><th>reason</th><th>refused by</th></tr>'
    table = f'<div class="wide"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>'
    first = page.raw[account["name"]].get("first_refused", [])
    places = "".join(
        f"<li><code>{escape(name_visibly(one['where']))}</code> {escape(one['reason'])}</li>" for one in first
    )
    listed = f"<details><summary>the first {len(first)} that fetch refused</summary><ol>{places}</ol></details>"
    share = f"{total:,} of {account['records']['read']:,} records read"
    return f"<h3>Refused</h3><p>{share}:</p>{table}{listed if first else ''}{left_out}"


def _findings(found: Mapping[str, Any]) -> str:
    """Return what repeats: duplicates, and training sequences that share words with validation or with prompts."""
    done = {"off": "not looked for", "count": "counted, kept", "remove": "removed"}
    lines = []
    for key, name in (("exact", "exact duplicates"), ("near", "near duplicates"), ("contaminated", "contaminated")):
        one = found[key]
        zero = "" if one["records"] else ' class="zero"'
        cells = "".join(f'<td class="n">{one[unit]:,}</td>' for unit in ("records", "sequences", "tokens"))
        lines.append(f"<tr{zero}><th>{name}</th>{cells}<td>{done[one['action']]}</td></tr>")
    heads = "".join(f'<th class="n">{unit}</th>' for unit in ("records", "sequences", "tokens"))
    table = f"<thead><tr><th></th>{heads}<th></th></tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<h3>Repeats</h3><div class="wide"><table class="ledger">{table}</table></div>'


def _sample(page: Page, sample: Sample) -> str:
    budget = max(_SHOWN_TOKENS // max(len(sample.readings), 1), _FEWEST_TOKENS)
    many = len(sample.readings) > 1
    body = "".join(
        draw_reading(reading, page.shards, page.profile, page.vocabulary, limit=budget, named=many)
        for reading in sample.readings
    )
    head = f"<summary><b>{escape(sample.title)}</b> <span>{escape(sample.words)}</span></summary>"
    return f'<details class="sample" open>{head}<div class="tokens" dir="ltr">{body}</div></details>'


def count_over(source: SourceShards, profile: Profile) -> int:
    """Return how many sequences of a source a row cannot hold."""
    return int((source.lengths > profile.max_length).sum())


def _count_refused(account: Mapping[str, Any]) -> int:
    return sum(sum(account["records"][f"refused_by_{room}"].values()) for room in ("fetch", "tokenize"))


def _count(number: int, what: str) -> str:
    return f"{number:,} {escape(what)}{'' if number == 1 else 's'}"
