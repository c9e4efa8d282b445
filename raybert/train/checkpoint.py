"""Checkpoints: everything that continues a run bit for bit, committed last, verified when read.

A checkpoint is a folder `checkpoints/step-<n>-a<attempt>/` of safetensors files and a `state.json`.
It counts only once its commit object, `checkpoints/step-<n>-a<attempt>.json`, names it with the
size and SHA-256 of every file, and its own. Object stores can't rename, so the order is the
protocol: files first, commit last; if a file differs from its commit, the checkpoint before is
read. Each attempt writes to its own folder and commit, so a late write of an earlier attempt
overwrites nothing. If several attempts committed a step, the one with the highest number is used.
No file that a commit names is overwritten: a step that an attempt saves again has two folders until
the new commit is written.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors
import safetensors.torch

from raybert.errors import DamagedError, StorageError, UserError
from raybert.records import CheckpointRecord
from raybert.storage.folder import Folder
from raybert.train.run_folder import check_attempt
from raybert.train.tensor_file import Tensors, safetensors_pieces

#: 2 has the moving averages in a file of their own; without averages 1 and 2 are the same.
FORMAT_VERSION = 2
_COMMIT = re.compile(r"step-(\d{8})(?:-a(\d+))?\.json")  # the first versions named no attempt
_FOLDER = re.compile(r"step-\d{8}-a(\d+)(-[0-9a-f]{8})?")
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_AVERAGES, _STATE = "averages.safetensors", "state.json"
_OLD_AVERAGE = "|average"  # in format 1, ends the names of averages in the optimizer's file


class Commit(NamedTuple):
    """A commit object, by its name; the highest (step, attempt) is used."""

    step: int
    attempt: int
    name: str


@dataclass
class Snapshot:
    """The state of a run at a step, on the CPU: copies of the tensors that training changes."""

    step: int
    model: Tensors
    optimizer: Tensors
    state: dict[str, Any] = field(default_factory=dict)  # JSON
    averages: Tensors = field(default_factory=dict)  # moving averages of the weights, by name
    commit: Commit | None = None  # that it was read from


class CheckpointStore:
    """The checkpoints of one run, written by one attempt at it."""

    def __init__(
        self, run: Folder, attempt: int, keep: int, kept_steps: Set[int] = frozenset()
    ) -> None:
        """Open a run's checkpoints for an attempt that keeps the last `keep` and the best.

        Those of `kept_steps` are kept, too.
        """
        self.run, self.attempt, self._kept_steps = run, attempt, kept_steps
        self._folder, self._keep = run / "checkpoints", keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._committed: CheckpointRecord | None = None
        self._damaged: set[Commit] = set()  # that were found damaged when they were read
        self._swept = False  # False: there may be folders that no commit names
        self.last: int | None = None  # the step of the last complete checkpoint
        self.is_failing = False  # whether the last write failed

    def save(
        self,
        snapshot: Snapshot,
        *,
        best_step: int | None,
        wait: bool = False,
        replaces_later: bool = False,
    ) -> None:
        """Write a checkpoint in the background; Superseded, or the last write's StorageError.

        `replaces_later`: it takes the place of later steps that earlier attempts have saved.
        """
        self.wait()

        def write() -> None:
            try:
                self._write(snapshot)
                self._prune(snapshot.step, best_step, replaces_later)
                self.is_failing = False
            except Exception as error:  # raised again in the training thread
                self._error, self.is_failing, self._swept = error, True, False
                if self._folder.is_local:  # a partial checkpoint must not fill the disk
                    with suppress(StorageError):
                        self._sweep()

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the write, at most for some seconds; raises what `save` does."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take_committed(self) -> CheckpointRecord | None:
        """The record of the checkpoint that was committed since the last call, if there is one."""
        committed = self._committed
        if committed is not None:  # else the thread may set it between these lines
            self._committed = None
        return committed

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a finished write, as `wait` does, without waiting."""
        if not self.is_busy:
            self.wait()

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, in rising order."""
        return sorted({commit.step for commit in self._commits()})

    def _commits(self) -> list[Commit]:
        matches = (_COMMIT.fullmatch(name) for name in self._folder.names())
        return sorted(Commit(int(m[1]), int(m[2] or 0), m[0]) for m in matches if m)

    def load_latest(self, on_damaged: Callable[[str], None]) -> Snapshot | None:
        """Load the latest complete checkpoint; `on_damaged` gets a message for each damaged one.

        None: there is none. A DamagedError if there are some and all are damaged: a run that
        started again would delete them.
        """
        messages: list[str] = []
        for commit in reversed(self._commits()):
            try:
                snapshot = self.read(commit)
                self.last = commit.step
                return snapshot
            except DamagedError as error:
                self._damaged.add(commit)
                messages.append(str(error))
                on_damaged(messages[-1])
        if messages:
            raise DamagedError(
                f"every checkpoint of {self.run} is damaged ({messages[0]}); restore one, or "
                f"delete {self._folder} to start anew from step 0"
            )
        return None

    def load(self, step: int) -> Snapshot:
        """Load and verify a step's checkpoint: DamagedError; UserError for a newer format."""
        commits = [commit for commit in self._commits() if commit.step == step]
        if not commits:
            name = self._folder.join(f"step-{step:08d}-a*.json")
            raise DamagedError(f"the commit {name} is missing")
        for commit in reversed(commits[1:]):
            with suppress(DamagedError):
                return self.read(commit)
        return self.read(commits[0])

    def read(self, commit: Commit) -> Snapshot:
        """Read and verify a commit's checkpoint without listing the storage; raises as `load`."""
        name = self._folder.join(commit.name)
        try:
            content = self._read_commit(commit)
            version = int(content["format_version"])
            if version > FORMAT_VERSION:
                raise UserError(
                    f"checkpoint {name} has format {version}, this raybert reads up to "
                    f"{FORMAT_VERSION}; upgrade raybert"
                )
            if not _FOLDER.fullmatch(content["folder"]):  # such as a path out of the run
                raise ValueError(content["folder"])
            folder = self._folder / content["folder"]
            files = dict(content["files"])
            data = {file: _read_verified(folder, file, files[file]) for file in files}
        except FileNotFoundError:
            raise DamagedError(f"the commit {name} is missing") from None
        except (KeyError, TypeError, ValueError):
            raise DamagedError(f"the commit {name} is damaged") from None
        try:
            optimizer = safetensors.torch.load(data[_OPTIMIZER])
            averages = safetensors.torch.load(data[_AVERAGES]) if _AVERAGES in data else {}
            for key in [key for key in optimizer if key.endswith(_OLD_AVERAGE)]:
                averages[key.removesuffix(_OLD_AVERAGE)] = optimizer.pop(key)
            model, state = safetensors.torch.load(data[_MODEL]), json.loads(data[_STATE])
            return Snapshot(commit.step, model, optimizer, state, averages, commit)
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise DamagedError(f"checkpoint {folder} can't be read: {error}") from None

    def _read_commit(self, commit: Commit) -> dict[str, Any]:
        """Read a commit object without its own checksum; a DamagedError if it is altered."""
        content = dict(self._folder.read_json(commit.name))
        # The first versions wrote no checksum.
        if content.pop("sha256", None) not in (None, _commit_checksum(content)):
            raise DamagedError(
                f"the commit {self._folder.join(commit.name)} is altered: its SHA-256 differs"
            )
        return content

    def _write(self, snapshot: Snapshot) -> None:
        begun = time.perf_counter()
        check_attempt(self.run, self.attempt)
        if not self._swept:  # partial checkpoints of earlier attempts may fill the disk
            self._sweep()
        name = commit_name = f"step-{snapshot.step:08d}-a{self.attempt:04d}"
        if self._folder.exists(name):  # this attempt saved the step before, and a commit names it
            name += f"-{uuid.uuid4().hex[:8]}"
        folder = self._folder / name
        files: dict[str, dict[str, Any]] = {}
        contents = {
            _MODEL: safetensors_pieces(snapshot.model),
            _OPTIMIZER: safetensors_pieces(snapshot.optimizer),
            _STATE: [memoryview(json.dumps(snapshot.state).encode())],
        }
        if snapshot.averages:
            contents[_AVERAGES] = safetensors_pieces(snapshot.averages)
        for file, pieces in contents.items():
            folder.write_bytes(file, pieces)
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            files[file] = {"bytes": sum(map(len, pieces)), "sha256": digest.hexdigest()}
        commit = {
            # Without averages the file equals format 1, which older releases read.
            "format_version": FORMAT_VERSION if snapshot.averages else 1,
            "step": snapshot.step,
            "attempt": self.attempt,
            "folder": name,
            "files": files,
        }
        check_attempt(self.run, self.attempt)  # writing may have taken minutes
        commit["sha256"] = _commit_checksum(commit)
        self._folder.write_json(f"{commit_name}.json", commit)
        size = sum(file["bytes"] for file in files.values())
        took, step = round(time.perf_counter() - begun, 4), snapshot.step
        self._committed = CheckpointRecord(
            kind="checkpoint", step=step, stalled=0.0, written=took, bytes=size
        )
        self.last = snapshot.step

    def _prune(self, written: int, best_step: int | None, replaces_later: bool) -> None:
        """Delete all checkpoints but the last `keep`, the best and those of `kept_steps`.

        Commits are deleted before their files.

        Of later steps than the one just written an attempt deletes its own, and those that it found
        damaged. Others, unless this one replaces them, it would have begun from: the storage did
        not list them then. Those of later attempts are left alone.
        """
        check_attempt(self.run, self.attempt)
        commits = self._commits()
        latest = {commit.step: commit for commit in commits}
        last = [step for step in latest if step <= written][-self._keep :]
        milestones = {step for step in self._kept_steps if step <= written}
        keep = {*last, *milestones, best_step}
        for commit in commits:
            is_kept = commit.step in keep and commit == latest[commit.step]
            is_unlisted = commit.step > written and commit.attempt < self.attempt
            if is_unlisted and not replaces_later:
                is_kept |= commit not in self._damaged
            if not is_kept and commit.attempt <= self.attempt:
                self._folder.delete(commit.name)
        self._sweep()

    def _sweep(self) -> None:
        """Delete the folders that no commit names, except those of later attempts."""
        named = {self._folder_of(commit) for commit in self._commits()}
        for name in self._folder.names():
            match = _FOLDER.fullmatch(name)
            if match and name not in named and int(match[1]) <= self.attempt:
                self._folder.delete(name)
        self._swept = True

    def _folder_of(self, commit: Commit) -> str:
        """The name of the folder that a commit names; empty where the commit is damaged."""
        try:
            return str(self._read_commit(commit)["folder"])
        except (FileNotFoundError, DamagedError, KeyError, TypeError, ValueError):
            return ""


def _commit_checksum(commit: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()


def _read_verified(folder: Folder, name: str, expected: dict[str, Any]) -> bytes:
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
