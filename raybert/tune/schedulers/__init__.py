"""The schedulers by their names in `tune.scheduler.kind`.

A new scheduler is one file with a subclass of `SearchScheduler`, its entry here, and its name in
`SchedulerConfig.kind`.
"""

from __future__ import annotations

from raybert.tune.schedulers.asha import Asha
from raybert.tune.schedulers.hyperband import HyperBand
from raybert.tune.schedulers.pbt import PopulationBasedTraining
from raybert.tune.schedulers.scheduler import NoScheduler, SearchScheduler

SCHEDULERS: dict[str, type[SearchScheduler]] = {
    "none": NoScheduler,
    "asha": Asha,
    "hyperband": HyperBand,
    "pbt": PopulationBasedTraining,
}
