"""Linear models on n-grams, the quick baseline of every task."""
