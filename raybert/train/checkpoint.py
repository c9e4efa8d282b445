"""Checkpoints: everything that continues a run bit for bit, committed last, verified when read.

A checkpoint is a folder `checkpoints/step-<n>-a<attempt>/` of safetensors files and a `state.json`.
It counts only once its commit object, `checkpoints/step-<n>-a<attempt>.json`, names it with every
file's size and SHA-256, and its own. Object stores can't rename, so this order is the whole
protocol: files first, commit last, and a reader that finds a file other than committed takes the
checkpoint before. No two attempts share a folder or a commit, so a write that was on its way for
minutes, and arrives when a younger attempt has long committed the same step, harms nobody: of a
step's commits the youngest attempt's counts. Nothing that a commit names is written to: a step that
an attempt saves again has two folders until the new commit stands.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from raybert.errors import DamagedError, StorageError, Superseded, UserError
from raybert.storage.exclusive import numbers_taken, take_number
from raybert.storage.folder import Folder
from raybert.storage.retry import retry

FORMAT_VERSION = 1
_COMMIT = re.compile(r"step-(\d{8})(?:-a(\d+))?\.json")  # the first ones named no attempt
_FOLDER = re.compile(r"step-\d{8}-a(\d+)(-[0-9a-f]{8})?")

#: Types as a safetensors file names them (github.com/huggingface/safetensors, "Format").
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Tensors = dict[str, torch.Tensor]


@dataclass
class Snapshot:
    """The state of a run at a step, on the CPU, cut off from the tensors that train on."""

    step: int
    model: Tensors
    optimizer: Tensors
    state: dict[str, Any] = field(default_factory=dict)


class Commit(NamedTuple):
    """A commit object, by its name; later ones count more."""

    step: int
    attempt: int
    name: str


class Committed(NamedTuple):
    """What writing a checkpoint took, once it is committed."""

    step: int
    seconds: float  # in the background
    size: int  # bytes


class CheckpointStore:
    """The checkpoints of one run, written by one attempt at it."""

    def __init__(self, run: Folder, attempt: int, keep: int) -> None:
        """Open a run's checkpoints for an attempt that keeps the last `keep` and the best."""
        self._run, self._folder = run, run / "checkpoints"
        self._attempt, self._keep = attempt, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._committed: Committed | None = None
        self._swept = False  # False: there may be folders that no commit names
        self.last: int | None = None  # the step of the last one that is known to be whole
        self.is_failing = False  # whether the last one that was begun could not be written

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
                self._prune(snapshot.step, best_step)
                self.is_failing = False
            except Exception as error:  # handed to the training thread, which must see it
                self._error, self.is_failing, self._swept = error, True, False
                if self._folder.is_local:  # what was begun must not fill the disk
                    with suppress(StorageError):
                        self._sweep()

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the checkpoint that is being written, to its end or for some seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take_committed(self) -> Committed | None:
        """The checkpoint that was committed since the last call, if there is one."""
        committed = self._committed
        if committed is not None:  # else the thread may set it just now
            self._committed = None
        return committed

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what went wrong with a checkpoint, once its writing has ended; never waits."""
        if not self.is_busy:
            self.wait()

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, in rising order."""
        return sorted({commit.step for commit in self._commits()})

    def _commits(self) -> list[Commit]:
        """The commits, the one that counts most last."""
        matches = (_COMMIT.fullmatch(name) for name in self._folder.names())
        return sorted(Commit(int(m[1]), int(m[2] or 0), m[0]) for m in matches if m)

    def load_latest(self, on_damaged: Callable[[str], None]) -> Snapshot | None:
        """Load the youngest checkpoint that is whole; each broken one is reported by name."""
        for commit in reversed(self._commits()):
            try:
                snapshot = self._load(commit)
                self.last = commit.step
                return snapshot
            except DamagedError as error:
                on_damaged(str(error))
        return None

    def load(self, step: int) -> Snapshot:
        """Load and verify the checkpoint of a step.

        Raises:
            DamagedError: a file is missing, cut short or altered.
            UserError: a newer raybert wrote it.
        """
        commits = [commit for commit in self._commits() if commit.step == step]
        if not commits:
            name = self._folder.join(f"step-{step:08d}-a*.json")
            raise DamagedError(f"the commit {name} is missing")
        for commit in reversed(commits[1:]):
            with suppress(DamagedError):
                return self._load(commit)
        return self._load(commits[0])

    def _load(self, found: Commit) -> Snapshot:
        name = self._folder.join(found.name)
        try:
            commit = self._read(found)
            version = int(commit["format_version"])
            if version > FORMAT_VERSION:
                raise UserError(
                    f"checkpoint {name} has format {version}, this raybert reads up to "
                    f"{FORMAT_VERSION}; upgrade raybert"
                )
            folder = self._folder / _plain(commit["folder"])
            files = dict(commit["files"])
            data = {name: _verified(folder, name, expected) for name, expected in files.items()}
        except FileNotFoundError:
            raise DamagedError(f"the commit {name} is missing") from None
        except (KeyError, TypeError, ValueError):
            raise DamagedError(f"the commit {name} is damaged") from None
        try:
            return Snapshot(
                step=found.step,
                model=safetensors.torch.load(data["model.safetensors"]),
                optimizer=safetensors.torch.load(data["optimizer.safetensors"]),
                state=json.loads(data["state.json"]),
            )
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise DamagedError(f"checkpoint {folder} can't be read: {error}") from None

    def _read(self, found: Commit) -> dict[str, Any]:
        """Read a commit, all but its own checksum.

        Raises:
            DamagedError: it is altered, or no JSON.
            FileNotFoundError: there is none.
        """
        commit = dict(self._folder.read_json(found.name))
        if commit.pop("sha256", None) not in (None, _seal(commit)):  # the first ones had none
            raise DamagedError(
                f"the commit {self._folder.join(found.name)} is altered: its SHA-256 differs"
            )
        return commit

    def _write(self, snapshot: Snapshot) -> None:
        begun = time.perf_counter()
        check_attempt(self._run, self._attempt)
        if not self._swept:  # a disk may be full of what attempts before this one began
            self._sweep()
        name = commit_name = f"step-{snapshot.step:08d}-a{self._attempt:04d}"
        if self._folder.exists(name):  # by this attempt, too: it may be what the commit names
            name += f"-{uuid.uuid4().hex[:8]}"
        folder = self._folder / name
        files: dict[str, dict[str, Any]] = {}
        contents = {
            "model.safetensors": _pieces(snapshot.model),
            "optimizer.safetensors": _pieces(snapshot.optimizer),
            "state.json": [memoryview(json.dumps(snapshot.state).encode())],
        }
        for file, pieces in contents.items():
            folder.write_bytes(file, pieces)
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            files[file] = {"bytes": sum(map(len, pieces)), "sha256": digest.hexdigest()}
        commit = {
            "format_version": FORMAT_VERSION,
            "step": snapshot.step,
            "attempt": self._attempt,
            "folder": name,
            "files": files,
        }
        check_attempt(self._run, self._attempt)  # writing may have taken minutes
        commit["sha256"] = _seal(commit)
        self._folder.write_json(f"{commit_name}.json", commit)
        size = sum(file["bytes"] for file in files.values())
        self._committed = Committed(snapshot.step, time.perf_counter() - begun, size)
        self.last = snapshot.step

    def _prune(self, written: int, best_step: int | None) -> None:
        """Delete all but the last ones and the best: commits first, so that none is half there.

        What lies ahead of the step just written goes, too: this attempt began behind it, for it
        was damaged. Nothing of a younger attempt is touched, committed or not.
        """
        check_attempt(self._run, self._attempt)
        youngest = {commit.step: commit for commit in self._commits()}  # of each step
        keep = {*[step for step in youngest if step <= written][-self._keep :], best_step}
        for commit in self._commits():
            is_kept = commit.step in keep and commit == youngest[commit.step]
            if not is_kept and commit.attempt <= self._attempt:
                self._folder.delete(commit.name)
        self._sweep()

    def _sweep(self) -> None:
        """Delete the folders that no commit names; those of younger attempts may yet get one."""
        named = {self._named_by(commit) for commit in self._commits()}
        for name in self._folder.names():
            match = _FOLDER.fullmatch(name)
            if match and name not in named and int(match[1]) <= self._attempt:
                self._folder.delete(name)
        self._swept = True

    def _named_by(self, commit: Commit) -> str:
        """The folder that a commit names; none where it is damaged."""
        try:
            return str(self._read(commit)["folder"])
        except (FileNotFoundError, DamagedError, KeyError, TypeError, ValueError):
            return ""


def hash_tensors(tensors: Tensors) -> str:
    """SHA-256 of tensors with their names, wherever they are: equal for equal weights alone."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pieces(tensors: Tensors) -> list[memoryview]:
    """A safetensors file of tensors on the CPU, in pieces that share the tensors' memory.

    The library's `save` copies a file twice, the second time under Python's lock: memory rises by
    two optimizer states, and the steps taken meanwhile wait for a copy of hundreds of megabytes.
    """
    header: dict[str, dict[str, Any]] = {}
    pieces: list[memoryview] = []
    end = 0
    # Wide types first, as in the library: so each tensor lies at a multiple of its type's size.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        pieces.append(tensor.flatten().view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def _seal(commit: dict[str, Any]) -> str:
    """The SHA-256 of a commit without this key."""
    return hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()


def _plain(name: str) -> str:
    """The name of a checkpoint's folder; anything else would lead a reader elsewhere."""
    if not _FOLDER.fullmatch(name):
        raise ValueError(name)
    return name


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


def begin_attempt(run: Folder, patience: float = 0.0) -> int:
    """Register a new attempt at a run under a number of its own; from now on only it may commit.

    Args:
        run: its folder.
        patience: seconds for which a storage that refuses is tried again; what comes of giving up,
            another start of all workers, costs more.

    Raises:
        StorageError: it refused all that time.
    """
    return retry(lambda: take_number(run / "attempts"), patience)


def check_attempt(run: Folder, attempt: int) -> None:
    """Make sure that no younger attempt at the run exists.

    Raises:
        Superseded: there is one.
    """
    youngest = max(numbers_taken(run / "attempts"), default=attempt)
    if youngest > attempt:
        raise Superseded(f"{run}: attempt {youngest} has taken over; attempt {attempt} ends here")
