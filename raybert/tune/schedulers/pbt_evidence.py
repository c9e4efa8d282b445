"""Evidence of a PBT exploit, taken from the log of the run that continued.

A trial that continues from a donor's weights logs the hash of the weights that it loaded, and at
its first logged step the learning rate of its optimizer. Both are compared with the expected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raybert.train.schedules import schedule_at
from raybert.train.settings import TrainConfig

LOADED, TRAINED = "weights_after", "trained"  # keys of the evidence
FRESH = "fresh"  # in place of a hash: no weights were loaded


def lacks_evidence(exploit: Mapping[str, Any]) -> bool:
    """Whether later records of the log may complete the evidence of an exploit."""
    is_complete = LOADED in exploit and TRAINED in exploit
    return not is_complete and "attempt" in exploit  # earlier versions did not write the attempt


def find_evidence(
    exploit: Mapping[str, Any], records: Sequence[Mapping[str, Any]], config: TrainConfig
) -> dict[str, Any]:
    """Find the evidence of a trial's last exploit, as far as its log has it.

    Args:
        exploit: with the step of the copied checkpoint and the attempt that copied it.
        records: the log of the trial's run, in the order of steps.
        config: with which the trial continues.

    Returns:
        `weights_after`: the hash of the weights that were loaded; `trained`: the first logged step
        since then, its learning rate (`lr`), and the rate that the schedule gives for the new peak
        (`due`).
    """
    started = [
        record
        for record in records
        if record.get("event") == "start" and record["attempt"] >= exploit["attempt"]
    ]
    if not started:  # the records are still those of before the exploit
        return {}
    found = {LOADED: started[0].get("weights", FRESH)}
    trained = next(
        (r for r in records if r["kind"] == "train" and r["step"] > exploit["step"]), None
    )
    if trained is None:
        return found
    total = trained["total_steps"]
    warmup = round(total * config.warmup_fraction)
    due = config.lr * schedule_at(trained["step"] - 1, total, warmup, config)
    return {**found, TRAINED: {"step": trained["step"], "lr": trained["lr"], "due": due}}
