"""Find a model by its path, and the registry: models by name, with versions and a current one.

`<storage>/registry/<name>/v<number>/` is a model directory; `version.json` in it is written last.
`current.json` names the current version and its predecessors, which a rollback returns to. Each
file is written as a whole, so that a reader sees the pointer either before or after a change.
"""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raybert.errors import DamagedError, StorageError, UserError, one_line
from raybert.storage.exclusive import take_number
from raybert.storage.folder import Folder
from raybert.storage.missing import looks_like_path, near_names

FORMAT_VERSION = 1
REGISTRY = "registry"  # the folder, in a storage
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a model
CHOICES = "serving-"  # prefix of a model's files with the precision that was chosen to serve it
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_VERSION, _CURRENT = "version.json", "current.json"
_FOLDER = re.compile(r"v(\d+)")
_MOST_HISTORY = 100  # rollbacks
_LOOKED_AT = 20  # folders in one that has no model itself


_Number = Annotated[int, Field(ge=1)]


class _Pointer(BaseModel):
    """The content of `current.json`."""

    model_config = ConfigDict(strict=True)

    format_version: _Number
    version: _Number
    history: list[_Number]


class Registry:
    """The registry of a storage."""

    def __init__(self, storage: str) -> None:
        """Open the registry of a storage: a path or a URI."""
        self._folder = Folder(storage) / REGISTRY

    def names(self) -> list[str]:
        """The names of the registered models."""
        found = [name for name in self._folder.names() if NAME.fullmatch(name)]
        return [name for name in found if self._model(name).exists(_CURRENT)]

    def versions(self, name: str) -> list[int]:
        """The versions of a model, in ascending order."""
        model = self._model(name)
        matches = (_FOLDER.fullmatch(folder) for folder in model.names())
        numbers = sorted(int(match[1]) for match in matches if match)
        return [number for number in numbers if model.exists(f"v{number}/{_VERSION}")]

    def folder(self, name: str, version: int) -> Folder:
        """The model directory of a version; UserError if there is none."""
        versions = self.versions(name)
        if version not in versions:
            shown = ", ".join(map(str, versions)) or "none; promote a model first"
            raise UserError(f"{self._model(name)} has no version {version}; it has {shown}")
        return self._model(name) / f"v{version}"

    def current(self, name: str) -> Folder:
        """The model directory of the current version; UserError if there is no such model."""
        return self.folder(name, self._read_pointer(name).version)

    def describe(self, name: str, version: int) -> dict[str, Any]:
        """The source, time and weights' hash of a version."""
        return _read_object(self.folder(name, version), _VERSION)

    def promote(self, name: str, model: Folder) -> int:
        """Copy a model into the registry, make it the current one, and return its version.

        If its weights and configuration are registered, only the chosen precisions are copied.
        """
        if not model.exists("config.json"):
            raise UserError(f"{model}: no model here (config.json is missing); name a model/")
        digest = _digest(model)
        for version in reversed(self.versions(name)):
            if self.describe(name, version).get("digest") == digest:
                _copy_choices(model, self.folder(name, version))
                self._set_current(name, version)
                return version
        version = take_number(self._model(name) / "numbers")
        folder = self._model(name) / f"v{version}"
        model.copy_to(folder, last="config.json")
        about = {"format_version": FORMAT_VERSION, "version": version, "from": model.uri}
        promoted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        folder.write_json(_VERSION, {**about, "digest": digest, "promoted": promoted})
        self._set_current(name, version)
        return version

    def rollback(self, name: str, version: int | None = None) -> int:
        """Make a version, by default the one before, the current one; return its number."""
        pointer = self._read_pointer(name)
        history = list(pointer.history)
        if version is None:
            if not history:
                raise UserError(
                    f"{self._model(name)}: version {pointer.version} is the first one; there "
                    "is nothing to go back to"
                )
            version = history.pop()
            self.folder(name, version)  # raises where there is none
            self._write_pointer(name, version, history)
        else:
            self.folder(name, version)
            self._set_current(name, version)
        return version

    def _set_current(self, name: str, version: int) -> None:
        """Make a version the current one and add the previous one to the history."""
        history: list[int] = []
        if self._model(name).exists(_CURRENT):
            with suppress(DamagedError):  # which the new pointer mends
                pointer = self._read_pointer(name)
                if pointer.version == version:
                    return
                history = [*pointer.history, pointer.version][-_MOST_HISTORY:]
        self._write_pointer(name, version, history)

    def _write_pointer(self, name: str, version: int, history: list[int]) -> None:
        pointer = {"format_version": FORMAT_VERSION, "version": version, "history": history}
        self._model(name).write_json(_CURRENT, pointer)

    def _read_pointer(self, name: str) -> _Pointer:
        model = self._model(name)
        try:
            found = _read_object(model, _CURRENT)
        except FileNotFoundError:
            known = ", ".join(self.names()) or "none as yet"
            raise UserError(
                f"{self._folder} has no model {name!r}; it has {known}; make one with `raybert "
                "promote`"
            ) from None
        try:
            pointer = _Pointer.model_validate(found)
        except ValidationError as error:
            raise DamagedError(
                f"{model.join(_CURRENT)} is damaged: {one_line(error)}; promote a model again"
            ) from None
        if pointer.format_version > FORMAT_VERSION:
            raise UserError(
                f"{model} has format {pointer.format_version}, this raybert reads up to "
                f"{FORMAT_VERSION}; upgrade raybert"
            )
        return pointer

    def _model(self, name: str) -> Folder:
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for a model; use letters, digits, . _ -")
        return self._folder / name


def _read_object(folder: Folder, name: str) -> dict[str, Any]:
    found = folder.read_json(name)
    if not isinstance(found, dict):
        raise DamagedError(f"{folder.join(name)} is damaged: it holds no JSON object")
    return found


def _digest(model: Folder) -> str:
    """A hash of the files that determine a model's predictions."""
    digest, names = hashlib.sha256(), model.names()
    weights = [name for name in names if name.endswith(".safetensors")]
    if "model.safetensors" in names:  # otherwise they are in several files
        weights = ["model.safetensors"]
    tokenizer = "tokenizer.json" if "tokenizer.json" in names else "vocab.txt"
    for name in ("config.json", *weights, tokenizer):
        if name in names:
            digest.update(hashlib.sha256(model.read_bytes(name)).digest())
    return digest.hexdigest()


def _copy_choices(model: Folder, version: Folder) -> None:
    """Copy the chosen precisions; one by speed does not replace one by accuracy (with `texts`)."""
    existing = set(version.names())
    for name in model.names():
        if not name.startswith(CHOICES):
            continue
        with suppress(DamagedError):  # then a replica chooses again
            choice = _read_object(model, name)
            if name in existing and "texts" not in choice and _is_by_accuracy(version, name):
                continue
            version.write_json(name, choice)


def _is_by_accuracy(version: Folder, name: str) -> bool:
    try:
        return "texts" in _read_object(version, name)
    except DamagedError:
        return False


_STAGES = ("pretrain", "finetune", "tune")  # whose runs have a model


def find_model(folder: Folder, stage: str) -> Folder | None:
    """The model directory in a folder: itself, `model/`, or that of its run `stage`; or None."""
    candidates = (folder, folder / "model", folder / f"{stage}/model")
    return next((candidate for candidate in candidates if candidate.exists("config.json")), None)


def resolve_model(path: str, stage: str = "finetune", key: str = "") -> Folder:
    """The model directory of a path, else a UserError, which names `key` that gave the path."""
    found = find_model(Folder(path), stage)
    if found is None:
        named = f"{key}={path}" if key else path
        for other in _STAGES:  # an experiment may lack the stage
            if (Folder(path) / other).exists("model/config.json"):
                raise UserError(
                    f"{named}: no model of {stage} here, but one of {other}; name {path}/{other}"
                )
        if Folder(path).exists():
            why = (
                f"no model here (config.json is missing); name a model/ or a run{_models_in(path)}"
            )
        elif is_hub_name(path):
            why = f"no model here{near_names(path)}; name a model/ or a run{hub_hint(path)}"
        else:
            why = f"no such folder{near_names(path)}; name a model/ or a run"
        raise UserError(f"{named}: {why}")
    return found


def _models_in(path: str) -> str:
    """The end of a message about a folder of runs: the first of them with a model."""
    folder = Folder(path)
    with suppress(StorageError):  # a file
        for name in folder.names()[:_LOOKED_AT]:
            if find_model(folder / name, "finetune") is not None:
                return f", as {path.rstrip('/')}/{name}"
    return ""


def is_hub_name(text: str) -> bool:
    """Whether a text could be the name of a model on a hub, and is no path."""
    return _HUB_NAME.fullmatch(text) is not None and not looks_like_path(text)


def hub_hint(path: str) -> str:
    """The end of a message about a path that is no folder but could be a name on a hub."""
    if not is_hub_name(path) or Folder(path).exists():
        return ""
    name = path.rpartition("/")[2]
    return (
        f", or download a model of huggingface.co first: `hf download {path} --local-dir {name}`, "
        f"then name {name}"
    )
