"""HyperBand (arXiv 1603.06560): successive halving in brackets with different first rungs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raybert.cluster.internals.private_names import has_private_api
from raybert.errors import ConfigError
from raybert.tune.schedulers.scheduler import SearchScheduler, limited
from raybert.tune.space import Space

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from raybert.tune.search_session import SearchSession


class HyperBand(SearchScheduler):
    """Pauses the trials of a bracket at a milestone until all have reached it."""

    has_rungs = True
    starts_all = True

    def check_epochs(self, longest: float) -> None:
        """Reject trials that are too short for a bracket that stops any."""
        if math.ceil(longest) < self.config.reduction:
            raise ConfigError(
                f"tune.scheduler.kind=hyperband stops no trial within {longest:g} epochs with "
                f"tune.scheduler.reduction={self.config.reduction:g}; train for at least as many "
                "epochs, lower the reduction, or set tune.scheduler.kind=asha"
            )

    def build(self, space: Space | None, longest: float, session: SearchSession) -> TrialScheduler:
        """Build the scheduler and fill its brackets with the trials of earlier sessions."""
        from ray.tune.schedulers import HyperBandScheduler

        from raybert.tune.schedulers.resumable_hyperband import ResumableHyperBand

        settings = {
            "time_attr": "epoch",
            "max_t": max(1, math.ceil(longest)),
            "reduction_factor": self.config.reduction,
            "stop_last_trials": False,
        }
        if has_private_api("hyperband"):
            return limited(ResumableHyperBand, session)(session.source.trials, **settings)
        return limited(HyperBandScheduler, session)(**settings)
