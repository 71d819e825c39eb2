"""Formats of the files that stages exchange, and pure decisions over them: records, shards, batches, ledger."""
