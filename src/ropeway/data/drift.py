"""Data drift: the difference of two data profiles in standard measures, and which of them are above a limit.

Of a distribution two measures are computed from the shares p of the new and q of the old version:

- PSI, the population stability index: sum of (p - q) ln(p / q). A share of 0 counts as half a value of the
  smaller version, at least 0.0001, so that PSI is finite.
  Source: Yurdakul 2018, Statistical Properties of the Population Stability Index.
- JS, the Jensen-Shannon divergence in bits: 0 for equal, 1 for disjoint. Source: Lin 1991, IEEE Trans. Inf. Theory 37.

Equal shares give exactly 0. Two samples of one distribution differ, too: PSI is then about (1/n + 1/m) times a
chi-squared value of (bins - 1) degrees of freedom, and JS an (8 ln 2)-th of that. A distribution is flagged only above
its limit and above the 99 % quantile of this, n and m being tokens, conversations, sequences or records. The quantile
counts up to a JS of 0.5, so that disjoint data is flagged however little there is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ropeway.config.sections import DriftLimits
from ropeway.data.data_profile import FORMAT, MAX_HASHES, bin_names

_FLOOR = 1e-4  # common practice
_QUANTILE = 2.326  # of the normal distribution at 99 %
_JS_PER_PSI = 1 / (8 * math.log(2))  # of close distributions
_MAX_NOISE = 0.5 / _JS_PER_PSI
_MAX_COUNT = 2**64  # hashes of texts are below it, counts far below
_LARGEST = 3  # parts of a distribution that are named
Json = Mapping[str, Any]
Kind = Literal["distribution", "share", "size", "seen"]
# Share: (name, count, of what, in words)
_SHARES = (
    ("rejected records", "refused", "read"),
    ("exact duplicates", "exact_duplicates", "records"),
    ("near duplicates", "near_duplicates", "records"),
    ("conversations with a system message", "with_system", "conversations"),
    ("conversations with tools", "with_tools", "conversations"),
    ("answers with tool calls", "with_calls", "answers"),
    ("answers with reasoning", "with_reasoning", "answers"),
)


@dataclass(frozen=True, slots=True)
class DriftMeasure:
    """One quantity of two versions.

    Attributes:
        name: What is compared.
        kind: `distribution` has `psi` and `js`; `share` and `size` have `old` and `new`, `seen` has `new` only.
        psi, js: None if it is no distribution, or if both versions have no values; of one without values JS is 1.
        noise: PSI that sampling alone explains (99 % quantile).
        old, new: Shares, 0 to 1; of `size` numbers. None if one version has none.
        largest: Of a distribution: (part, share in old, share in new) of those that moved most.
        note: Why it is not compared; empty if it is.
        exceeds: The limits that it exceeds, each in words; see `flag`.
    """

    name: str
    kind: Kind
    psi: float | None = None
    js: float | None = None
    noise: float = 0.0
    old: float | None = None
    new: float | None = None
    largest: tuple[tuple[str, float, float], ...] = ()
    note: str = ""
    exceeds: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "largest": [list(one) for one in self.largest], "exceeds": list(self.exceeds)}


@dataclass(frozen=True, slots=True)
class DriftReference:
    """The comparison of a version's data with that of an earlier version.

    Attributes:
        version: E.g. `laptop@v3`.
        why: Why it is compared with this one: `the version before`, `production`, `candidate`, `oldest of the last 5`.
        note: Why there are no measures; empty if there are.
    """

    version: str
    digest: str
    why: tuple[str, ...]
    measures: tuple[DriftMeasure, ...] = ()
    note: str = ""

    @property
    def flagged(self) -> tuple[DriftMeasure, ...]:
        """The measures above a limit."""
        return tuple(one for one in self.measures if one.exceeds)


@dataclass(frozen=True, slots=True)
class DriftEvidence:
    """All comparisons of a new version's data, as its publication records them.

    Attributes:
        limits: `gate.drift` of params.yaml; None if it was null.
        note: Why there are no comparisons; empty if there are.
    """

    limits: DriftLimits | None
    references: tuple[DriftReference, ...] = ()
    note: str = ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """A sentence per earlier version from which a measure is above a limit: why a person must look at the data."""
        return tuple(
            f"data drift from {one.version} ({', '.join(one.why)}) above a limit: "
            + ", ".join(measure.name for measure in one.flagged)
            for one in self.references
            if one.flagged
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "limits": self.limits.model_dump(mode="json") if self.limits else None,
            "note": self.note,
            "references": [
                {
                    **{key: getattr(one, key) for key in ("version", "digest", "note")},
                    "why": list(one.why),
                    "measures": [measure.to_json() for measure in one.measures],
                }
                for one in self.references
            ],
        }


def compare_profiles(old: Json, new: Json, limits: DriftLimits | None) -> list[DriftMeasure]:
    """Return all measures of two data profiles, flagged by limits; what only one of them has is noted.

    Raises:
        ValueError: A profile is of another format, or lacks a key.
    """
    if any(not isinstance(one, Mapping) for one in (old, new)):
        raise ValueError("data profile: expected a mapping")
    if [old.get("format"), new.get("format")] != [FORMAT, FORMAT]:
        raise ValueError(f"data profile: expected format {FORMAT}, found {old.get('format')} and {new.get('format')}")
    try:
        _check_numbers(old)
        _check_numbers(new)
        found = list(_iterate_measures(old, new))
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"data profile: {type(error).__name__}: {error}") from None
    return [flag(one, limits) if limits else one for one in found]


def _check_numbers(value: object) -> None:
    """Raise ValueError for a number that is no count: NaN would compare as no drift."""
    if isinstance(value, Mapping):
        for one in value.values():
            _check_numbers(one)
    elif isinstance(value, list):
        for one in value:
            _check_numbers(one)
    elif isinstance(value, int | float) and not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"data profile: {str(value)[:40]} is not a count")


def flag(measure: DriftMeasure, limits: DriftLimits) -> DriftMeasure:
    """Return the measure with the limits that it exceeds."""
    exceeds = []
    for title, value, limit, noise, unit in (
        ("PSI", measure.psi, limits.max_psi, measure.noise, ""),
        ("JS", measure.js, limits.max_js_divergence, measure.noise * _JS_PER_PSI, " bits"),
    ):
        if value is not None and limit is not None and value > max(limit, noise):
            exceeds.append(f"{title} above {limit:g}{unit}")
    if measure.kind == "share" and measure.old is not None and measure.new is not None:
        change = abs(measure.new - measure.old)
        if limits.max_share_change is not None and round(change - limits.max_share_change, 9) > 0:
            exceeds.append(f"changed by more than {limits.max_share_change:.1%}")
    if measure.kind == "size" and limits.max_size_ratio is not None:
        small, large = sorted((measure.old or 0.0, measure.new or 0.0))
        if large > limits.max_size_ratio * small:
            exceeds.append(f"ratio above {limits.max_size_ratio:g}")
    seen = measure.new if measure.kind == "seen" else None
    if seen is not None and limits.min_seen_share is not None and seen < limits.min_seen_share:
        exceeds.append(f"below {limits.min_seen_share:.1%}")
    return replace(measure, exceeds=tuple(exceeds))


def population_stability(old: NDArray[np.float64], new: NDArray[np.float64], *, values: float = math.inf) -> float:
    """Return the PSI of two `(B,)` counts with a sum above 0; `values`: independent values of the smaller one."""
    if np.array_equal(old * new.sum(), new * old.sum()):
        return 0.0
    floor = max(_FLOOR, 0.5 / values)
    before, after = (np.maximum(counts / counts.sum(), floor) for counts in (old, new))
    used = (old > 0) | (new > 0)
    return float(((after - before) * np.log(after / before))[used].sum())


def jensen_shannon(old: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """Return the Jensen-Shannon divergence of two `(B,)` counts with a sum above 0, in bits, 0 to 1."""
    if np.array_equal(old * new.sum(), new * old.sum()):
        return 0.0
    before, after = (counts / counts.sum() for counts in (old, new))
    middle = (before + after) / 2
    total = 0.0
    for side in (before, after):
        used = side > 0
        total += float((side[used] * np.log2(side[used] / middle[used])).sum()) / 2
    return min(max(total, 0.0), 1.0)


def sampling_noise(old: float, new: float, bins: int) -> float:
    """Return the 99 % quantile of the PSI of two samples of `old` and `new` values from one distribution.

    Source: Wilson and Hilferty 1931 for the quantile of the chi-squared distribution.
    """
    free = bins - 1
    if free < 1 or not old or not new:
        return 0.0
    spread = 2 / (9 * free)
    return min((1 / old + 1 / new) * free * (1 - spread + _QUANTILE * math.sqrt(spread)) ** 3, _MAX_NOISE)


def share_seen(old: Sequence[str], new: Sequence[str], *, most: int) -> tuple[float | None, int]:
    """Return (share of the new texts that old has, texts that it is estimated from), from their smallest hashes.

    A sketch with fewer than `most` hashes is of all texts. Below the smaller of the two sketches' largest hashes both
    are complete, so the new hashes there are a random sample.

    >>> share_seen(["1", "2"], ["2", "3"], most=4)
    (0.5, 2)
    """
    ends = [hashes[-1] for hashes in (old, new) if len(hashes) >= most]
    known = set(old)
    sample = [one for one in new if not ends or one <= min(ends)]
    return (sum(one in known for one in sample) / len(sample), len(sample)) if sample else (None, 0)


def _iterate_measures(old: Json, new: Json) -> Iterator[DriftMeasure]:
    before, after = old["all"], new["all"]
    yield _size("records", before["records"], after["records"])
    yield _size("tokens", before["tokens"], after["tokens"])
    yield _compare_seen(before, after)
    trained = [{name: source["trained_tokens"] for name, source in side["sources"].items()} for side in (old, new)]
    sizes = (before["records"], after["records"])
    yield _compare("tokens trained on, by source", trained, sizes)
    yield _compare("tokens per sequence", _binned("lengths", before, after), (before["sequences"], after["sequences"]))
    talks = (before["conversations"], after["conversations"])
    yield _compare("turns per conversation", _binned("turns", before, after), talks)
    yield _compare("scripts of the text", [before["scripts"], after["scripts"]], sizes)
    yield _compare("roles of messages", [before["roles"], after["roles"]], talks)
    yield _compare("system messages", _numbered("systems", before, after), talks, are_hashes=True)
    if old["tokenizer"] == new["tokenizer"]:
        yield _compare(
            "tokens of the vocabulary",
            _numbered("tokens_by_bucket", before, after),
            (before["tokens"], after["tokens"]),
            are_hashes=True,
        )
    else:
        yield DriftMeasure("tokens of the vocabulary", "distribution", note="not compared: the tokenizers differ")
    for name, count, whole in _SHARES:
        yield DriftMeasure(name, "share", old=_share(before, count, whole), new=_share(after, count, whole))


def _size(name: str, old: float, new: float) -> DriftMeasure:
    return DriftMeasure(name, "size", old=old, new=new)


def _compare_seen(before: Json, after: Json) -> DriftMeasure:
    share, sample = share_seen(before["hashes"], after["hashes"], most=MAX_HASHES)
    name = "record texts seen in the earlier version"
    if share is None:
        return DriftMeasure(name, "seen", note="not compared: too few text hashes")
    exact = max(len(side["hashes"]) for side in (before, after)) < MAX_HASHES
    return DriftMeasure(name, "seen", new=share, note="" if exact else f"estimated from {sample:,} texts")


def _compare(
    name: str, sides: Sequence[Mapping[str, float]], sizes: tuple[int, int], *, are_hashes: bool = False
) -> DriftMeasure:
    """Compare two distributions; `sizes` are their independent values, `are_hashes` if their parts have no names."""
    old, new = sides
    if not sum(old.values()) or not sum(new.values()):
        empty = not sum(old.values()) and not sum(new.values())
        note = "neither version has any" if empty else "only one version has any"
        return DriftMeasure(name, "distribution", js=None if empty else 1.0, note=note)
    parts = sorted({*old, *new})
    counts = [np.asarray([side.get(part, 0) for part in parts], np.float64) for side in (old, new)]
    before, after = (side / side.sum() for side in counts)
    used = int(((counts[0] > 0) | (counts[1] > 0)).sum())
    moved = sorted(range(len(parts)), key=lambda at: (-abs(after[at] - before[at]), at))[:_LARGEST]
    return DriftMeasure(
        name,
        "distribution",
        psi=population_stability(counts[0], counts[1], values=min(sizes)),
        js=jensen_shannon(counts[0], counts[1]),
        noise=sampling_noise(sizes[0], sizes[1], used),
        largest=()
        if are_hashes
        else tuple((parts[at], float(before[at]), float(after[at])) for at in moved if before[at] != after[at]),
    )


def _binned(key: str, *sides: Json) -> list[dict[str, float]]:
    """Return the counts of a histogram by the name of each bin."""
    names = bin_names()
    found: list[dict[str, float]] = []
    for side in sides:
        counts: dict[str, float] = dict.fromkeys(names, 0)
        for name, count in zip(names, side[key], strict=True):
            counts[name] += count
        found.append(counts)
    return found


def _numbered(key: str, *sides: Json) -> list[dict[str, float]]:
    return [{f"{at:>4}": count for at, count in enumerate(side[key])} for side in sides]


def _share(side: Json, count: str, whole: str) -> float | None:
    of = side["roles"].get("assistant", 0) if whole == "answers" else side[whole]
    return side[count] / of if of else None
