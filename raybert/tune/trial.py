"""A trial in its worker: a fine-tuning run that pauses at every evaluation.

A worker outlives its trials: the next trial finds Python, PyTorch, the texts and the pretrained
weights in memory. A trial of one worker trains in the process that Ray Tune started; a trial of
several is a Ray Train run that this process starts and follows. A trial's checkpoints lie in its
own folder; Ray Tune's checkpoint is only a pointer to them.
"""

from __future__ import annotations

import gc
import math
import queue
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.tune import Trainable

from raybert.cluster.session import Resources
from raybert.config import dump
from raybert.errors import RaybertError, StorageError, Superseded
from raybert.records import EvalRecord, OnRecord, Record, metric_of
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec, SharedInputs
from raybert.train.checkpoint import CheckpointStore
from raybert.train.distributed import Group
from raybert.train.metrics_log import read_metrics
from raybert.train.ray.driver import train_on_ray
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel
from raybert.train.run import TrainingRun
from raybert.train.run_folder import CONFIG, begin_attempt
from raybert.train.task import ControlSignals, Stopped
from raybert.train.tensor_file import hash_tensors
from raybert.tune.schedulers.pbt import EXPLOIT_ID, copy_donor, lacks_verification, verify_exploit
from raybert.tune.settings import TrialConfig
from raybert.tune.space import Values
from raybert.tune.trial_store import TRIAL

FAILED_SCORE = -1e9  # below any score: schedulers compare it, so it must be a finite number
_LONGEST_REASON = 300  # characters
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrialContext:
    """What the trials of a search have in common; it is sent to each worker once."""

    folder: Folder  # of the trials' folders
    base: TrialConfig  # the configured values
    spec: FinetuneSpec  # of the base; its texts have their full length
    shared_inputs: Any  # an object reference to the SharedInputs
    seq_len: int  # of trials that do not set it
    keep_checkpoints: int
    threads: int | None  # of a worker; None: the machine's cores divided by its workers
    gpu: bool
    resources: Resources
    channel: DriverChannel

    def trial_spec(self, values: Values, seed: int) -> FinetuneSpec:
        """The fine-tuning run of a trial, without its shared inputs."""
        trial = self.base.with_values(values)
        config = trial.finetune
        keep = max(config.keep_checkpoints, self.keep_checkpoints)
        threads = config.threads or self.threads
        config = config.model_copy(
            update={"seed": seed, "threads": threads, "keep_checkpoints": keep}
        )
        seq_len = config.seq_len or self.seq_len
        limits = {"seq_len": seq_len, "head_tokens": max(1, round(seq_len * config.head_share))}
        prepared = self.spec.prepared.model_copy(update=limits)
        return replace(self.spec, config=config, model=trial.model, prepared=prepared)


class FinetuneTrial(Trainable):  # type: ignore[misc]  # of an untyped package
    """Ray Tune's interface to a trial: `step` trains up to the next evaluation."""

    def setup(self, config: dict[str, Any], context: TrialContext | None = None) -> None:
        """Start the worker with its first trial."""
        assert context is not None
        self._context = context
        self._shared_inputs: SharedInputs = ray.get(context.shared_inputs)
        # The channel orders records by attempt: a number for each worker keeps theirs apart.
        self._channel = WorkerChannel(context.channel, uuid.uuid4().int % 1_000_000)
        self._run: InProcessRun | RayTrainRun | None = None
        self._pointer: dict[str, Any] | None = None
        self._latest_result: dict[str, Any] = {}
        self._lacks_verification = False  # of the last exploit
        self._configure(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to the next trial, or to other values of the same trial."""
        self._close_run()
        self._configure(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation and return its result, or an error as the trial's end.

        An error that may be temporary is raised: Ray Tune restarts the trial.
        """
        try:
            self._latest_result = self._advance()
            if self._lacks_verification:
                self._lacks_verification = verify_exploit(self._folder, self._spec().config)
            return self._latest_result
        except Exception as error:
            self._close_run()
            if isinstance(error, StorageError):
                raise
            ending: dict[str, Any] = {"interrupted": True}
            if isinstance(error, Superseded):  # by another driver of the same search
                ending["superseded"] = str(error)
            elif not isinstance(error, Stopped):
                ending = {"score": FAILED_SCORE, "failed": _format_error(error)}
            return {**self._latest_result, **ending, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Save a checkpoint in the trial's folder; returns a pointer to it."""
        run = self._run or self._start_run()
        return {"trial": self.trial_id, "step": run.save(), "weights": run.hash_weights()}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Continue from a pointer: this trial's own checkpoint, or another trial's."""
        self._close_run()
        self._pointer = checkpoint

    def cleanup(self) -> None:
        """End the worker."""
        self._close_run()
        self._channel.close()

    @property
    def _folder(self) -> Folder:
        return self._context.folder / str(self.trial_id)

    def _spec(self) -> FinetuneSpec:
        return self._context.trial_spec(self._values, self._seed)

    def _configure(self, config: dict[str, Any]) -> None:
        # On an exploit Ray Tune copies the donor's configuration, so it can't hold a trial's name.
        self._seed = int(config["seed"])
        self._values: Values = {key: v for key, v in config.items() if "." in key}
        self._exploit_id: str | None = config.get(EXPLOIT_ID)
        self._pointer = None
        no_scores = dict.fromkeys(("score", "best"), FAILED_SCORE)
        self._latest_result = {**no_scores, "epoch": 0.0, "step": 0}

    def _close_run(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
            gc.collect()  # frees the model's memory for the next one

    def _advance(self) -> dict[str, Any]:
        run = self._run or self._start_run()
        evaluation = run.advance()
        if evaluation is None:  # the last evaluation was before a restart
            return {**self._latest_result, "ended": True, "done": True}
        metric = metric_of(evaluation)
        if not math.isfinite(evaluation["score"]):  # of nothing, or of broken weights
            evaluation = {**evaluation, "score": FAILED_SCORE}
        is_last = evaluation["step"] >= (evaluation["total_steps"] or 0)
        if is_last:
            run.advance()  # writes the model and the result
        return {
            "metric": metric,
            **{key: evaluation.get(key) for key in ("score", metric, "loss", "epoch", "step")},
            "best": max(self._latest_result["best"], evaluation["score"]),
            "ended": is_last,
            "done": is_last,
        }

    def _start_run(self) -> InProcessRun | RayTrainRun:
        """Start or resume the trial's run, from another trial's weights after an exploit."""
        context, folder, spec = self._context, self._folder, self._spec()
        folder.write_text(CONFIG, dump(TrialConfig(model=spec.model, finetune=spec.config)))
        attempt = begin_attempt(folder, spec.config.retry_timeout_s)
        pointer, is_new = self._pointer, False
        if pointer is not None and pointer["trial"] != self.trial_id:
            donor, values = context.folder / pointer["trial"], self._values
            is_new = copy_donor(
                pointer, self._exploit_id, donor, folder, attempt, values, spec.config
            )
        exploits = folder.read_json(TRIAL)["exchanges"]
        self._lacks_verification = bool(exploits) and lacks_verification(exploits[-1])
        scores = [r["score"] for r in read_metrics(folder) if r["kind"] == "eval" and not is_new]
        self._latest_result["best"] = max([FAILED_SCORE, *(s for s in scores if s is not None)])
        is_stopping = self._channel.is_stopping
        if spec.config.max_workers > 1:  # they read their inputs from the storage
            self._run = RayTrainRun(spec, folder, context.resources, self._report, is_stopping)
        else:
            spec = replace(spec, shared=self._shared_inputs)
            group = Group(device=torch.device("cuda" if context.gpu else "cpu"))
            signals = ControlSignals(stop=is_stopping)
            self._run = InProcessRun(
                spec, folder, attempt, group, on_progress=self._report, signals=signals
            )
            self._run.loop.resume()
        return self._run

    def _report(self, record: Record) -> None:
        self._channel.report({**record, "trial": self.trial_id})


def _format_error(error: Exception) -> str:
    """The first line of an error, with the type of an unexpected one."""
    lines = str(error).strip().splitlines() or [""]
    is_ours = isinstance(error, RaybertError)
    line = lines[0] if is_ours else f"{type(error).__name__}: {lines[0]}"
    return line[:_LONGEST_REASON]


class InProcessRun(TrainingRun):
    """A run in this process."""

    def save(self) -> int:
        """Save a checkpoint of the current step, and return the step."""
        self.loop.save()
        return self.loop.progress.step

    def hash_weights(self) -> str:
        """Hash the weights in memory."""
        return hash_tensors(self.task.model.state_dict())


class RayTrainRun:
    """A Ray Train run of several workers.

    The workers do not wait at an evaluation: the scheduler decides in milliseconds, and a restart
    of the workers takes many seconds. They are stopped only when the scheduler wants a checkpoint.
    """

    def __init__(
        self,
        spec: FinetuneSpec,
        folder: Folder,
        resources: Resources,
        on_progress: OnRecord,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._spec, self._folder, self._resources = spec, folder, resources
        self._on_progress, self._is_stopping = on_progress, is_stopping
        self._checkpoints = CheckpointStore(folder, 0, 1)
        self._evaluations: queue.Queue[EvalRecord | Exception | None] = queue.Queue()
        self._channel = DriverChannel()
        self._thread: threading.Thread | None = None

    def advance(self) -> EvalRecord | None:
        """Wait for the workers' next evaluation."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        while True:
            with suppress(queue.Empty):
                evaluation = self._evaluations.get(timeout=_POLL_SECONDS)
                if isinstance(evaluation, Exception):
                    raise evaluation
                return evaluation
            if self._is_stopping():
                self._channel.stop()

    def save(self) -> int:
        """Stop the workers, who save a checkpoint."""
        self.close()
        return max(self._checkpoints.steps(), default=0)

    def hash_weights(self) -> str:
        """Hash the weights of the latest checkpoint."""
        snapshot = self._checkpoints.load_latest(lambda text: None)
        return "" if snapshot is None else hash_tensors(snapshot.model)

    def close(self) -> None:
        """Stop the workers and wait for their end."""
        if self._thread is not None:
            self._channel.stop()
            self._thread.join()
            self._thread, self._channel = None, DriverChannel()
            self._evaluations = queue.Queue()

    def _train(self) -> None:
        evaluations, channel = self._evaluations, self._channel

        def on_record(record: Record) -> None:
            self._on_progress(record)
            if record["kind"] == "eval":
                evaluations.put(record)

        try:
            train_on_ray(
                self._spec, self._folder, self._resources, on_progress=on_record, channel=channel
            )
            evaluations.put(None)
        except Exception as error:  # raised by `advance`, in the trial's own thread
            evaluations.put(error)
