"""No scheduler: every trial is trained to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raybert.tune.schedulers.scheduler import SearchScheduler, limited
from raybert.tune.space import Space

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from raybert.tune.search_session import SearchSession


class NoScheduler(SearchScheduler):
    """Trials run in the order in which they were proposed."""

    def build(self, space: Space | None, longest: float, session: SearchSession) -> TrialScheduler:
        """Build Ray Tune's first-in, first-out scheduler."""
        from ray.tune.schedulers import FIFOScheduler

        return limited(FIFOScheduler, session)()
