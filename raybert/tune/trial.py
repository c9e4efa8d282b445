"""A trial in its worker: a fine-tuning run that pauses at every evaluation.

A worker outlives its trials: the next trial finds Python, PyTorch, the texts and the pretrained
weights in memory. A trial's checkpoints lie in its own folder; Ray Tune's checkpoint is only a
pointer to them.
"""

from __future__ import annotations

import gc
import uuid
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.tune import Trainable

from raybert.cluster.session import Resources
from raybert.config import dump
from raybert.errors import RaybertError, StorageError, Superseded
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec, SharedInputs
from raybert.train.attempts import begin_attempt
from raybert.train.control import Stopped
from raybert.train.metrics_log import read_metrics
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel
from raybert.train.run_folder import CONFIG
from raybert.tune.schedulers.pbt import EXPLOIT_ID
from raybert.tune.schedulers.pbt_exploit import copy_donor, lacks_evidence, record_evidence
from raybert.tune.settings import TrialConfig
from raybert.tune.space import Values
from raybert.tune.trial_store import TRIAL
from raybert.tune.trial_training import TrialRun, start_run

FAILED_SCORE = -1.0  # below any score: schedulers compare it, so it must be a finite number
_LONGEST_REASON = 300  # characters


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
        config = config.model_copy(
            update={
                "seed": seed,
                "threads": config.threads or self.threads,
                "keep_checkpoints": max(config.keep_checkpoints, self.keep_checkpoints),
            }
        )
        seq_len = config.seq_len or self.seq_len
        limits = {"seq_len": seq_len, "head_tokens": max(1, round(seq_len * config.head_share))}
        return replace(
            self.spec,
            config=config,
            model=trial.model,
            prepared=self.spec.prepared.model_copy(update=limits),
        )


class FinetuneTrial(Trainable):  # type: ignore[misc]  # of an untyped package
    """Ray Tune's interface to a trial: `step` trains up to the next evaluation."""

    def setup(self, config: dict[str, Any], context: TrialContext | None = None) -> None:
        """Start the worker with its first trial."""
        assert context is not None
        self._context = context
        self._shared_inputs: SharedInputs = ray.get(context.shared_inputs)
        # The channel orders records by attempt: a number for each worker keeps theirs apart.
        self._channel = WorkerChannel(context.channel, uuid.uuid4().int % 1_000_000)
        self._run: TrialRun | None = None
        self._pointer: dict[str, Any] | None = None
        self._latest_result: dict[str, Any] = {}
        self._lacks_evidence = False  # of the last exploit
        self._configure(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to the next trial, or to other values of the same trial."""
        self._close_run()
        self._configure(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation and return its result.

        An error of the trial itself is returned as its end. An error that may be temporary is
        raised, and Ray Tune restarts the trial.
        """
        try:
            self._latest_result = self._advance()
            if self._lacks_evidence:
                self._lacks_evidence = record_evidence(self._folder, self._spec().config)
        except Stopped:
            self._close_run()
            return {**self._latest_result, "interrupted": True, "done": True}
        except Superseded as error:  # by another driver of the same search
            self._close_run()
            ending = {"interrupted": True, "superseded": str(error), "done": True}
            return {**self._latest_result, **ending}
        except StorageError:
            self._close_run()
            raise
        except Exception as error:
            self._close_run()
            ending = {"score": FAILED_SCORE, "failed": _format_error(error), "done": True}
            return {**self._latest_result, **ending}
        return self._latest_result

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
        is_last = evaluation["step"] >= (evaluation["total_steps"] or 0)
        if is_last:
            run.advance()  # writes the model and the result
        return {
            **{key: evaluation[key] for key in ("score", "accuracy", "loss", "epoch", "step")},
            "best": max(self._latest_result["best"], evaluation["score"]),
            "ended": is_last,
            "done": is_last,
        }

    def _start_run(self) -> TrialRun:
        """Start or resume the trial's run, from another trial's weights after an exploit."""
        context, folder, spec = self._context, self._folder, self._spec()
        folder.write_text(CONFIG, dump(TrialConfig(model=spec.model, finetune=spec.config)))
        attempt = begin_attempt(folder, spec.config.retry_timeout_s)
        is_new = self._exploit(folder, attempt, spec)
        exploits = folder.read_json(TRIAL)["exchanges"]
        self._lacks_evidence = bool(exploits) and lacks_evidence(exploits[-1])
        scores = [r["score"] for r in read_metrics(folder) if r["kind"] == "eval" and not is_new]
        self._latest_result["best"] = max([FAILED_SCORE, *(s for s in scores if s is not None)])
        self._run = start_run(
            spec,
            folder,
            attempt,
            self._shared_inputs,
            gpu=context.gpu,
            resources=context.resources,
            on_progress=self._report,
            is_stopping=self._channel.is_stopping,
        )
        return self._run

    def _exploit(self, folder: Folder, attempt: int, spec: FinetuneSpec) -> bool:
        """Copy the checkpoint that the pointer names, if it is another trial's."""
        pointer = self._pointer
        if pointer is None or pointer["trial"] == self.trial_id:
            return False
        donor = self._context.folder / pointer["trial"]
        return copy_donor(
            pointer, self._exploit_id, donor, folder, attempt, self._values, spec.config
        )

    def _report(self, record: dict[str, Any]) -> None:
        self._channel.report({**record, "trial": self.trial_id})


def _format_error(error: Exception) -> str:
    """The first line of an error, with the type of an unexpected one."""
    lines = str(error).strip().splitlines() or [""]
    is_ours = isinstance(error, RaybertError)
    line = lines[0] if is_ours else f"{type(error).__name__}: {lines[0]}"
    return line[:_LONGEST_REASON]
