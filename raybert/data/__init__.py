"""Text: sources, tokenizer, corpus, order and masking."""
