"""Stage fetch: sources to parquet, every record counted."""
