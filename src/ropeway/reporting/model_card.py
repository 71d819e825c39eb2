"""README.md of a version, from card.json, ledger, evaluation and samples with `templates/card.md.jinja`."""

from collections.abc import Sequence

from markupsafe import Markup

from ropeway.data.lineage import Origin, describe_base, describe_source
from ropeway.data.task_scores import name_metrics, show_score
from ropeway.reporting.markdown import escape, plain
from ropeway.reporting.render import collapse, render, trusted
from ropeway.reporting.shown_parts import show_answers
from ropeway.runtime.manifest import Json

SHOWN_SYSTEMS = 50
_PARTS = {"up_to_max_length": "up to", "beyond": "beyond"}  # eval.json's keys
Rows = list[dict[str, str]]


def render_card(card: Json, ledger: Json, evaluation: Json, samples: Json) -> str:
    """Return the model card in Markdown, from these JSON files of the package."""
    params, accounts = card["params"], ledger["sources"]
    configs = [result["sampling_config"].partition("/")[2] for result in samples["prompts"][0]["results"]]
    shown = "greedy" if "greedy" in configs else configs[0]
    kinds = {account["kind"] for account in accounts}
    text = render(
        "card.md.jinja",
        card=card,
        ledger=ledger,
        evaluation=evaluation,
        kinds=[text for kind, text in (("conversation", "conversations"), ("document", "plain text")) if kind in kinds],
        opened_from=format_origin(describe_base(card["base"])),
        steps=describe_steps(card),
        descent=describe_descent(card["train"]["continued_from"]),
        shown_systems=SHOWN_SYSTEMS,
        sources=[
            {**source, "origins": [format_origin(one) for one in describe_source(source["identity"])]}
            for source in card["sources"]
        ],
        documents=_count_documents(accounts),
        composition=[_composition(account) for account in accounts],
        tokens=[_tokens(account) for account in accounts],
        ignored=[
            {"key": key, "records": count, "source": account["name"]}
            for account in accounts
            for key, count in account["records"].get("ignored_keys", {}).items()
        ],
        findings=[_findings(account) for account in accounts],
        scores=_scores(evaluation),
        positions=_positions(evaluation["positions"], params["max_length"]),
        long_context=_long_context(evaluation.get("long_context", {})),
        tasks=_tasks(evaluation.get("tasks", {})),
        shown_config=shown,
        max_new_tokens=samples["args"]["max_new_tokens"],
        answers=[_answers(one, shown) for one in samples["prompts"]],
        weights="\n".join(f"{sha256}  {name}" for name, sha256 in sorted(card["weights"].items())),
    )
    return collapse(text) + "\n"


def describe_steps(card: Json) -> str:
    """Return the number of applied, skipped and left-out steps as text."""
    train, steps, applied = card["train"], card["steps"], card["applied_steps"]
    left = train["rows_left_out"] // card["params"]["global_batch_size"]
    said = f"{applied:,} applied, {steps - applied - left:,} skipped for overflow"
    if not left:
        return said
    return (
        f"{said}, {left:,} left out with their {train['rows_left_out']:,} rows after divergence "
        f"(rewinds: {train['rewinds']:,}); steps.csv lists them"
    )


def describe_descent(record: Json) -> str:
    """Return the runs that training continued from as text, the last one first; empty for none.

    >>> one = {"fingerprint": "00bb", "step": 60, "changed": {"learning_rate": "0.002 -> 0.001"}, "earlier": {}}
    >>> describe_descent(one)
    'continued from step 60 of the run 00bb (changed since: learning_rate 0.002 -> 0.001)'
    >>> describe_descent({"fingerprint": "00cc", "step": 1200, "changed": {}, "earlier": one})[:60]
    'continued from step 1,200 of the run 00cc, which was continu'
    """
    if not record:
        return ""
    words = f"continued from step {record['step']:,} of the run {record['fingerprint']}"
    if record["changed"]:
        words += f" (changed since: {', '.join(f'{key} {values}' for key, values in record['changed'].items())})"
    return f"{words}, which was {describe_descent(record['earlier'])}" if record["earlier"] else words


def format_origin(origin: Origin) -> Markup:
    """Return an origin in Markdown, with its link if it has one."""
    name = f"[{escape(origin.name)}]({origin.link})" if origin.link else escape(origin.name)
    return trusted(f"{name} ({escape(origin.pin)})" if origin.pin else name)


def format_number(value: float) -> str:
    """Return a number with four significant digits, trailing zeros kept.

    >>> format_number(2.03), format_number(13.5), format_number(8347.2), format_number(0.25)
    ('2.030', '13.50', '8347', '0.2500')
    """
    return f"{value:#.4g}".rstrip(".")


def _count_documents(accounts: Sequence[Json]) -> dict[str, object]:
    rows = {account["name"]: account["epochs"][0]["drawn"] for account in accounts}
    names = [account["name"] for account in accounts if account["kind"] == "document"]
    return {"names": names, "rows": sum(rows[name] for name in names), "total": sum(rows.values())} if names else {}


def _composition(account: Json) -> dict[str, str]:
    records, parts, drawn = account["records"], account["sequences"], account["epochs"][0]["drawn"]
    share = f"{_percent(drawn, parts['train'])} of training, {_percent(drawn, parts['all'])} of all"
    return {
        "source": plain(account["name"]),
        "records kept": f"{records['kept']:,} of {records['read']:,}",
        "sequences": f"{parts['all']:,}",
        "training": f"{parts['train']:,}",
        "rows/epoch": f"{drawn:,} ({share})",
        "validation": f"{parts['validation']:,}",
        "unused": f"{parts['unused']:,}",
        "removed": f"{parts['duplicate'] + parts['contaminated']:,}",
    }


def _tokens(account: Json) -> dict[str, str]:
    epoch = account["epochs"][0]
    read, counted = epoch["row_tokens"], epoch["supervised"]
    lost = epoch["windowed_tokens"] + epoch["cut_tokens"]
    return {
        "source": plain(account["name"]),
        "tokens": f"{account['tokens']['all']:,}",
        "tokens/epoch": f"{read:,}",
        "of these supervised": f"{counted:,} ({_percent(counted, read)})",
        "outside windows or truncated": f"{lost:,} ({_percent(lost, epoch['drawn_tokens'])})",
    }


def _findings(account: Json) -> dict[str, str]:
    found = account["findings"]
    return {
        "source": plain(account["name"]),
        "exact duplicates": _found(found["exact"], "records"),
        "near duplicates": _found(found["near"], "records"),
        "contaminated training sequences": _found(found["contaminated"], "sequences"),
        "of these, shared with prompts": f"{found['with_prompts']:,}",
    }


def _found(found: Json, unit: str) -> str:
    if found["action"] == "off":
        return "not checked"
    done = "removed" if found["action"] == "remove" else "kept"
    return f"{found[unit]:,} ({found['tokens']:,} tokens), {done}" if found[unit] else "0"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0%"


def _scores(report: Json) -> Rows:
    """Return rows of base and tuned metrics per source."""
    keys = {
        "loss": "loss, base → tuned",
        "perplexity": "perplexity",
        "accuracy": "accuracy",
        "nats_per_byte": "nats/byte",
    }
    rows = [
        {
            "source": plain(name),
            "tokens": f"{found['tuned']['tokens']:,}",
            **{
                head: f"{format_number(found['base'][key])} → {format_number(found['tuned'][key])}"
                if key in found["base"]
                else ""
                for key, head in keys.items()
            },
        }
        for name, found in report["sources"].items()
    ]
    mean = report["mean"]
    return [
        *rows,
        {
            "source": "mean over sources",
            keys["loss"]: f"{format_number(mean['base'])} → {format_number(mean['tuned'])}",
        },
    ]


def _positions(found: Json, max_length: int) -> Rows:
    parts = {f"{name} {max_length:,} tokens": found[key] for key, name in _PARTS.items() if key in found}
    rows = []
    for curve in next(iter(parts.values()), {}):  # none: no token of the long rows is supervised
        model, _, unscaled = curve.partition("_")
        name = f"{model}, RoPE not scaled" if unscaled else model
        rows.append({"model": plain(name), **{head: format_number(losses[curve]) for head, losses in parts.items()}})
    return rows


def _tasks(tasks: Json) -> Rows:
    return [
        {
            "task": plain(name),
            "version": plain(task["version"]),
            "shots": str(task["shots"]),
            "questions": f"{task['n']:,}",
            "metric": plain(metric),
            "base → tuned": " → ".join(show_score(task[model], metric) for model in ("base", "tuned")),
        }
        for name, task in tasks.items()
        for metric in name_metrics(task["tuned"])
    ]


def _long_context(found: Json) -> Rows:
    """Return one row per kind and length with the score of each model."""
    first: Json = next(iter(found.values()), {"by_kind": {}})
    return [
        {"kind": plain(kind.replace("_", " ")), "tokens": f"{int(length):,}"}
        | {model: f"{one['by_kind'][kind][length]:.2f}" for model, one in found.items()}
        for kind, lengths in first["by_kind"].items()
        for length in sorted(lengths, key=int)
    ]


def _answers(one: Json, config: str) -> dict[str, object]:
    results = {result["sampling_config"]: result for result in one["results"]}
    return {
        "prompt": one["prompt"],
        **{model: show_answers(results[f"{model}/{config}"])[0] for model in ("base", "tuned")},
    }
