"""The card's part on data: where each source came from and what became of its records, from manifest and ledger."""

from collections.abc import Iterator
from typing import Any

from ropeway.config.params import HuggingfaceSource
from ropeway.data.lineage import Origin, describe_source
from ropeway.stages.package.card_text import escape, format_table, list_names
from ropeway.stages.package.facts import Facts, Json


def hub_datasets(facts: Facts) -> list[str]:
    """Return the Hub's data sets behind the model: those read, and those these were made from."""
    sources = facts.profile.sources.values()
    read = [source.repo for source in sources if isinstance(source, HuggingfaceSource)]
    return list(dict.fromkeys([*read, *facts.profile.card.upstream_datasets]))


def describe_sources(facts: Facts) -> Iterator[str]:
    """Yield the list of sources in the order of params, each with its exact revision."""
    yield "This model was trained on:"
    lines = []
    for name, _ in facts.profile.mixture:
        read = facts.raw["sources"][name]
        origins = "; ".join(format_origin(one) for one in describe_source(read["identity"]))
        lines.append(f"- **{escape(name)}** ({read['kind']}s): {origins}")
    yield "\n".join(lines)
    if upstream := facts.profile.card.upstream_datasets:
        links = (f"[{name}](https://huggingface.co/datasets/{name})" for name in upstream)
        yield f"These were made from: {', '.join(links)}."
    rows = {account["name"]: account["epochs"][0]["drawn"] for account in facts.ledger["sources"]}
    plain = [account["name"] for account in facts.ledger["sources"] if account["kind"] == "document"]
    total = sum(rows.values())
    if plain and len(plain) < len(rows):
        count = sum(rows[name] for name in plain)
        yield (
            f"{list_names(plain)} ({count / total:.0%} of the {total:,} rows of an epoch): classic language modelling, "
            "as an auxiliary task beside the conversations."
        )


def format_origin(origin: Origin) -> str:
    """Return an origin in Markdown, linked where it has a place of its own."""
    name = f"[{escape(origin.name)}]({origin.link})" if origin.link else escape(origin.name)
    return f"{name} ({escape(origin.pin)})" if origin.pin else name


def format_composition(facts: Facts) -> Iterator[str]:
    """Yield the composition table: counts with their whole, from the ledger."""
    yield "Composition (sequences are conversations, or chunks of documents):"
    header = [
        "source",
        "records kept of read",
        "sequences",
        "for training",
        "rows an epoch",
        "for validation",
        "unused",
        "removed",
    ]
    yield format_table(header, [_composition(account) for account in facts.ledger["sources"]])
    lines = [
        f"Epoch {epoch['epoch']}: {epoch['rows']:,} rows = {epoch['steps']:,} steps x {epoch['global_batch_size']} + "
        f"{epoch['left_over']} left over and not trained."
        for epoch in facts.ledger["epochs"]
    ]
    yield "\n".join(lines)
    header = ["source", "tokens", "read an epoch", "of these in the loss", "lost to windows and cuts"]
    yield format_table(header, [_tokens(account) for account in facts.ledger["sources"]])
    ignored = [
        f"{escape(key)} in {count:,} records of {account['name']}"
        for account in facts.ledger["sources"]
        for key, count in account["records"].get("ignored_keys", {}).items()
    ]
    if ignored:
        yield f"Fields that carried something and were left out, as params say: {'; '.join(ignored)}."
    yield from _format_findings(facts)


def _format_findings(facts: Facts) -> Iterator[str]:
    """Yield what the sources repeat, found and counted or removed."""
    same, shared = facts.profile.duplicates, facts.profile.contamination
    yield (
        f"Repetition. An exact duplicate says what an earlier record says; the runs of {same.ngram} words of a near "
        f"one have a Jaccard similarity of at least {same.threshold:g} with an earlier one's, estimated with "
        f"{same.permutations} permutations; what is shared are {shared.ngram} words in a row that stand in validation "
        "or in a prompt too:"
    )
    header = ["source", "exact duplicates", "near duplicates", "training sequences that share", "of these with prompts"]
    rows = []
    for account in facts.ledger["sources"]:
        found = account["findings"]
        cells = [
            _found(found["exact"], "records"),
            _found(found["near"], "records"),
            _found(found["contaminated"], "sequences"),
        ]
        rows.append([account["name"], *cells, f"{found['with_prompts']:,}"])
    yield format_table(header, rows)


def _found(found: Json, unit: str) -> str:
    if found["action"] == "off":
        return "not looked for"
    done = "removed" if found["action"] == "remove" else "kept"
    return f"{found[unit]:,} ({found['tokens']:,} tokens), {done}" if found[unit] else "0"


def _composition(account: Json) -> list[str]:
    records, parts, drawn = account["records"], account["sequences"], account["epochs"][0]["drawn"]
    share = (
        f"{drawn:,} ({_percent(drawn, parts['train'])} of the training part, {_percent(drawn, parts['all'])} of all)"
    )
    kept = f"{records['kept']:,} of {records['read']:,}"
    counts = [f"{parts[part]:,}" for part in ("all", "train", "validation", "unused")]
    removed = parts["duplicate"] + parts["contaminated"]
    return [account["name"], kept, *counts[:2], share, *counts[2:], f"{removed:,}"]


def _tokens(account: Json) -> list[str]:
    epoch: dict[str, Any] = account["epochs"][0]
    read, counted = epoch["row_tokens"], epoch["supervised"]
    lost = epoch["windowed_tokens"] + epoch["cut_tokens"]
    return [
        account["name"],
        f"{account['tokens']['all']:,}",
        f"{read:,}",
        f"{counted:,} ({_percent(counted, read)})",
        f"{lost:,} ({_percent(lost, epoch['drawn_tokens'])})",
    ]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0 %"
