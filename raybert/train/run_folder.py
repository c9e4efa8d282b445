"""A run's folder: the configuration and inputs that it began with, its attempts and its result.

Running a name again resumes it; a finished run only returns its result. A resumed run must be the
run that was begun: apart from its budget, its workers and its logging, no setting may differ that
changes more than how numbers are rounded. Each start is an attempt with a number of its own. An
attempt that finds a later one ends; what it may still have written by then does not count
(`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from raybert.config import differences, flatten
from raybert.errors import ConfigError, DamagedError, DataError, Superseded, damaged_file
from raybert.storage.exclusive import numbers_taken, take_number
from raybert.storage.folder import Folder
from raybert.storage.retry import retry
from raybert.train.settings import MAY_CHANGE, ROUNDING, defaults
from raybert.yaml_values import parse_yaml

CONFIG, RESULT, INPUTS = "config.yaml", "result.json", "inputs.json"
ORDER = "order.json"  # the micro-batches of a run that was resumed with others
#: Values that leave a choice to the data: what was chosen is in the data's own description.
_LEFT_OPEN = {"corpus.tokenizer.kind": "auto"}
DIGESTS = "digests"  # of every micro-batch: `<attempt>-<rank>.txt`


def open_run(
    run: Folder,
    config_yaml: str,
    stage: str,
    sections: tuple[str, ...] = (),
    *,
    inputs: Mapping[str, str] | None = None,
    log: Callable[[str], None] = lambda line: None,
    may_change: Set[str] | None = None,
) -> dict[str, Any] | None:
    """Create or reopen the run of a stage.

    `config_yaml` is the complete configuration, `stage` the run's own section of it, and `sections`
    are the others that the result depends on. `inputs` are hashes of what the run reads, by name;
    without them nothing is compared. `may_change` are the dotted keys that may differ, by default
    the stage's in `MAY_CHANGE`; `log` gets a line about those that do. Returns the result of a
    finished run; None if there is work to do.

    Raises:
        ConfigError: the run exists, and a setting that must not change has changed.
        DataError: the run began with other inputs.
    """
    if may_change is None:
        may_change = dotted(stage, MAY_CHANGE)
        if not parse_yaml(config_yaml, CONFIG).get(stage, {}).get("deterministic"):
            may_change |= dotted(stage, ROUNDING)
    is_finished = run.exists(RESULT)
    if run.exists(CONFIG):
        changed = _changed_settings(run, config_yaml, {stage, *sections})
        refused = _without(changed, may_change)
        if refused:
            state = "is finished" if is_finished else "has begun"
            raise ConfigError(
                f"{run} {state} with other settings ({format_changes(refused)}); set them back, "
                "or choose another run.name"
            )
        if changed and not is_finished:
            log(f"goes on with other settings: {format_changes(changed)}")
            _keep_order(run, changed.get(f"{stage}.micro_batch_size"))
    for name in [] if inputs is None else changed_inputs(run, inputs):
        raise DataError(
            f"{run} was started with another {name}; restore it, or choose another run.name"
        )
    if is_finished:
        return read_result(run)
    if inputs is not None and not run.exists(INPUTS):
        run.write_json(INPUTS, dict(inputs))
    run.write_text(CONFIG, config_yaml)
    return None


def _keep_order(run: Folder, sizes: tuple[Any, Any] | None) -> None:
    """Note the micro-batches that the run's order is made of, where their size (old, new) changes.

    In pretraining, which rows a step reads depends on it.
    """
    if sizes is not None and not run.exists(ORDER):
        run.write_json(ORDER, {"micro_batch_size": sizes[0]})


def order_micro_batch_size(run: Folder) -> int | None:
    """The size of the micro-batches of a run's order; None: the configured one, as from its start.

    A step of smaller ones reads the same rows in more forward passes.
    """
    return int(run.read_json(ORDER)["micro_batch_size"]) if run.exists(ORDER) else None


def read_result(run: Folder) -> dict[str, Any]:
    """The result of a finished run; a DamagedError if it is none."""
    result = run.read_json(RESULT)
    if not isinstance(result, dict) or not result:
        raise DamagedError(
            f"{run.join(RESULT)} is damaged: it holds no result; delete it, and the same command "
            "continues from the last checkpoint"
        )
    return result


def read_config(run: Folder) -> dict[str, Any]:
    """The configuration that a run began with, as plain values; a DamagedError if it is none."""
    path = run.join(CONFIG)
    try:
        values = parse_yaml(run.read_text(CONFIG), path)
    except ConfigError as error:
        raise DamagedError(f"{path} is damaged: {error}; choose another run.name") from None
    if not isinstance(values, dict):
        raise DamagedError(f"{path} is damaged: it has no settings; choose another run.name")
    return values


def _changed_settings(
    run: Folder, config_yaml: str, sections: Set[str]
) -> dict[str, tuple[Any, Any]]:
    """The settings of these sections that differ from the run's: dotted key -> (old, new)."""
    old = dict(flatten(read_config(run)))
    new = dict(flatten(parse_yaml(config_yaml, CONFIG)))
    # A run of an earlier version lacks the keys that were added since.
    known = dict(flatten({name: defaults(name) for name in sections}))
    changed = differences({**{key: known[key] for key in new if key in known}, **old}, new)
    return {
        key: values
        for key, values in changed.items()
        if key.partition(".")[0] in sections and _LEFT_OPEN.get(key, ...) not in values
    }


def changed_inputs(run: Folder, inputs: Mapping[str, str]) -> list[str]:
    """The names of inputs that a run began with others of; `inputs` are those of `open_run`."""
    if not run.exists(INPUTS):
        return []
    with damaged_file(run.join(INPUTS)):
        known = dict(run.read_json(INPUTS))
    return [name for name, digest in inputs.items() if known.get(name, digest) != digest]


def changed_settings(
    run: Folder, config_yaml: str, stage: str, sections: tuple[str, ...]
) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from a run's, and may not in one that goes on from its state."""
    changed = _changed_settings(run, config_yaml, {stage, *sections})
    return _without(changed, dotted(stage, MAY_CHANGE))


def _without(
    changed: Mapping[str, tuple[Any, Any]], may_change: Set[str]
) -> dict[str, tuple[Any, Any]]:
    # `finetune.workers.min` belongs to `finetune.workers`.
    settings = {key: ".".join(key.split(".")[:2]) for key in changed}
    return {key: values for key, values in changed.items() if settings[key] not in may_change}


def format_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Settings with their old and new values, for a message."""
    return "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())


def dotted(section: str, keys: Iterable[str]) -> set[str]:
    """Prefix the keys of a section with its name."""
    return {f"{section}.{key}" for key in keys}


def begin_attempt(run: Folder, retry_timeout_s: float = 0.0) -> int:
    """Register an attempt and return its number; earlier ones may not commit any more."""
    return retry(lambda: take_number(run / "attempts"), retry_timeout_s)


def check_attempt(run: Folder, attempt: int) -> None:
    """Raise Superseded if there is a later attempt at the run."""
    latest = max(numbers_taken(run / "attempts"), default=attempt)
    if latest > attempt:
        raise Superseded(f"{run}: attempt {latest} has taken over; attempt {attempt} ends here")


def read_digests(run: Folder) -> dict[tuple[int, int], set[str]]:
    """Read the digests of all ranks: (step, micro-batch index) -> one digest, where runs agree."""
    folder = run / DIGESTS
    found: dict[tuple[int, int], set[str]] = {}
    for name in folder.names():
        for line in folder.read_bytes(name).split(b"\n")[:-1]:  # the last one may be cut off
            step, index, digest = line.decode().split()
            found.setdefault((int(step), int(index)), set()).add(digest)
    return found
