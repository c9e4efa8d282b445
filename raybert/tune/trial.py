"""A trial in its worker: the same run as fine-tuning's, which stands still at every evaluation.

A worker outlives its trials: the next one finds Python, PyTorch, the texts and the pretrained
weights where the last one left them. A trial's state is in its own folder; what Ray Tune is given
as a checkpoint is where that is: a pointer.
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
from raybert.errors import DamagedError, RaybertError, StorageError, Superseded
from raybert.storage.folder import Folder
from raybert.tasks.classification import FinetuneSpec, SharedInputs
from raybert.train.checkpoint import CheckpointStore, Snapshot, begin_attempt, hash_tensors
from raybert.train.metrics_log import read_metrics
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel
from raybert.train.run import CONFIG
from raybert.train.task import Stopped
from raybert.tune.schedulers.pbt_evidence import evidence, is_open
from raybert.tune.settings import Searched
from raybert.tune.space import Values
from raybert.tune.trial_store import TRIAL, write_trial
from raybert.tune.trial_training import Run, start_run

EXCHANGE = "exchange"  # in a trial's configuration: tells one take-over from the next
FAILED_SCORE = -1.0  # below any accuracy: schedulers compare with it, and it must be a number


@dataclass(frozen=True)
class TrialContext:
    """What the trials of a search share; it travels to their workers once, by the object store."""

    folder: Folder  # that the trials' folders are in
    base: Searched
    job: FinetuneSpec  # of the base; its texts are whole
    held: Any  # a reference to what its runs share in memory
    seq_len: int  # of trials that say nothing else
    keep_checkpoints: int
    threads: int | None  # of a worker; None: a fair share of its machine's cores
    gpu: bool
    resources: Resources
    board: DriverChannel

    def job_of(self, values: Values, seed: int) -> FinetuneSpec:
        """The fine-tuning run of a trial; what it reads is not held.

        Raises:
            ConfigError: the configuration refuses these values.
        """
        searched = self.base.with_values(values)
        config = searched.finetune
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
            self.job,
            config=config,
            model=searched.model,
            prepared=self.job.prepared.model_copy(update=limits),
        )


class FinetuneTrial(Trainable):  # type: ignore[misc]  # of an untyped package
    """Ray Tune's view of a trial: `step` trains up to the next evaluation."""

    def setup(self, config: dict[str, Any], work: TrialContext | None = None) -> None:
        """Start the worker with its first trial."""
        assert work is not None
        self._work = work
        self._held: SharedInputs = ray.get(work.held)
        # A number of its own for each worker: their records lie beside each other on the board.
        self._link = WorkerChannel(work.board, uuid.uuid4().int % 1_000_000)
        self._run: Run | None = None
        self._pointer: dict[str, Any] | None = None
        self._is_unproven = False  # its last exchange, as yet
        self._last: dict[str, Any] = {}
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial, or the same one with other values."""
        self._leave()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation and report it.

        What goes wrong in the trial itself is reported as its end; only what may pass is raised,
        for Ray Tune to try again.
        """
        try:
            self._last = self._advance()
            if self._is_unproven:
                self._note_evidence()
        except Stopped:
            self._leave()
            return {**self._last, "interrupted": True, "done": True}
        except Superseded as error:  # by another driver of the same search
            self._leave()
            told = {"interrupted": True, "superseded": str(error)}
            return {**self._last, **told, "done": True}
        except StorageError:
            self._leave()
            raise
        except Exception as error:
            self._leave()
            return {**self._last, "score": FAILED_SCORE, "failed": _reason(error), "done": True}
        return self._last

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Save the run where it stands, in its own folder; returns where that is."""
        run = self._run or self._begin()
        return {"trial": self.trial_id, "step": run.save(), "weights": run.weights()}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from where a pointer says: the trial's own place, or another trial's."""
        self._leave()
        self._pointer = checkpoint

    def cleanup(self) -> None:
        """End the worker."""
        self._leave()
        self._link.close()

    def _take(self, config: dict[str, Any]) -> None:
        # Ray Tune copies a donor's whole configuration: a trial's name is not in it.
        self._seed = int(config["seed"])
        self._values: Values = {key: v for key, v in config.items() if "." in key}
        self._exchange = config.get(EXCHANGE)
        self._pointer = None
        nothing = dict.fromkeys(("score", "best"), FAILED_SCORE)
        self._last = {**nothing, "epoch": 0.0, "step": 0}

    def _leave(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
            gc.collect()  # the next model should find the memory of this one

    def _advance(self) -> dict[str, Any]:
        run = self._run or self._begin()
        found = run.advance()
        if found is None:  # it had been evaluated to the end before
            return {**self._last, "ended": True, "done": True}
        is_over = found["step"] >= (found["total_steps"] or 0)
        if is_over:
            run.advance()  # writes the model and the result
        return {
            **{key: found[key] for key in ("score", "accuracy", "loss", "epoch", "step")},
            "best": max(self._last["best"], found["score"]),
            "ended": is_over,
            "done": is_over,
        }

    def _begin(self) -> Run:
        """Start the run, or go on with it, on another trial's weights where it shall."""
        work, folder = self._work, self._work.folder / self.trial_id
        job = work.job_of(self._values, self._seed)
        folder.write_text(CONFIG, dump(Searched(model=job.model, finetune=job.config)))
        attempt = begin_attempt(folder, job.config.retry_timeout_s)
        taken = self._take_over(folder, attempt, job)
        exchanges = folder.read_json(TRIAL)["exchanges"]
        self._is_unproven = bool(exchanges) and is_open(exchanges[-1])
        scores = [r["score"] for r in read_metrics(folder) if r["kind"] == "eval" and not taken]
        self._last["best"] = max([FAILED_SCORE, *(s for s in scores if s is not None)])
        self._run = start_run(
            job,
            folder,
            attempt,
            self._held,
            gpu=work.gpu,
            resources=work.resources,
            report=self._report,
            is_stopping=self._link.is_stopping,
        )
        return self._run

    def _report(self, record: dict[str, Any]) -> None:
        self._link.report({**record, "trial": self.trial_id})

    def _take_over(self, folder: Folder, attempt: int, job: FinetuneSpec) -> bool:
        """Copy the state that the pointer names into this trial's folder, if it is another's."""
        pointer = self._pointer
        if pointer is None or pointer["trial"] == self.trial_id:
            return False
        trial = folder.read_json(TRIAL)
        if any(exchange.get("id") == self._exchange for exchange in trial["exchanges"]):
            return False  # before a restart: it has come further since
        taken = {"id": self._exchange, "from": pointer["trial"], "step": pointer["step"]}
        taken |= {"attempt": attempt}
        donor = CheckpointStore(self._work.folder / pointer["trial"], 0, 1)
        snapshot = _load(donor, pointer["step"])
        # Whatever is best of the donor lies in the donor's folder; this one's best is yet to come.
        fresh = {"best_score": None, "best_step": None, "best_metrics": None}
        snapshot.state = {**snapshot.state, **fresh}
        store = CheckpointStore(folder, attempt, job.config.keep_checkpoints)
        store.save(snapshot, best_step=None, wait=True)
        taken |= {"weights": pointer["weights"], "before": trial["values"], "after": self._values}
        if snapshot.step != pointer["step"]:
            taken |= {"step": snapshot.step, "weights": hash_tensors(snapshot.model)}
        exchanges = [*trial["exchanges"], taken]
        write_trial(folder, self._values, self._seed, trial["begun"], exchanges)
        return True

    def _note_evidence(self) -> None:
        """Write down what proves the last exchange, once the run has logged it."""
        folder = self._work.folder / self.trial_id
        trial = folder.read_json(TRIAL)
        exchange = trial["exchanges"][-1]
        config = self._work.job_of(self._values, self._seed).config
        exchange |= evidence(exchange, read_metrics(folder), config)
        folder.write_json(TRIAL, trial)
        self._is_unproven = is_open(exchange)


def _load(store: CheckpointStore, step: int) -> Snapshot:
    """Load a donor's checkpoint; its youngest one, where that one has given way since."""
    try:
        return store.load(step)
    except DamagedError:
        youngest = store.load_latest(lambda text: None)
        if youngest is None:
            raise
        return youngest


def _reason(error: Exception) -> str:
    """What went wrong, in a line."""
    lines = str(error).strip().splitlines() or [""]
    told = lines[0] if isinstance(error, RaybertError) else f"{type(error).__name__}: {lines[0]}"
    return told[:300]
