"""Population-based training (arXiv 1711.09846).

After every interval the worst trials exploit the best: they copy their weights and continue with
perturbed values of theirs. Ray Tune passes a reference, the donor's name and step; the checkpoint
lies in the donor's folder. The trial then logs the hash of the weights that it loaded, and at its
first logged step the learning rate of its optimizer; both are compared with the expected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from raybert.errors import ConfigError, DamagedError
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore, Snapshot
from raybert.train.metrics_log import read_metrics
from raybert.train.schedules import schedule_at
from raybert.train.settings import TrainConfig
from raybert.train.tensor_file import hash_tensors
from raybert.tune.schedulers.scheduler import SearchScheduler, limited
from raybert.tune.space import Space, Values
from raybert.tune.trial_store import TRIAL, write_trial

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from raybert.tune.search_session import SearchSession

EXPLOIT_ID = "exploit"  # a key of a trial's configuration; each exploit has its own value
LOADED, TRAINED = "weights_after", "trained"  # keys of the verification
FRESH = "fresh"  # in place of a hash: no weights were loaded

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


def copy_donor(
    pointer: Mapping[str, Any],
    exploit_id: str | None,
    donor: Folder,
    folder: Folder,
    attempt: int,
    values: Values,
    config: TrainConfig,
) -> bool:
    """Copy the donor's checkpoint into a trial's folder, unless an earlier attempt has done so.

    `pointer` holds the donor's name (`trial`), the `step`, and the hash of the `weights`; `values`
    and `config` are those with which the trial continues. Returns whether it was copied.
    """
    trial = folder.read_json(TRIAL)
    if any(exploit.get("id") == exploit_id for exploit in trial["exchanges"]):
        return False  # since then the trial has trained further
    snapshot = _load(CheckpointStore(donor, 0, 1), pointer["step"])
    # The donor's best model stays in its folder; the trial has none of its own yet.
    no_best = {"best_score": None, "best_step": None, "best_metrics": None}
    snapshot.state = {**snapshot.state, **no_best}
    store = CheckpointStore(folder, attempt, config.keep_checkpoints)
    # The trial's own later steps are of the weights that it gives up.
    store.save(snapshot, best_step=None, wait=True, replaces_later=True)
    weights = pointer["weights"]
    if snapshot.step != pointer["step"]:
        weights = hash_tensors(snapshot.model)
    exploit = {
        "id": exploit_id,
        "from": pointer["trial"],
        "step": snapshot.step,
        "attempt": attempt,
        "weights": weights,
        "before": trial["values"],
        "after": values,
    }
    exploits = [*trial["exchanges"], exploit]
    write_trial(folder, values, config.seed, trial["begun"], exploits)
    return True


def verify_exploit(folder: Folder, config: TrainConfig) -> bool:
    """Add to `trial.json` what verifies its last exploit; return whether some is lacking."""
    trial = folder.read_json(TRIAL)
    exploit = trial["exchanges"][-1]
    exploit |= find_verification(exploit, read_metrics(folder), config)
    folder.write_json(TRIAL, trial)
    return lacks_verification(exploit)


def _load(store: CheckpointStore, step: int) -> Snapshot:
    """Load a donor's checkpoint, or its latest one if that step's was deleted meanwhile."""
    try:
        return store.load(step)
    except DamagedError:
        latest = store.load_latest(lambda text: None)
        if latest is None:
            raise
        return latest


def lacks_verification(exploit: Mapping[str, Any]) -> bool:
    """Whether later records of the log may complete the verification of an exploit."""
    is_complete = LOADED in exploit and TRAINED in exploit
    return not is_complete and "attempt" in exploit  # earlier versions did not write the attempt


def find_verification(
    exploit: Mapping[str, Any], records: Sequence[Mapping[str, Any]], config: TrainConfig
) -> dict[str, Any]:
    """Find what verifies an exploit, as far as the log of the trial's run has it.

    `weights_after` is the hash of the weights that were loaded; `trained` is the first logged step
    since then, its learning rate (`lr`), and the rate that the schedule gives (`due`).
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
