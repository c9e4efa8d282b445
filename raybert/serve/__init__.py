"""Answering: the classifier over raw texts, in bulk through Ray Data and one by one."""
