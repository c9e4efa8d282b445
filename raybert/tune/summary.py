"""What a search came to: for `--json`, for the report, and as the configuration of the winner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raybert.storage.folder import Folder
from raybert.train.metrics_log import finite
from raybert.tune.finalists import Finalist, configured
from raybert.tune.importance import METHOD, importance
from raybert.tune.space import Space
from raybert.tune.trial_store import TrialRecord, count_states

TRIALS, CLOCK = "trials.json", "search.json"


@dataclass
class Clock:
    """The seconds that a search took over all its sessions, kept in its folder."""

    stage: Folder
    before: float = 0.0  # of earlier sessions

    @classmethod
    def read(cls, stage: Folder) -> Clock:
        """Read what earlier sessions took."""
        found = stage.read_json(CLOCK)["seconds"] if stage.exists(CLOCK) else 0.0
        return cls(stage, float(found))

    def write(self, seconds: float) -> None:
        """Write down what this session has taken so far, with those before."""
        self.stage.write_json(CLOCK, {"seconds": round(self.before + seconds, 1)})


@dataclass(frozen=True)
class Cost:
    """What trials took of the machines."""

    trial_seconds: float
    core_hours: float
    gpu_hours: float

    @classmethod
    def of(cls, entries: Sequence[TrialRecord], cores: float, gpus: float) -> Cost:
        """Add up the trials' own seconds, times the cores and GPUs that each was given."""
        seconds = sum(entry.seconds for entry in entries)
        hours = seconds / 3600
        return cls(round(seconds, 1), round(hours * cores, 4), round(hours * gpus, 4))


def write_trials(
    stage: Folder,
    space: Space,
    entries: Sequence[TrialRecord],
    finalists: Sequence[Finalist],
    cost: Cost,
    scheduler: str,
    searcher: str,
) -> None:
    """Write what the report shows of a search."""
    stage.write_json(
        TRIALS,
        finite(
            {
                "searcher": searcher,
                "scheduler": scheduler,
                "dimensions": [asdict(dimension) for dimension in space.dimensions],
                "trials": [entry.as_json() for entry in entries],
                "finalists": [finalist.as_json() for finalist in finalists],
                "importance": {"method": METHOD, "shares": importance(space, entries)},
                "cost": asdict(cost),
            }
        ),
    )


def result_of(
    entries: Sequence[TrialRecord], finalists: Sequence[Finalist], cost: Cost, seconds: float
) -> dict[str, Any]:
    """What `raybert tune --json` ends with, but for what the winner's model adds."""
    first = configured(entries)
    default = next(
        (f for f in finalists if first is not None and f.trial.values == first.values), None
    )
    found = {
        "trials": {"all": len(entries), **count_states(entries)},
        "best": finalists[0].as_json(),
        "default": None if default is None else default.as_json(),
        "seconds": round(seconds, 1),
        "cost": asdict(cost),
    }
    return dict(finite(found))
