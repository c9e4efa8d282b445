"""A run's length in steps: configured, or computed from minutes once the speed is measured.

A run limited by minutes measures its speed while the learning rate warms up, and sets its number of
steps. First steps and a first evaluation are slow, so the attempt that set it corrects it once, at
the next evaluation. From then on, and after every restart, it is a run limited by steps.
"""

from __future__ import annotations

from raybert.train.schedules import schedule_at
from raybert.train.settings import TrainConfig
from raybert.train.state import Progress
from raybert.train.task import Task

MEASURED_SHARE = 0.02  # of a run's minutes, at least: the time over which its speed is measured
UNTIMED_STEPS = 3  # libraries choose their kernels, and memory is mapped
UNTIMED_SHARE = 0.5  # of that time: Ray Data fills its first blocks
TRAINING_SHARE = 0.98  # of the minutes left; the rest is for checkpoints and variations in speed


class StepBudget:
    """Sets `progress.total_steps` and `progress.warmup_steps`; gives the learning rate by them."""

    def __init__(self, config: TrainConfig, task: Task, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._steps_per_epoch = task.steps_per_epoch
        self._tokens_per_epoch = task.tokens_per_epoch
        self._began = (0, 0.0)  # steps and seconds at the start of this attempt
        self._timing_start: tuple[int, float] | None = None  # the same, once its speed is steady
        self._is_provisional = False  # the number of steps, set by this attempt

    def begin(self) -> bool:
        """Apply the limit to a new or resumed run; return whether other minutes became steps."""
        config, progress = self._config, self._progress
        self._began = (progress.step, progress.seconds)
        steps = config.limit_in_steps(self._steps_per_epoch, self._tokens_per_epoch)
        if steps is not None:
            progress.total_steps, progress.minutes = steps, None
            progress.corrected_step = 0
            progress.warmup_steps = round(steps * config.warmup_fraction)
        elif progress.total_steps is not None and progress.minutes != config.minutes:
            return self._fix_by_speed_so_far()
        return False

    @property
    def is_spent(self) -> bool:
        """Whether all steps are taken; a resumed run may be given fewer than it has taken."""
        total = self._progress.total_steps
        return total is not None and self._progress.step >= total

    def lr(self) -> float:
        """The learning rate of the current step."""
        config, progress = self._config, self._progress
        if progress.total_steps is None or progress.warmup_steps is None:
            return config.lr * min(1.0, (progress.seconds + 1e-3) / self._measured_seconds)
        return config.lr * schedule_at(
            progress.step, progress.total_steps, progress.warmup_steps, config
        )

    def is_evaluation_due(self) -> bool:
        """Whether to evaluate after the step just taken; the run's end is not counted."""
        step, total = self._progress.step, self._progress.total_steps
        if total is None or step >= total:
            return False
        count = self._config.evaluations
        if count is None:
            return step % self._steps_per_epoch == 0
        start = self._progress.corrected_step  # one of the evaluations was there
        count -= start > 0
        return any(step == start + round((total - start) * i / count) for i in range(1, count))

    def is_measured(self) -> bool:
        """Whether to set the number of steps, or correct it, after the step just taken.

        Asked after every step.
        """
        progress = self._progress
        taken = self._taken()
        if progress.total_steps is not None:
            is_timed = self._timing_start is not None and taken > self._timing_start[0]
            return self._is_provisional and is_timed and self.is_evaluation_due()
        # Only of this attempt: one that resumes in the warm-up has slow first steps of its own.
        steps, seconds = taken - self._began[0], progress.seconds - self._began[1]
        needed = self._measured_seconds
        is_steady = steps >= UNTIMED_STEPS and seconds >= UNTIMED_SHARE * needed
        if self._timing_start is None and is_steady:
            self._timing_start = (taken, progress.seconds)
        return (
            self._timing_start is not None and seconds >= needed and taken > self._timing_start[0]
        )

    def set_total_steps(self, evaluation_seconds: float) -> None:
        """Turn the minutes into steps by the measured speed and an evaluation's duration."""
        assert self._timing_start is not None and self._config.minutes is not None
        progress, minutes = self._progress, self._config.minutes
        first_step, began = self._timing_start
        per_step = (progress.seconds - began) / (self._taken() - first_step)
        self._timing_start = (progress.step, progress.seconds + per_step + evaluation_seconds)
        left = minutes * 60 - progress.seconds - evaluation_seconds
        evaluations = self._config.evaluations
        if evaluations is None:
            per_step += evaluation_seconds / self._steps_per_epoch
        else:
            left -= evaluation_seconds * (evaluations - self._is_provisional)
        progress.total_steps = progress.step + max(0, int(TRAINING_SHARE * left / per_step))
        if self._is_provisional:
            progress.corrected_step = progress.step
        else:
            progress.warmup_steps, progress.minutes = progress.step, minutes
        self._is_provisional = not self._is_provisional

    def _fix_by_speed_so_far(self) -> bool:
        """Turn other minutes than before into steps by the speed of all attempts."""
        progress, minutes = self._progress, self._config.minutes or 0.0
        if progress.step < 3 or not progress.seconds:  # too few steps: measure the speed
            progress.total_steps = progress.warmup_steps = None
            return False
        left = minutes * 60 - progress.seconds
        steps = int(TRAINING_SHARE * left * progress.step / progress.seconds)
        progress.total_steps = progress.step + max(0, steps)
        progress.minutes = minutes
        if progress.warmup_steps is None or progress.step < progress.warmup_steps:
            progress.warmup_steps = round(progress.total_steps * self._config.warmup_fraction)
        return True

    def __str__(self) -> str:
        return f"{self._progress.minutes:g} minutes are {self._progress.total_steps:,} steps"

    @property
    def _measured_seconds(self) -> float:
        """How long the speed is measured, and the learning rate warms up."""
        minutes = self._config.minutes or 0
        return minutes * 60 * max(MEASURED_SHARE, self._config.warmup_fraction)

    def _taken(self) -> int:
        """The steps that `progress.seconds` covers: it was read before the last one."""
        return self._progress.step - 1
