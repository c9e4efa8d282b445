"""The result of a search: for `--json` and, with all trials, for the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raybert.storage.folder import Folder
from raybert.train.metrics_log import finite
from raybert.tune.finalists import Finalist, configured_trial
from raybert.tune.importance import METHOD, importance
from raybert.tune.space import Space
from raybert.tune.trial_store import TrialRecord, count_states

TRIALS, CLOCK = "trials.json", "search.json"


class SearchClock:
    """The seconds of a search over all its sessions; stored whenever a trial ends."""

    def __init__(self, stage: Folder) -> None:
        found = stage.read_json(CLOCK)["seconds"] if stage.exists(CLOCK) else 0.0
        self.earlier = float(found)  # seconds of earlier sessions
        self._stage, self._started = stage, time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds of all sessions so far."""
        return self.earlier + time.monotonic() - self._started

    def write(self) -> None:
        """Store the seconds."""
        self._stage.write_json(CLOCK, {"seconds": round(self.seconds, 1)})


@dataclass(frozen=True)
class Cost:
    """The compute that trials used."""

    trial_seconds: float
    core_hours: float
    gpu_hours: float

    @classmethod
    def of(cls, trials: Sequence[TrialRecord], cores: float, gpus: float) -> Cost:
        """Sum the trials' training seconds, times the cores and GPUs of each trial."""
        seconds = sum(trial.seconds for trial in trials)
        hours = seconds / 3600
        return cls(round(seconds, 1), round(hours * cores, 4), round(hours * gpus, 4))


def write_trials(
    stage: Folder,
    space: Space,
    trials: Sequence[TrialRecord],
    finalists: Sequence[Finalist],
    cost: Cost,
    scheduler: str,
    searcher: str,
) -> None:
    """Write `trials.json`, from which the report is made."""
    stage.write_json(
        TRIALS,
        finite(
            {
                "searcher": searcher,
                "scheduler": scheduler,
                "dimensions": [asdict(dimension) for dimension in space.dimensions],
                "trials": [trial.as_json() for trial in trials],
                "finalists": [finalist.as_json() for finalist in finalists],
                "importance": {"method": METHOD, "shares": importance(space, trials)},
                "cost": asdict(cost),
            }
        ),
    )


def search_result(
    trials: Sequence[TrialRecord], finalists: Sequence[Finalist], cost: Cost, seconds: float
) -> dict[str, Any]:
    """The result of `raybert tune --json`, without the keys of the winner's model."""
    first = configured_trial(trials)
    default = next(
        (f for f in finalists if first is not None and f.trial.values == first.values), None
    )
    found = {
        "trials": {"all": len(trials), **count_states(trials)},
        "best": finalists[0].as_json(),
        "default": None if default is None else default.as_json(),
        "seconds": round(seconds, 1),
        "cost": asdict(cost),
    }
    return dict(finite(found))
