"""Stage prepare: token shards, split, ledger."""
