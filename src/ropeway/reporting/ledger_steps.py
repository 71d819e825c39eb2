"""The ledger as a list of steps, from records read to supervised tokens, for report.html and the flow's table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ropeway.runtime.manifest import Json

# Ledgers written before the duplicate pass existed lack the first two.
_SET_ASIDE = {
    "duplicates removed": "duplicate",
    "contaminated removed": "contaminated",
    "validation": "validation",
    "unused": "unused",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a source's ledger.

    Attributes:
        sign: `=` is what remains, `-` is removed, `+` is added (repeats, padding), `of` is a part of what remains.
        count: Records or sequences (`unit`), None where only tokens are counted.
        tokens: None before tokenization.
        epoch: None for steps before the first epoch.
    """

    name: str
    sign: Literal["=", "-", "+", "of"]
    count: int | None
    unit: str
    tokens: int | None
    epoch: int | None = None


def list_steps(account: Json) -> list[Step]:
    """Return the steps of one source, in order; `account` is its entry in ledger.json."""
    records, sequences, tokens = account["records"], account["sequences"], account["tokens"]
    steps = [Step("read", "=", records["read"], "records", None)]
    if forgotten := records.get("forgotten"):
        steps.append(Step("forgotten", "-", forgotten, "records", None))
    steps += [
        Step(f"refused by {stage}", "-", sum(records[f"refused_by_{stage}"].values()), "records", None)
        for stage in ("fetch", "tokenize")
    ]
    steps.append(Step("kept", "=", records["kept"], "records", None))
    ignored = records.get("ignored_keys", {})
    steps += [Step(f"ignored keys: {key}", "of", count, "records", None) for key, count in ignored.items()]
    steps += _personal_steps(records.get("personal_data"))
    if records["without_tokens"]:
        steps.append(Step("empty", "-", records["without_tokens"], "records", None))
    if further := records.get("further_answers"):
        steps.append(Step("further answers, each a sequence", "+", further, "sequences", None))
    steps.append(Step("stored", "=", sequences["all"], "sequences", tokens["all"]))
    steps += [
        Step(name, "-", sequences.get(part, 0), "sequences", tokens.get(part, 0)) for name, part in _SET_ASIDE.items()
    ]
    steps.append(Step("train", "=", sequences["train"], "sequences", tokens["train"]))
    for epoch in account["epochs"]:
        steps += _epoch_steps(epoch, tokens["train"])
    return steps


def _personal_steps(found: Json | None) -> Iterator[Step]:
    """Yield what was found of personal data; a ledger lacks the key if nothing was looked for."""
    if found is None:
        yield Step("personal data: not looked for", "of", None, "", None)
        return
    done = {"count": "kept", "mask": "masked", "refuse": "refused"}[found["action"]]
    yield Step(f"with personal data, {done}", "of", found["records"], "records", None)
    for kind, count in found["found"].items():
        yield Step(f"personal data: {kind}", "of", count, "occurrences", None)


def _epoch_steps(epoch: Json, train_tokens: int) -> Iterator[Step]:
    at, rows, repeated_tokens = epoch["epoch"], epoch["row_tokens"], epoch.get("repeated_tokens", 0)
    not_drawn = train_tokens + repeated_tokens - epoch["drawn_tokens"]
    yield Step("not drawn", "-", epoch["not_drawn"], "sequences", not_drawn, at)
    if "repeated" in epoch:
        yield Step("repeats", "+", epoch["repeated"], "sequences", repeated_tokens, at)
    yield Step("drawn", "=", epoch["drawn"], "sequences", epoch["drawn_tokens"], at)
    yield Step("outside the sampled window", "-", epoch["windowed"], "sequences", epoch["windowed_tokens"], at)
    yield Step("truncated", "-", epoch["cut"], "sequences", epoch["cut_tokens"], at)
    yield Step("in rows", "=", None, "", rows, at)
    yield Step("padding", "+", None, "", epoch["padding"], at)
    yield Step("not supervised", "-", None, "", rows - epoch["supervised"], at)
    yield Step("supervised", "=", None, "", epoch["supervised"], at)


def split_tokens(account: Json) -> dict[str, int]:
    """Return the stored tokens of a source by their use in epoch 0.

    The parts add up to `tokens.all` and the tokens of repeats, which are used several times.
    """
    tokens, first = account["tokens"], account["epochs"][0]
    return {
        "supervised": first["supervised"],
        "context, not supervised": first["row_tokens"] - first["supervised"],
        "outside windows or truncated": first["windowed_tokens"] + first["cut_tokens"],
        "not drawn": tokens["train"] + first.get("repeated_tokens", 0) - first["drawn_tokens"],
        "validation": tokens["validation"],
        "unused": tokens["unused"],
        "duplicates, contaminated": tokens.get("duplicate", 0) + tokens.get("contaminated", 0),
    }


def ledger_rows(ledger: Json) -> list[dict[str, str]]:
    """Return table rows of a ledger, one per source and step; cells are plain text."""
    return [
        {
            "source": account["name"],
            "step": step.name if step.epoch is None else f"epoch {step.epoch}: {step.name}",
            "sign": "" if step.count is None and step.tokens is None else step.sign,
            "count": "" if step.count is None else f"{step.count:,} {step.unit}",
            "tokens": "" if step.tokens is None else f"{step.tokens:,}",
        }
        for account in ledger.get("sources", ())
        for step in list_steps(account)
    ]
