"""TensorBoard: the curves of each trial, and the tab of hyperparameters and scores.

Events are written only if the search's folder is on a disk: TensorBoard appends to its files, which
object stores do not support.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raybert.errors import UserError
from raybert.storage.folder import Folder
from raybert.tune.trial_store import TrialRecord

_HOST = "127.0.0.1"
_PORT = 6006  # TensorBoard's default


class EventWriter:
    """Writes TensorBoard events of trials, one folder per trial."""

    def __init__(self, folder: Folder) -> None:
        """Write into a local folder; for another folder nothing is written."""
        self._folder = Path(folder.path) if folder.is_local else None
        self._writers: dict[str, Any] = {}

    def on_evaluation(self, trial: TrialRecord) -> None:
        """Add a trial's last evaluation to its curves."""
        writer = self._writer(trial)
        if writer is not None:
            last = trial.evaluations[-1]
            curves = {"loss": last.loss, "score": last.score, "epoch": last.epoch}
            for key, value in {last.metric: last.value, **curves}.items():
                writer.add_scalar(f"validation/{key}", value, last.step)
            writer.flush()

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Add a trial to the tab of hyperparameters."""
        from tensorboardX.summary import hparams

        writer = self._writer(trial)
        if writer is None or trial.best is None:
            return
        values = {
            key: v if isinstance(v, int | float | str | bool) else str(v)
            for key, v in trial.values.items()
        }
        best = trial.best
        metrics = {f"best/{best.metric}": best.value, "best/loss": best.loss}
        for summary in hparams(hparam_dict=values, metric_dict=metrics):
            writer.file_writer.add_summary(summary)
        for key, value in metrics.items():
            writer.add_scalar(key, value, trial.best.step)
        writer.close()
        del self._writers[trial.name]

    def _writer(self, trial: TrialRecord) -> Any:
        if self._folder is None:
            return None
        if trial.name not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[trial.name] = SummaryWriter(logdir=str(self._folder / trial.name))
        return self._writers[trial.name]


def check_tensorboard(folder: Folder) -> None:
    """Check that TensorBoard is installed and that the folder is on a disk."""
    if not folder.is_local:
        raise UserError(
            f"--dashboard: TensorBoard reads local folders, not {folder}; set run.storage to one"
        )
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--dashboard needs tensorboard, which is not installed; pip install 'raybert[report]'"
        )


@contextmanager
def tensorboard(folder: Folder) -> Iterator[str]:
    """Serve a local folder's events while the context lasts; yields the URL."""
    port = _free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.path]
    process = subprocess.Popen(
        [*command, "--host", _HOST, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{_HOST}:{port}/"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    for port in (_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError("--dashboard: this machine has no free port")
