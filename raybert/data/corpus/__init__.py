"""A corpus: tokenized rows in Parquet parts."""
