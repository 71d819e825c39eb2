"""Formats of the files that stages exchange, and pure functions over them: records, shards, batches, ledger."""
