"""What proves an exchange of population-based training: the log of the run that went on.

A child that goes on from a donor's weights logs the hash of those that it loaded, and at its first
logged step the learning rate that its optimizer had. Both are compared with what they should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raybert.train.optimizers import schedule_at
from raybert.train.settings import TrainConfig

LOADED, TRAINED = "weights_after", "trained"  # what is found of an exchange
FRESH = "fresh"  # in a hash's place: nothing was loaded


def is_open(exchange: Mapping[str, Any]) -> bool:
    """Whether the log may yet tell more of what proves an exchange, or refutes it."""
    is_told = LOADED in exchange and TRAINED in exchange
    return not is_told and "attempt" in exchange  # which an earlier version did not write down


def evidence(
    exchange: Mapping[str, Any], records: Sequence[Mapping[str, Any]], config: TrainConfig
) -> dict[str, Any]:
    """Find in a child's log what proves its last exchange, as far as it is there.

    Args:
        exchange: with the step whose state was taken over, and the attempt that took it over.
        records: of the child's run, in the order of steps.
        config: that the child was to go on with.

    Returns:
        `weights_after`: the hash of the weights that were loaded; `trained`: the first logged step
        since, its learning rate, and the one that the schedule gives with the mutated peak.
    """
    started = [
        record
        for record in records
        if record.get("event") == "start" and record["attempt"] >= exchange["attempt"]
    ]
    if not started:  # until then the later records are those of the life before
        return {}
    found = {LOADED: started[0].get("weights", FRESH)}
    trained = next(
        (r for r in records if r["kind"] == "train" and r["step"] > exchange["step"]), None
    )
    if trained is None:
        return found
    total = trained["total_steps"]
    warmup = round(total * config.warmup_fraction)
    due = config.lr * schedule_at(trained["step"] - 1, total, warmup, config)
    return {**found, TRAINED: {"step": trained["step"], "lr": trained["lr"], "due": due}}
