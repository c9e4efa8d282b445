"""ASHA, asynchronous successive halving (arXiv 1810.05934).

At each rung, a number of epochs, a trial continues only if it is among the best of the trials that
have reached that rung.
"""

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


class Asha(SearchScheduler):
    """Stops the worse trials at each rung."""

    has_rungs = True

    def check_epochs(self, longest: float) -> None:
        """Reject a first rung past the end of the longest trial."""
        if self.config.grace_epochs > longest:
            raise ConfigError(
                f"tune.scheduler.grace_epochs={self.config.grace_epochs:g} is past the longest "
                f"trial's {longest:g} epochs; lower it, or set tune.scheduler.kind=none"
            )

    def build(self, space: Space | None, longest: float, session: SearchSession) -> TrialScheduler:
        """Build the scheduler and fill its rungs with the evaluations of earlier sessions."""
        from ray.tune.schedulers import AsyncHyperBandScheduler

        scheduler = limited(AsyncHyperBandScheduler, session)(
            time_attr="epoch",
            max_t=longest,
            grace_period=self.config.grace_epochs,
            reduction_factor=self.config.reduction,
            stop_last_trials=False,
        )
        if has_private_api("asha"):
            from raybert.cluster.internals.tune import add_asha_result

            for record in session.source.trials:
                best = -math.inf
                for evaluation in record.evaluations:
                    best = max(best, evaluation.score)
                    add_asha_result(scheduler, record.name, evaluation.epoch, best)
        return scheduler
