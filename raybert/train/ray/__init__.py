"""Ray Train: the training loop on many workers, restarted where one is lost."""
