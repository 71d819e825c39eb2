"""Stage fetch: write each source's records as parquet and count every record."""
