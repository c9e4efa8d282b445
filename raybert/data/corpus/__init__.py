"""Building a corpus: tokenized rows in Parquet parts."""
