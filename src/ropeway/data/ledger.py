"""The ledger: where every record and every token of every source went. Its sums come out even or there is no ledger.

read = refused + kept; kept -> sequences (a document: its chunks)
sequences and their tokens = removed as duplicate + as contaminated + train + validation + unused
removed as duplicate = exact + near duplicates, each where params remove them; counted only: they are in the other parts
each epoch: drawn tokens = tokens in rows + lost to windows + lost to cuts; cells of rows = tokens + padding
all sources' rows = steps x global batch + left over
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ropeway.runtime.errors import DataError

_Sum = tuple[str, int, tuple[int, ...]]  # what is added up, the total, the parts


@dataclass(frozen=True, slots=True)
class RecordTotals:
    """What became of a source's records.

    Attributes:
        refused_by_fetch: Reason -> records.
        refused_by_tokenize: Likewise.
        with_special_tokens: Records in whose text a special token's string stands; refused when params reject them.
        special_token_hits: Such a string -> how often it stands in the source's texts.
        without_tokens: Kept documents that are empty, hence no chunk.
        files: File -> records read of it; none for what is no file.
        ignored_keys: Field -> kept records in which it carried something and was left out, as params say.
    """

    read: int
    refused_by_fetch: dict[str, int]
    refused_by_tokenize: dict[str, int]
    kept: int
    with_special_tokens: int
    special_token_hits: dict[str, int]
    without_tokens: int
    files: dict[str, int] = field(default_factory=dict)
    ignored_keys: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SplitTotals:
    """Sequences, or tokens, by what they are for.

    Attributes:
        unused: What validation's limit leaves over.
        duplicate: Removed before the split.
        contaminated: Removed from the training part behind it.
    """

    all: int
    train: int
    validation: int
    unused: int
    duplicate: int
    contaminated: int


@dataclass(frozen=True, slots=True)
class FindingCounts:
    """What was looked for and found.

    Attributes:
        action: `off`: not looked for. `count`: these are in train, validation or unused. `remove`: in none of them.
        records: Records concerned, at least in part.
        sequences: Their sequences that are concerned.
        tokens: Of these sequences.
    """

    action: str
    records: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What a source repeats.

    Attributes:
        exact: Records whose text an earlier record has, in this source or one before it.
        near: Records, not exact duplicates, that are like an earlier one.
        contaminated: Training sequences that share a run of words with validation or with a prompt.
        with_prompts: Sequences among these that share one with a prompt.
    """

    exact: FindingCounts
    near: FindingCounts
    contaminated: FindingCounts
    with_prompts: int


@dataclass(frozen=True, slots=True)
class SourceEpoch:
    """One epoch of one source.

    Attributes:
        not_drawn: Training sequences that the fraction leaves out this time.
        drawn: Sequences read.
        drawn_tokens: Their tokens, whole.
        windowed: Over-long conversations of which a later window is read; `windowed_tokens` are lost around it.
        cut: Over-long sequences read from their beginning; `cut_tokens` are lost behind.
        cells: Tokens and padding of the rows, each padded by itself to the multiple of 16; a micro-batch pads to its
            longest row, hence more, depending on ranks. A packed row's padding is its first sequence's source's.
        padding: Cells without a token.
        row_tokens: Tokens read.
        supervised: Of these, those that count in the loss.
    """

    epoch: int
    not_drawn: int
    drawn: int
    drawn_tokens: int
    windowed: int
    windowed_tokens: int
    cut: int
    cut_tokens: int
    cells: int
    padding: int
    row_tokens: int
    supervised: int


@dataclass(frozen=True, slots=True)
class SourceLedger:
    """All of one source."""

    name: str
    kind: str
    records: RecordTotals
    sequences: SplitTotals
    tokens: SplitTotals
    findings: Findings
    epochs: tuple[SourceEpoch, ...]


@dataclass(frozen=True, slots=True)
class EpochTotals:
    """One epoch of the mixture.

    Attributes:
        sequences: Drawn from all sources; as many rows in the padded layout, fewer in the packed one.
        left_over: Rows behind the last full optimizer step; they are not trained.
    """

    epoch: int
    sequences: int
    rows: int
    global_batch_size: int
    steps: int
    left_over: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """The whole account, in the order of params."""

    sources: tuple[SourceLedger, ...]
    epochs: tuple[EpochTotals, ...]

    def to_json(self) -> dict[str, object]:
        """Return what ledger.json holds."""
        return asdict(self)


def check_ledger(ledger: Ledger) -> None:
    """Raise DataError unless every sum comes out even and every source has something to learn.

    Raises:
        DataError: All sums that do not, each with its numbers.
    """
    faults = [
        f"  {what}: {total:,} is not {' + '.join(f'{part:,}' for part in parts)} = {sum(parts):,}"
        for what, total, parts in _sums(ledger)
        if total != sum(parts) or min(parts) < 0
    ]
    if faults:
        raise DataError(
            "\n".join(["the ledger does not come out even; this is a fault in Ropeway, report it", *faults])
        )
    for account in ledger.sources:
        if not any(epoch.supervised for epoch in account.epochs):
            drawn = sum(epoch.drawn for epoch in account.epochs)
            raise DataError(
                f"source {account.name}: 0 supervised tokens in {drawn:,} rows ({account.records.kept:,} records kept "
                f"of {account.records.read:,} read, {account.sequences.train:,} training sequences); it teaches "
                "nothing: check its columns and fraction, or take it out of datasets and sources"
            )


def _sums(ledger: Ledger) -> Iterator[_Sum]:
    """Yield (what, total, parts) of every sum that must come out even."""
    for account in ledger.sources:
        name, records = account.name, account.records
        refused = (sum(records.refused_by_fetch.values()), sum(records.refused_by_tokenize.values()))
        yield f"{name}, records read = refused by fetch + by tokenize + kept", records.read, (*refused, records.kept)
        if account.kind == "conversation":
            yield f"{name}, records kept = sequences", records.kept, (account.sequences.all,)
        for unit, parts in (("sequences", account.sequences), ("tokens", account.tokens)):
            yield from _part_sums(f"{name}, {unit}", account, unit, parts)
        for part in account.epochs:
            yield from _epoch_sums(f"{name}, epoch {part.epoch}", account, part)
    for epoch in ledger.epochs:
        where = f"epoch {epoch.epoch}"
        drawn = tuple(account.epochs[epoch.epoch].drawn for account in ledger.sources)
        yield f"{where}, sequences = sum over sources", epoch.sequences, drawn
        trained = epoch.steps * epoch.global_batch_size
        yield f"{where}, rows = steps x global batch + left over", epoch.rows, (trained, epoch.left_over)


def _part_sums(where: str, account: SourceLedger, unit: str, parts: SplitTotals) -> Iterator[_Sum]:
    exact, near, contaminated = (
        getattr(found, unit) if found.action == "remove" else 0
        for found in (account.findings.exact, account.findings.near, account.findings.contaminated)
    )
    removed, split = (parts.duplicate, parts.contaminated), (parts.train, parts.validation, parts.unused)
    what = "removed as duplicate + as contaminated + train + validation + unused"
    yield f"{where} = {what}", parts.all, (*removed, *split)
    yield f"{where} removed as duplicate = exact + near", parts.duplicate, (exact, near)
    yield f"{where} removed as contaminated = found", parts.contaminated, (contaminated,)


def _epoch_sums(where: str, account: SourceLedger, part: SourceEpoch) -> Iterator[_Sum]:
    yield f"{where}, training sequences = drawn + not drawn", account.sequences.train, (part.drawn, part.not_drawn)
    lost = (part.windowed_tokens, part.cut_tokens)
    yield f"{where}, tokens drawn = in rows + lost to windows + to cuts", part.drawn_tokens, (part.row_tokens, *lost)
    yield f"{where}, cells = tokens in rows + padding", part.cells, (part.row_tokens, part.padding)
    unsupervised = part.row_tokens - part.supervised
    yield f"{where}, tokens in rows = supervised + not", part.row_tokens, (part.supervised, unsupervised)
