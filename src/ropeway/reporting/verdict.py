"""The gate's verdict in Markdown: a table of comparisons, failed ones first, and what could not be compared."""

from collections.abc import Mapping

from ropeway.reporting.markdown import plain
from ropeway.runtime.manifest import Json


def split_verdict(verdict: Json) -> tuple[list[str], list[dict[str, str]]]:
    """Return (sentences, rows of a table) of a verdict as a version records it, failed comparisons first.

    A version of before the table has only sentences.
    """
    checks = verdict.get("checks")
    if not checks:
        return [plain(line) for line in verdict["lines"]], []
    ordered = sorted(checks, key=lambda check: bool(check["passed"]))  # stable: else in the order of the gate
    notes = [f"{_result(check)}: {plain(check['words'])}" for check in ordered if not check["name"]]
    return notes, [_row(check) for check in ordered if check["name"]]


def _row(check: Mapping[str, str]) -> dict[str, str]:
    theirs = f"{check['theirs']} ({check['against']})" if check["theirs"] else ""
    return {
        "check": plain(check["name"]),
        "this version": plain(check["ours"]),
        "compared with": plain(theirs),
        "change": plain(check["change"]),
        "allowed": plain(check["allowed"]),
        "result": _result(check),
    }


def _result(check: Mapping[str, object]) -> str:
    return "passed" if check["passed"] else "**not passed**"
