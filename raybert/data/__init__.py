"""Data: sources, tokenizer, corpus, order, masking and loader."""
