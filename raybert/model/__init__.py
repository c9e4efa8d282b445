"""The encoder, its heads, and the Hugging Face layout in which finished models are kept."""
