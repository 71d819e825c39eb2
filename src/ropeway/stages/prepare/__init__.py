"""Stage prepare: dedup, split, decontamination and the ledger."""
