"""What of a cluster would stop a run or slow it, found before the run begins.

Ray is asked by `nodes` and `reduction`; `findings` judges what they saw; `visit` does both.
"""
