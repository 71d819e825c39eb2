r"""What makes a record the same text as another: the digest that duplicates, a version's records and `forget` share.

The texts of a record are a document, or the turns of a conversation, and its roles, calls and tools if it has any but
alternating texts. System messages do not count, because thousands of different conversations share one. Each text is
brought to Unicode's NFC, and each run of white space becomes one space, none at its ends; case and punctuation count.
The texts are joined by U+001E, which white space includes. The digest is BLAKE2b of their UTF-8, 16 bytes, written as
32 hex digits. `docs/decisions/0005-duplicates.md` says why.
"""

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ropeway.data.raw_records import Record
from ropeway.models.conversation import Conversation

DIGEST_BYTES = 16


def compared_texts(record: Record) -> tuple[str, ...]:
    """Return the texts of a record that are fingerprinted: a document, or a conversation's turns."""
    return record.turns if isinstance(record, Conversation) else (record,)


def identity_texts(record: Record) -> tuple[str, ...]:
    """Return what makes a record equal to another: its compared texts, and a conversation's roles, calls and tools."""
    return (*record.turns, record.form) if isinstance(record, Conversation) and record.form else compared_texts(record)


def record_digest(record: Record) -> bytes:
    """Return a record's 16-byte digest; zeros if it has no text."""
    return exact_key(identity_texts(record))


def exact_key(texts: Sequence[str]) -> bytes:
    r"""Return a 16-byte hash of texts that ignores white space and Unicode normal form; zeros for no text.

    >>> exact_key(["a  b\n"]) == exact_key([" a b"]), exact_key(["a", "b"]) == exact_key(["a b"])
    (True, False)
    """
    folded = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    if not any(folded):
        return bytes(DIGEST_BYTES)
    # `split` treats U+001E as white space, so no folded text contains it.
    return blake2b("\x1e".join(folded).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def exact_keys(records: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
    """Return the `(n, 2)` exact-duplicate keys of records: their digests as two little-endian numbers each."""
    return np.frombuffer(b"".join(map(exact_key, records)), "<u8").reshape(-1, 2)
