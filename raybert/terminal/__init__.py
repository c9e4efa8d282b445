"""Terminal output: progress lines and number formats."""
