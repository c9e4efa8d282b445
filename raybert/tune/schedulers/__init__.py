"""Schedulers of the search, one file each."""
