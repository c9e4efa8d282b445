"""Tasks: masked language modelling, and fine-tuning on labelled texts."""
