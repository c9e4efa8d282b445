"""raybert: from raw text to a BERT of your own, a tuned classifier and an HTTP endpoint, on Ray."""

__version__ = "0.1.0"
