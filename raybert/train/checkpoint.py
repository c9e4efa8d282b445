"""Checkpoints: everything that continues a run bit for bit, committed last, verified when read.

A checkpoint is a folder `checkpoints/step-<n>/` of safetensors files and a `state.json`. It counts
only once its commit object, `checkpoints/step-<n>.json`, stands beside it with every file's size
and SHA-256. Object stores can't rename, so this order is the whole protocol: files first, commit
last, and a reader that finds a file other than committed takes the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch

from raybert.errors import DamagedError, Superseded, UserError
from raybert.storage import Folder

FORMAT_VERSION = 1
_COMMIT = re.compile(r"step-(\d{8})\.json")

Tensors = dict[str, torch.Tensor]


@dataclass
class Snapshot:
    """The state of a run at a step, on the CPU, cut off from the tensors that train on."""

    step: int
    model: Tensors
    optimizer: Tensors
    state: dict[str, Any] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run, written by one attempt at it."""

    def __init__(self, run: Folder, attempt: int, keep: int) -> None:
        """Open a run's checkpoints for an attempt that keeps the last `keep` and the best."""
        self._run, self._folder = run, run / "checkpoints"
        self._attempt, self._keep = attempt, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, snapshot: Snapshot, *, best_step: int | None, wait: bool = False) -> None:
        """Write a checkpoint in the background; a failure is raised by the next call.

        Raises:
            Superseded: a younger attempt at the run exists.
            StorageError: the last checkpoint could not be written.
        """
        self.wait()

        def write() -> None:
            try:
                self._write(snapshot)
                self._prune(best_step)
            except Exception as error:  # handed to the training thread, which must see it
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, in rising order."""
        matches = (_COMMIT.fullmatch(name) for name in self._folder.names())
        return sorted(int(match[1]) for match in matches if match)

    def load_latest(self, on_damaged: Callable[[str], None]) -> Snapshot | None:
        """Load the youngest checkpoint that is whole; each broken one is reported by name."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except DamagedError as error:
                on_damaged(str(error))
        return None

    def load(self, step: int) -> Snapshot:
        """Load and verify a checkpoint.

        Raises:
            DamagedError: a file is missing, cut short or altered.
            UserError: a newer raybert wrote it.
        """
        commit = self._folder.read_json(f"step-{step:08d}.json")
        folder = self._folder / f"step-{step:08d}"
        try:
            version = int(commit["format_version"])
            if version > FORMAT_VERSION:
                raise UserError(
                    f"checkpoint {folder} has format {version}, this raybert reads up to "
                    f"{FORMAT_VERSION}; upgrade raybert"
                )
            files = dict(commit["files"])
            data = {name: _verified(folder, name, expected) for name, expected in files.items()}
        except (KeyError, TypeError, ValueError):
            raise DamagedError(f"the commit of checkpoint {folder} is damaged") from None
        try:
            return Snapshot(
                step=step,
                model=safetensors.torch.load(data["model.safetensors"]),
                optimizer=safetensors.torch.load(data["optimizer.safetensors"]),
                state=json.loads(data["state.json"]),
            )
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise DamagedError(f"checkpoint {folder} can't be read: {error}") from None

    def _write(self, snapshot: Snapshot) -> None:
        folder = self._folder / f"step-{snapshot.step:08d}"
        self._folder.delete(f"step-{snapshot.step:08d}.json")
        files: dict[str, dict[str, Any]] = {}
        contents: dict[str, Callable[[], bytes]] = {
            "model.safetensors": lambda: safetensors.torch.save(snapshot.model),
            "optimizer.safetensors": lambda: safetensors.torch.save(snapshot.optimizer),
            "state.json": lambda: json.dumps(snapshot.state).encode(),
        }
        for name, serialize in contents.items():
            data = serialize()
            folder.write_bytes(name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        check_attempt(self._run, self._attempt)
        commit = {
            "format_version": FORMAT_VERSION,
            "step": snapshot.step,
            "attempt": self._attempt,
            "files": files,
        }
        self._folder.write_json(f"step-{snapshot.step:08d}.json", commit)

    def _prune(self, best_step: int | None) -> None:
        """Delete all but the last ones and the best: commits first, so that none is half there."""
        keep = {*self.steps()[-self._keep :], best_step}
        for step in self.steps():
            if step not in keep:
                self._folder.delete(f"step-{step:08d}.json")
        kept = {f"step-{step:08d}" for step in self.steps()}
        for name in self._folder.names():
            if not name.endswith(".json") and name not in kept:
                self._folder.delete(name)


def _verified(folder: Folder, name: str, expected: dict[str, Any]) -> bytes:
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        raise DamagedError(f"checkpoint file {folder.join(name)} is missing") from None
    if len(data) != expected["bytes"]:
        raise DamagedError(
            f"checkpoint file {folder.join(name)} is cut short: {len(data):,} of "
            f"{expected['bytes']:,} bytes"
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise DamagedError(f"checkpoint file {folder.join(name)} is altered: its SHA-256 differs")
    return data


def begin_attempt(run: Folder) -> int:
    """Register a new attempt at a run; from now on only it may commit."""
    attempt = 1 + max(
        (int(name.partition(".")[0]) for name in (run / "attempts").names()), default=0
    )
    (run / "attempts").write_json(f"{attempt:04d}.json", {"attempt": attempt})
    return attempt


def check_attempt(run: Folder, attempt: int) -> None:
    """Make sure that no younger attempt at the run exists.

    Raises:
        Superseded: there is one.
    """
    youngest = max((int(n.partition(".")[0]) for n in (run / "attempts").names()), default=attempt)
    if youngest > attempt:
        raise Superseded(f"{run}: attempt {youngest} has taken over; attempt {attempt} ends here")
