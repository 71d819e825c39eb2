"""Scores of lm-evaluation-harness in eval.json: metrics such as `acc`, and their standard errors, `acc_stderr`."""

from collections.abc import Iterable, Mapping

_ERROR = "_stderr"


def name_metrics(figures: Iterable[str]) -> list[str]:
    """Return the names of the metrics, without standard errors.

    >>> name_metrics(["acc,none", "acc_stderr,none", "f1,none"])
    ['acc,none', 'f1,none']
    """
    return [name for name in figures if _ERROR not in name]


def standard_error(metric: str) -> str:
    """Return the name of a metric's standard error.

    >>> standard_error("acc,none"), standard_error("acc")
    ('acc_stderr,none', 'acc_stderr')
    """
    name, comma, kind = metric.partition(",")
    return f"{name}{_ERROR}{comma}{kind}"


def show_score(figures: Mapping[str, float], metric: str) -> str:
    """Return a metric's value, with its standard error if it has one.

    >>> show_score({"acc,none": 0.25, "acc_stderr,none": 0.0903}, "acc,none")
    '0.25 ± 0.09'
    """
    error = figures.get(standard_error(metric))
    return f"{figures[metric]:.4g}" + (f" ± {error:.2g}" if error is not None else "")
