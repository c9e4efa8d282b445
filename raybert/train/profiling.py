"""A trace of some steps on each rank, for Perfetto, and a table of their kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from raybert.config import Settings
from raybert.errors import StorageError
from raybert.storage.folder import Folder

ROWS = 40  # of the table


class ProfileConfig(Settings):
    """Which steps are profiled; they take longer, and a trace has some megabytes a step."""

    steps: tuple[int, int] = Field(description="the first step, and the first one after the last")

    @model_validator(mode="before")
    @classmethod
    def _one_step(cls, values: Any) -> Any:
        is_step = isinstance(values, int) and not isinstance(values, bool)
        return {"steps": (values, values + 1)} if is_step else values

    @model_validator(mode="after")
    def _check_order(self) -> ProfileConfig:
        first, end = self.steps
        if not 0 <= first < end:
            raise ValueError(f"steps=[{first}, {end}]: the second must be above the first")
        return self


class StepProfiler:
    """Profiles the configured steps of a rank, and writes `profile/` of the run."""

    def __init__(
        self, config: ProfileConfig | None, run: Folder, rank: int, on_event: Callable[[str], None]
    ) -> None:
        self._steps = range(0) if config is None else range(*config.steps)
        self._run, self._rank, self._on_event = run, rank, on_event
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin with the first of the steps, or where a run is resumed among them."""
        if step in self._steps and self._profiler is None:
            self._profiler = torch.profiler.profile(acc_events=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """End with the last of the steps."""
        if self._profiler is not None and step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Write what was profiled; a storage that refuses is an event, and no error."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        name = f"profile/steps-{self._steps.start}-{self._steps.stop}-rank-{self._rank}"
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=ROWS)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(path))
            trace = path.read_bytes()
        try:
            self._run.write_bytes(f"{name}.json", trace)
            self._run.write_text(f"{name}.txt", table)
        except (StorageError, OSError) as error:
            self._on_event(f"the profile could not be written: {error}")
        else:
            self._on_event(f"written to {self._run.join(name)}.json and .txt")
