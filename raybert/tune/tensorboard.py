"""TensorBoard: each trial's curves, and the tab that sets hyperparameters against scores.

The events lie in the search's folder where that is on a disk; TensorBoard's files are appended to,
which object stores can't.
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
_PORT = 6006  # TensorBoard's own


class EventWriter:
    """Writes what trials come to as TensorBoard's events, a folder a trial."""

    def __init__(self, folder: Folder) -> None:
        """Write into a local folder; nothing is written elsewhere."""
        self._folder = Path(folder.path) if folder.is_local else None
        self._writers: dict[str, Any] = {}

    def evaluated(self, entry: TrialRecord) -> None:
        """Add a trial's last evaluation to its curves."""
        writer = self._writer(entry)
        if writer is not None:
            last = entry.evaluations[-1]
            for key in ("accuracy", "loss", "score", "epoch"):
                writer.add_scalar(f"validation/{key}", getattr(last, key), last.step)
            writer.flush()

    def ended(self, entry: TrialRecord) -> None:
        """Add a trial to the hyperparameters' tab."""
        from tensorboardX.summary import hparams

        writer = self._writer(entry)
        if writer is None or entry.best is None:
            return
        values = {
            key: v if isinstance(v, int | float | str | bool) else str(v)
            for key, v in entry.values.items()
        }
        metrics = {"best/accuracy": entry.best.accuracy, "best/loss": entry.best.loss}
        for summary in hparams(hparam_dict=values, metric_dict=metrics):
            writer.file_writer.add_summary(summary)
        for key, value in metrics.items():
            writer.add_scalar(key, value, entry.best.step)
        writer.close()
        del self._writers[entry.name]

    def _writer(self, entry: TrialRecord) -> Any:
        if self._folder is None:
            return None
        if entry.name not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[entry.name] = SummaryWriter(logdir=str(self._folder / entry.name))
        return self._writers[entry.name]


def check_tensorboard(folder: Folder) -> None:
    """Make sure that TensorBoard can be started on a folder.

    Raises:
        UserError: it is an extra, and not installed; or the folder is not on a disk.
    """
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
    """Serve a local folder's events on this machine while the context lasts; yields where."""
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
    """TensorBoard's own port, or any that is free."""
    for port in (_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError("--dashboard: this machine has no free port")
