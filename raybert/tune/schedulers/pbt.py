"""Population-based training (arXiv 1711.09846).

After every interval the worst trials exploit the best: they copy their weights and continue with
perturbed values of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from raybert.errors import ConfigError
from raybert.tune.schedulers.scheduler import SearchScheduler, limited
from raybert.tune.space import Space

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from raybert.tune.search_session import SearchSession

EXPLOIT_ID = "exploit"  # a key of a trial's configuration; each exploit has its own value

#: Keys that may change while a trial runs.
MUTABLE = frozenset(
    f"finetune.{key}"
    for key in (
        *("lr", "weight_decay", "layer_decay", "max_grad_norm", "label_smoothing"),
        *("dropout", "head.dropout", "r_drop", "adversarial", "adversarial_size"),
    )
)


class PopulationBasedTraining(SearchScheduler):
    """Compares trials by their current scores: the weights that are copied are the current ones."""

    metric = "score"
    starts_all = True
    exploits = True

    def check_space(self, space: Space) -> None:
        """Reject keys that can't change while a trial runs, and conditions."""
        for dimension in space.dimensions:
            if dimension.key not in MUTABLE:
                raise ConfigError(
                    f"tune.space: {dimension.key} can't change while a trial runs, as pbt demands; "
                    f"leave it out, or set tune.scheduler.kind=asha (pbt searches over "
                    f"{', '.join(sorted(MUTABLE))})"
                )
            if dimension.when:
                raise ConfigError(
                    f"tune.space: {dimension.key}: pbt does not support conditions; leave `when` "
                    "out"
                )

    def build(self, space: Space | None, longest: float, session: SearchSession) -> TrialScheduler:
        """Build the scheduler; every exploit keeps the values inside the space."""
        from ray.tune.schedulers import PopulationBasedTraining as RayPopulationBasedTraining

        if space is None:
            raise ValueError("population-based training needs a search space")
        return limited(RayPopulationBasedTraining, session)(
            time_attr="epoch",
            perturbation_interval=self.config.interval_epochs,
            hyperparam_mutations=_mutations(space),
            quantile_fraction=self.config.quantile,
            custom_explore_fn=lambda values: {**space.clip(values), EXPLOIT_ID: uuid4().hex},
            log_config=False,
        )


def _mutations(space: Space) -> dict[str, Any]:
    """The space as Ray Tune's distributions."""
    import ray.tune

    found: dict[str, Any] = {}
    for dimension in space.dimensions:
        low, high = dimension.low, dimension.high
        if dimension.kind == "choice":
            found[dimension.key] = list(dimension.choices)
        elif dimension.is_integer:
            draw = ray.tune.lograndint if dimension.is_log else ray.tune.randint
            found[dimension.key] = draw(int(low), int(high) + 1)
        else:
            draw = ray.tune.loguniform if dimension.is_log else ray.tune.uniform
            found[dimension.key] = draw(low, high)
    return found
