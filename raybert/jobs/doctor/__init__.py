"""Checks of a cluster before a run: `nodes` and `all_reduce` measure, `checks` evaluates."""
