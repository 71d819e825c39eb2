"""The review's table of lm-evaluation-harness: what base, production and the new version score in each task."""

from collections.abc import Mapping
from typing import Any

from ropeway.data.task_scores import name_metrics, show_score
from ropeway.reporting.evidence import Case
from ropeway.reporting.markdown import plain, table


def draw_tasks(case: Case) -> str:
    """Return the table with its heading; nothing where the new version was asked no task."""
    tasks: Mapping[str, Any] = case.new.metrics.get("tasks") or {}
    rows = []
    for name, task in tasks.items():
        for metric in name_metrics(task["tuned"]):
            row = {"task": plain(name), "metric": plain(metric), "base": _score(task["base"], metric)}
            if case.old:
                row[f"production ({plain(case.old.label)})"] = _score(_of_same(case.old.metrics, name, task), metric)
            rows.append({**row, f"**{plain(case.new.label)}**": f"**{_score(task['tuned'], metric)}**"})
    if not rows:
        return ""
    words = f"{case.new.metrics.get('harness', 'the harness')}; ± is the standard error, a gap within it says nothing."
    return "\n\n".join(["## Tasks of lm-evaluation-harness", table(rows), plain(words)])


def _of_same(metrics: Mapping[str, Any], name: str, task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return production's scores, if it was asked the same questions in the same way."""
    theirs: Mapping[str, Any] = (metrics.get("tasks") or {}).get(name) or {}
    same = all(theirs.get(key) == task[key] for key in ("version", "shots", "n"))
    return theirs.get("tuned", {}) if same else {}


def _score(figures: Mapping[str, Any], metric: str) -> str:
    return show_score(figures, metric) if metric in figures else "not asked"
