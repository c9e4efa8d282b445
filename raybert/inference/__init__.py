"""Answering without HTTP: classifiers, precisions, bulk prediction, evaluation, explanations."""
