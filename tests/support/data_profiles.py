"""Data profiles of records that a test writes down, without tokenizing: a token is the hash of a word."""

from hashlib import blake2b

import numpy as np

from ropeway.data.data_profile import DataProfile, build_data_profile, count_scripts, histogram, smallest

TOKENIZER = "t" * 64


def profile_texts(texts, *, tokenizer=TOKENIZER, turns=(), roles=(), duplicates=0, source="docs", **counts):
    """Return the data_profile.json of these documents as one source."""
    profile = DataProfile(records=len(texts), conversations=len(turns))
    lengths = [max(1, len(text.split())) for text in texts]
    words = [sum(word.encode()) % 997 for text in texts for word in text.split() or [""]]
    profile.count_tokens(np.asarray(words, np.int64), np.asarray(lengths, np.int64))
    for text in texts:
        profile.characters += len(text)
        profile.scripts.update(count_scripts(text))
    profile.turns += histogram(list(turns))
    profile.roles.update(dict(roles))
    keys = [int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) for text in texts]
    profile.hashes = smallest(np.asarray(keys, np.uint64))
    for name, count in counts.items():
        setattr(profile, name, count)
    tokenized = {"tokenizer": tokenizer, "sources": {source: profile.to_json()}}
    return build_data_profile(tokenized, {"sources": [_account(source, profile, duplicates)]})


def _account(source, profile, duplicates):
    records = {"read": profile.records, "refused_by_fetch": {}, "refused_by_tokenize": {}}
    findings = {"exact": {"records": duplicates}, "near": {"records": 0}}
    epochs = [{"row_tokens": profile.tokens}]
    return {"name": source, "kind": "document", "records": records, "findings": findings, "epochs": epochs}
