"""The stages of an experiment, one after the other or each alone."""
