"""Token ids to and from Parquet."""
