"""The data profile of a unit, from the records and arrays that are in memory when it is tokenized."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ropeway.data.data_profile import SYSTEM_BUCKETS, DataProfile, bucket, count_scripts, histogram, smallest
from ropeway.data.raw_records import Record
from ropeway.data.text_batches import BATCH_CHARACTERS, iterate_batches
from ropeway.models.conversation import Conversation
from ropeway.stages.tokenize.encode import Encoded

_THINK = "<think>"


def profile_unit(records: Sequence[Record], parts: Iterable[Encoded], exact: NDArray[np.uint64]) -> DataProfile:
    """Return the profile of a unit's kept records, their sequences and `(R, 2)` exact keys."""
    profile = DataProfile(records=len(records), hashes=smallest(exact[:, 0]))
    tokens, lengths = [np.empty(0, np.uint32)], [np.empty(0, np.int32)]
    for part in parts:
        tokens.append(part.tokens)
        lengths.append(part.lengths)
    profile.count_tokens(np.concatenate(tokens), np.concatenate(lengths))
    talks = [record for record in records if isinstance(record, Conversation)]
    _count_texts(profile, [text for record in records for text in _texts(record)])
    if talks:
        _count_conversations(profile, talks)
    return profile


def _texts(record: Record) -> tuple[str, ...]:
    return (record.system, *record.turns) if isinstance(record, Conversation) else (record,)


def _count_texts(profile: DataProfile, texts: Sequence[str]) -> None:
    """Count characters and scripts; texts are joined, because a call per short text takes longer than its counting."""
    for batch in iterate_batches(texts, len, BATCH_CHARACTERS):
        joined = "".join(batch)
        profile.characters += len(joined)
        profile.scripts.update(count_scripts(joined))


def _count_conversations(profile: DataProfile, talks: Sequence[Conversation]) -> None:
    profile.conversations += len(talks)
    profile.turns += histogram([len(talk.turns) for talk in talks])
    systems = [message for talk in talks for message in _count_conversation(profile, talk)]
    hashes = [int.from_bytes(blake2b(one.encode("utf-8", "surrogatepass"), digest_size=8).digest()) for one in systems]
    profile.systems += np.bincount(bucket(np.asarray(hashes, np.uint64), SYSTEM_BUCKETS), minlength=SYSTEM_BUCKETS)


def _count_conversation(profile: DataProfile, talk: Conversation) -> list[str]:
    """Count the messages of a conversation; return its system messages."""
    systems = [talk.system] if talk.system else []
    if not talk.form:
        users = (len(talk.turns) + 1) // 2
        profile.roles["user"] += users
        profile.roles["assistant"] += len(talk.turns) - users
        profile.with_reasoning += sum(_THINK in text for text in talk.turns[1::2])
    else:
        form = talk.read_form()
        profile.roles.update(form["roles"])
        profile.with_tools += bool(form.get("tools"))
        for role, text, further in zip(form["roles"], talk.turns, form["fields"], strict=True):
            if role == "system":
                systems.append(text)
            if role == "assistant":
                profile.with_calls += bool(further.get("tool_calls"))
                profile.with_reasoning += bool(further.get("reasoning_content")) or _THINK in text
    if talk.system:
        profile.roles["system"] += 1
    profile.with_system += bool(systems)
    return systems
