"""Read the files of a run, any of which may be absent, truncated or still growing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raybert.errors import DamagedError, RaybertError
from raybert.storage.folder import Folder
from raybert.train.metrics_log import read_log

#: The report has a section for each folder that holds one of these.
STAGE_FILES = {
    "config.yaml", "manifest.json", "metrics", "metrics.jsonl", "metrics.json", "result.json",
    "trials.json",
}  # fmt: skip
_MAPPINGS = {  # attributes of a stage
    "scores": "metrics.json", "result": "result.json", "manifest": "manifest.json",
    "search": "trials.json",
}  # fmt: skip
ORDER = ("corpus", "pretrain", "finetune", "tune", "evaluate")  # of sections; others follow

T = TypeVar("T")
Points = tuple[list[float], list[float]]


@dataclass
class Stage:
    """The content of one folder; absent or damaged files are empty."""

    name: str  # "" for the report's own folder
    config: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)  # see `raybert.records`
    scores: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind, in the order of steps."""
        return [record for record in self.records if record.get("kind") == kind]


def read_stages(run: Folder) -> list[Stage]:
    """Read the folder itself, and the folders inside in the order of their sections."""
    names = run.names()
    stages = [_read_stage(run, "", set(names))] if STAGE_FILES & set(names) else []
    inner = [name for name in names if name not in STAGE_FILES and run.size(name) is None]
    for name in sorted(inner, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)):
        inside = set((run / name).names())
        if STAGE_FILES & inside:
            stages.append(_read_stage(run / name, name, inside))
    return stages


def _read_stage(folder: Folder, name: str, names: set[str]) -> Stage:
    stage = Stage(name)
    if "config.yaml" in names:
        stage.config = folder.read_bytes("config.yaml").decode("utf-8", "replace")
    if names & {"metrics", "metrics.jsonl"}:
        try:
            stage.records, damaged = read_log(folder)
        except RaybertError as error:
            stage.problems.append(str(error))
        else:
            if damaged:
                stage.problems.append(f"{damaged:,} lines of the metrics log are no records")
    for attribute, file in _MAPPINGS.items():
        try:
            value = folder.read_json(file) if file in names else {}
            if not isinstance(value, dict):
                raise DamagedError(f"{folder.join(file)} is damaged: it is no JSON object")
        except RaybertError as error:
            stage.problems.append(str(error))
            continue
        setattr(stage, attribute, value)
    return stage


def curve(records: Iterable[Mapping[str, Any]], key: str) -> Points:
    """The steps and values of the records where the value is a finite number."""
    pairs = [(float(r["step"]), number(r.get(key))) for r in records]
    found = [(x, y) for x, y in pairs if y is not None]
    return [x for x, _ in found], [y for _, y in found]


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def last(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last finite value of a key."""
    found = curve(records, key)[1]
    return found[-1] if found else None


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
