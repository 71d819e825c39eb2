"""Data of `ropeway inspect`: one sequence, or one row of an epoch, token by token with its loss mask."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ropeway.config.params import Profile
from ropeway.data.batches import EpochPlan, plan_epoch
from ropeway.data.shards import Shards, open_shards
from ropeway.models.tokenizer import open_tokenizer
from ropeway.reporting.token_view import (
    DisplayToken,
    Reading,
    Vocabulary,
    find_part,
    next_token,
    read_piece,
    read_whole,
)
from ropeway.reporting.turns import ConversationFinder, Turns
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import NAME, file_sha256
from ropeway.runtime.workspace import Workspace

_REMEDY = "run `ropeway run`, or `dvc repro prepare`"


@dataclass(frozen=True)
class Inspection:
    """A sequence, or the pieces of a row; `facts` identifies it in the JSON output.

    Attributes:
        turns: The conversation of a sequence; None for a row, a document, or if its record cannot be found.
        note: Why the conversation of a sequence is not shown; else empty.
    """

    title: str
    readings: tuple[Reading, ...]
    facts: dict[str, str | int | None]
    turns: Turns | None = None
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """Prepared data with its profile and vocabulary.

    Attributes:
        conversations: Finds the conversations of sequences; None where raw/ or tokens/ are not there.
        ignored_keys: Source -> field in `ignored_keys` -> kept records in which it had a value.
    """

    shards: Shards
    profile: Profile
    vocabulary: Vocabulary
    conversations: ConversationFinder | None = None
    ignored_keys: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def open_prepared(workspace: Workspace, profile: Profile) -> Prepared:
    """Open the prepared data and its tokenizer.

    Raises:
        DataError: It is missing or incomplete, or `base/` holds a different tokenizer.
    """
    if not (workspace.data / "manifest.json").is_file():
        raise DataError(f"{workspace.data}: profile '{workspace.profile}' has no prepared data; {_REMEDY}")
    shards = open_shards(workspace.data, verify=False)  # hashing all shards could take minutes
    path = workspace.base / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: this file is missing, and decoding the data needs it; run `dvc repro base`")
    if (found := file_sha256(path)) != shards.manifest["tokenizer"]:
        raise DataError(
            f"{path}: sha256 is {found[:12]}…, the data was prepared with {shards.manifest['tokenizer'][:12]}…; "
            "run `dvc repro prepare`"
        )
    ledger = json.loads(workspace.ledger.read_bytes()) if workspace.ledger.is_file() else {}
    ignored = {account["name"]: account["records"].get("ignored_keys", {}) for account in ledger.get("sources", ())}
    conversations = _open_conversations(workspace, profile)
    return Prepared(shards, profile, Vocabulary(open_tokenizer(workspace.base)), conversations, ignored)


def _open_conversations(workspace: Workspace, profile: Profile) -> ConversationFinder | None:
    """Return what finds conversations; None where raw/ or tokens/ were removed, which only the turns need."""
    if not (workspace.tokens / NAME).is_file() or not (workspace.raw / NAME).is_file():
        return None
    return ConversationFinder(workspace, profile)


def inspect_sequence(prepared: Prepared, name: str, number: int) -> Inspection:
    """Return one whole sequence of a source; raise ConfigError if the source or sequence does not exist."""
    sources = prepared.shards.sources
    names = [source.name for source in sources]
    if name not in names:
        raise ConfigError(
            f"source '{name}' is not in this profile's data; sources: {', '.join(names)}. `--profile` chooses another"
        )
    at = names.index(name)
    count, longest = len(sources[at].lengths), prepared.profile.max_length
    if not 0 <= number < count:
        there = f"0 to {count - 1:,}" if count else "none"
        raise ConfigError(f"source {name} has no sequence {number:,}; sequences: {there}")
    reading = read_whole(at, number, prepared.shards, prepared.profile)
    part = find_part(number, sources[at])
    title = f"{name}, sequence {number:,} of {count:,} ({sources[at].kind}, {part or 'neither train nor validation'})"
    if reading.length > longest:
        title += f": {reading.length - longest:,} tokens longer than max_length ({longest:,} tokens)"
    turns = prepared.conversations.find(name, number) if prepared.conversations else None
    note = "" if turns or sources[at].kind == "document" else _say_why_not(prepared)
    return Inspection(title, (reading,), {"source": name, "sequence": number, "part": part}, turns, note)


def _say_why_not(prepared: Prepared) -> str:
    """Return why a conversation is not shown turn by turn."""
    if prepared.conversations is None:
        return "not shown turn by turn: raw/ or tokens/ were removed; `dvc repro tokenize` writes them again"
    return "not shown turn by turn: its record was not found near its place in raw/, where many records were refused"


def inspect_row(prepared: Prepared, number: int, *, epoch: int) -> Inspection:
    """Return one row of an epoch; raise ConfigError if the epoch or row does not exist."""
    epochs = prepared.profile.num_train_epochs
    if not 0 <= epoch < epochs:
        raise ConfigError(f"epoch {epoch} does not exist; epochs: 0 to {epochs - 1} (num_train_epochs: {epochs})")
    plan = plan_epoch(prepared.shards, prepared.profile, epoch=epoch)
    if not 0 <= number < plan.rows:
        raise ConfigError(f"epoch {epoch} has no row {number:,}; rows: 0 to {plan.rows - 1:,}")
    readings = tuple(read_piece(piece, prepared.shards, prepared.profile) for piece in plan.row(number))
    return Inspection(
        f"row {number:,} of epoch {epoch}, {_place(plan, number)}", readings, {"row": number, "epoch": epoch}
    )


def _place(plan: EpochPlan, number: int) -> str:
    step = number // plan.profile.global_batch_size
    return f"step {step + 1:,} of {plan.steps:,}" if step < plan.steps else "left over, not trained"


def to_json(inspection: Inspection, prepared: Prepared) -> str:
    """Return an inspection as one JSON object: id, text and mask of every token."""
    pieces = [
        {
            "source": reading.source,
            "sequence": reading.piece.sequence,
            "begin": reading.piece.begin,
            "end": reading.piece.end,
            "length": reading.length,
            "supervised": reading.supervised,
            "supervised_next": next_token(reading, prepared.shards, prepared.profile, prepared.vocabulary),
            "tokens": [
                {
                    "id": shown.number,
                    "bytes" if shown.is_bytes else "text": shown.text,
                    "supervised": is_supervised,
                    "special": shown.is_special,
                }
                for shown, is_supervised in pair_tokens(reading, prepared)
            ],
        }
        for reading in inspection.readings
    ]
    more: dict[str, object] = {"conversation": inspection.turns.to_json()} if inspection.turns else {}
    more |= {"note": inspection.note} if inspection.note else {}
    return json.dumps({**inspection.facts, "pieces": pieces, **more}, ensure_ascii=False)


def pair_tokens(reading: Reading, prepared: Prepared) -> Iterator[tuple[DisplayToken, bool]]:
    """Return each decoded token of a reading, and whether it is supervised."""
    return zip(prepared.vocabulary.show(reading.tokens.tolist()), reading.supervised_mask.tolist(), strict=True)


def list_sources(prepared: Prepared) -> list[dict[str, object]]:
    """Return the sources with their counts."""
    return [
        {
            "source": source.name,
            "kind": source.kind,
            "sequences": len(source.lengths),
            "tokens": int(source.lengths.sum(dtype="int64")),
            "longest": int(source.lengths.max(initial=0)),
            "train": len(source.train),
            "validation": len(source.validation),
            "ignored_keys": dict(prepared.ignored_keys.get(source.name, {})),
        }
        for source in prepared.shards.sources
    ]
