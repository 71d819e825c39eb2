"""The ledger: counts of every record and token of every source. It is written only if all its sums are correct.

read = forgotten + refused + kept; kept -> sequences (a document: its chunks)
conversations: kept + further answers of rewritten histories (`history: per_turn`) = sequences
sequences and their tokens = removed as duplicate + as contaminated + train + validation + unused
removed as duplicate = exact + near duplicates, if params remove them; if only counted, they are in the other parts
each epoch: train + repeats = drawn + not drawn
each epoch: drawn tokens = tokens in rows + lost to windows + lost to cuts; cells of rows = tokens + padding
all sources' rows = steps x global batch + left over
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ropeway.runtime.errors import DataError

_Sum = tuple[str, int, tuple[int, ...]]  # description, total, parts
_OPTIONAL = (
    "forget",
    "forgotten",
    "personal_data",
    "further_answers",
    "repeated",
    "repeated_tokens",
    "skipped_members",
)  # keys that a ledger lacks where they are empty


@dataclass(frozen=True, slots=True)
class RecordTotals:
    """Record counts of a source.

    Attributes:
        refused_by_fetch: Reason -> records.
        refused_by_tokenize: Reason -> records.
        with_special_tokens: Records with a special token's string in their text; refused if params reject them.
        special_token_hits: Special token's string -> occurrences in the source's texts.
        without_tokens: Kept documents that are empty, so have no chunk.
        files: File -> records read from it; empty if the source is not files.
        ignored_keys: Field in `ignored_keys` -> kept records in which it had a value.
        skipped_members: Reason -> members of archives that are not read.
        forgotten: Records that `forget` names; they are in no file of the run.
        personal_data: Personal data and secrets in the records that tokenize read, kept or refused; None:
            not looked for.
        further_answers: Sequences of conversations beyond their first, because each answer is one (`per_turn`).
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
    skipped_members: dict[str, int] = field(default_factory=dict)
    further_answers: int = 0
    forgotten: int = 0
    personal_data: "PersonalTotals | None" = None


@dataclass(frozen=True, slots=True)
class PersonalTotals:
    """Personal data and secrets in the records of a source.

    Attributes:
        action: What was done: `count`, `mask` or `refuse`.
        records: Records with any.
        found: Kind -> occurrences.
    """

    action: str
    records: int
    found: dict[str, int]


@dataclass(frozen=True, slots=True)
class SplitTotals:
    """Number of sequences, or of their tokens, in each part of the split.

    Attributes:
        unused: Validation sequences beyond `max_val_set`.
        duplicate: Removed before the split.
        contaminated: Removed from the training part after the split.
    """

    all: int
    train: int
    validation: int
    unused: int
    duplicate: int
    contaminated: int


@dataclass(frozen=True, slots=True)
class FindingCounts:
    """Counts of one kind of duplicates or contamination.

    Attributes:
        action: `off`: not searched. `count`: still in train, validation or unused. `remove`: in none of them.
        records: Records with at least one affected sequence.
        sequences: Affected sequences.
        tokens: Tokens of the affected sequences.
    """

    action: str
    records: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Findings:
    """Duplicates and contamination of a source.

    Attributes:
        exact: Records with the same text as an earlier record of this source or of one before it.
        near: Records that are near-duplicates of an earlier record, but not exact duplicates.
        contaminated: Training sequences that share a word n-gram with validation or with a prompt.
        with_prompts: Those of them that share an n-gram with a prompt.
    """

    exact: FindingCounts
    near: FindingCounts
    contaminated: FindingCounts
    with_prompts: int


@dataclass(frozen=True, slots=True)
class SourceEpoch:
    """One epoch of one source.

    Attributes:
        not_drawn: Training sequences that are not in this epoch, because of `fraction` or `size`.
        drawn: Sequences read, including repeats.
        drawn_tokens: Tokens of the complete sequences.
        windowed: Over-long conversations read from a later offset; `windowed_tokens` before and after are not read.
        cut: Over-long sequences read from their beginning; `cut_tokens` at their end are not read.
        cells: Tokens and padding of the rows, each row padded to a multiple of 16. A micro-batch pads to its longest
            row, so training has more. The padding of a packed row counts for the source of its first sequence.
        padding: Cells without a token.
        row_tokens: Tokens read.
        supervised: Tokens read that count in the loss.
        repeated: Draws of a sequence that the epoch has drawn before, because `fraction` is above 1.
        repeated_tokens: Tokens of the complete sequences of these draws.
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
    repeated: int = 0
    repeated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SourceLedger:
    """The counts of one source."""

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
        sequences: Sequences of all sources; equal to the rows in the padded layout, more than the rows if packed.
        left_over: Rows after the last full optimizer step; they are not trained.
    """

    epoch: int
    sequences: int
    rows: int
    global_batch_size: int
    steps: int
    left_over: int


@dataclass(frozen=True, slots=True)
class ForgetTotals:
    """The digests in `forget` of params.yaml.

    Attributes:
        listed: Distinct digests.
        matched: Those of a record of any source.
        unmatched: The others.
    """

    listed: int
    matched: int
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The counts of all sources, in the order of params, and of all epochs; `forget` is None if params name none."""

    sources: tuple[SourceLedger, ...]
    epochs: tuple[EpochTotals, ...]
    forget: ForgetTotals | None = None

    def to_json(self) -> dict[str, object]:
        """Return the content of ledger.json; keys that older ledgers do not have are left out where they are empty."""
        return asdict(self, dict_factory=_without_empty)


def _without_empty(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in pairs if value or key not in _OPTIONAL}


def check_ledger(ledger: Ledger) -> None:
    """Check that every sum of the ledger is correct and every source has supervised tokens.

    Raises:
        DataError: Some sums are wrong, each listed with its numbers; or a source has 0 supervised tokens.
    """
    faults = [
        f"  {what}: {total:,} is not {' + '.join(f'{part:,}' for part in parts)} = {sum(parts):,}"
        for what, total, parts in _iterate_sums(ledger)
        if total != sum(parts) or min(parts) < 0
    ]
    if faults:
        raise DataError(
            "\n".join(["the sums of the ledger are wrong; this is a bug in Ropeway, please report it", *faults])
        )
    for account in ledger.sources:
        if not any(epoch.supervised for epoch in account.epochs):
            drawn = sum(epoch.drawn for epoch in account.epochs)
            raise DataError(
                f"source {account.name}: 0 supervised tokens in {drawn:,} rows ({account.records.kept:,} records kept "
                f"of {account.records.read:,} read, {account.sequences.train:,} training sequences); check its columns "
                "and fraction, or remove it from datasets and sources"
            )


def _iterate_sums(ledger: Ledger) -> Iterator[_Sum]:
    """Yield (description, total, parts) of every sum to check."""
    if forget := ledger.forget:
        yield "forget, digests = matched + not matched", forget.listed, (forget.matched, len(forget.unmatched))
    for account in ledger.sources:
        name, records = account.name, account.records
        refused = (sum(records.refused_by_fetch.values()), sum(records.refused_by_tokenize.values()))
        found = (records.forgotten, *refused, records.kept)
        yield f"{name}, records read = forgotten + refused by fetch + by tokenize + kept", records.read, found
        if account.kind == "conversation":
            sums = (records.kept, records.further_answers)
            yield f"{name}, sequences = records kept + further answers", account.sequences.all, sums
        else:
            yield f"{name}, further answers of documents", records.further_answers, (0,)
        for unit, parts in (("sequences", account.sequences), ("tokens", account.tokens)):
            yield from _iterate_split_sums(f"{name}, {unit}", account, unit, parts)
        for part in account.epochs:
            yield from _iterate_epoch_sums(f"{name}, epoch {part.epoch}", account, part)
    for epoch in ledger.epochs:
        where = f"epoch {epoch.epoch}"
        drawn = tuple(account.epochs[epoch.epoch].drawn for account in ledger.sources)
        yield f"{where}, sequences = sum over sources", epoch.sequences, drawn
        trained = epoch.steps * epoch.global_batch_size
        yield f"{where}, rows = steps x global batch + left over", epoch.rows, (trained, epoch.left_over)


def _iterate_split_sums(where: str, account: SourceLedger, unit: str, parts: SplitTotals) -> Iterator[_Sum]:
    exact, near, contaminated = (
        getattr(found, unit) if found.action == "remove" else 0
        for found in (account.findings.exact, account.findings.near, account.findings.contaminated)
    )
    removed, split = (parts.duplicate, parts.contaminated), (parts.train, parts.validation, parts.unused)
    what = "removed as duplicate + as contaminated + train + validation + unused"
    yield f"{where} = {what}", parts.all, (*removed, *split)
    yield f"{where} removed as duplicate = exact + near", parts.duplicate, (exact, near)
    yield f"{where} removed as contaminated = found", parts.contaminated, (contaminated,)


def _iterate_epoch_sums(where: str, account: SourceLedger, part: SourceEpoch) -> Iterator[_Sum]:
    train = (account.sequences.train + part.repeated, account.tokens.train + part.repeated_tokens)
    yield f"{where}, training sequences + repeats = drawn + not drawn", train[0], (part.drawn, part.not_drawn)
    not_drawn = train[1] - part.drawn_tokens if part.not_drawn else 0
    yield f"{where}, training tokens + repeated = drawn + not drawn", train[1], (part.drawn_tokens, not_drawn)
    yield f"{where}, repeated tokens without repeats", 0 if part.repeated else part.repeated_tokens, (0,)
    lost = (part.windowed_tokens, part.cut_tokens)
    yield f"{where}, tokens drawn = in rows + lost to windows + to cuts", part.drawn_tokens, (part.row_tokens, *lost)
    yield f"{where}, cells = tokens in rows + padding", part.cells, (part.row_tokens, part.padding)
    unsupervised = part.row_tokens - part.supervised
    yield f"{where}, tokens in rows = supervised + not", part.row_tokens, (part.supervised, unsupervised)
