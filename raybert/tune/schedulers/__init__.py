"""The schedulers of a search; a new one is a file with a `SearchScheduler`, and its entry here."""

from __future__ import annotations

from raybert.tune.schedulers.asha import Asha
from raybert.tune.schedulers.hyperband import HyperBand
from raybert.tune.schedulers.pbt import PopulationBasedTraining
from raybert.tune.schedulers.scheduler import SCHEDULERS, NoScheduler

__all__ = ["SCHEDULERS"]

SCHEDULERS |= {
    "none": NoScheduler,
    "asha": Asha,
    "hyperband": HyperBand,
    "pbt": PopulationBasedTraining,
}
