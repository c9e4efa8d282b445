"""Find the model directory that a path refers to: itself, a run's `model/`, an experiment's."""

from __future__ import annotations

from raybert.errors import UserError
from raybert.storage.folder import Folder

_STAGES = ("pretrain", "finetune", "tune")  # whose runs have a model


def find_model(folder: Folder, stage: str) -> Folder | None:
    """The model directory in a folder; None if there is none.

    It is the folder itself, a run's `model/`, or that of an experiment's run `stage`.
    """
    candidates = (folder, folder / "model", folder / f"{stage}/model")
    return next((candidate for candidate in candidates if candidate.exists("config.json")), None)


def resolve_model(path: str, stage: str = "finetune", key: str = "") -> Folder:
    """The model directory of a path that must have one; `key` gave the path, for messages.

    Raises:
        UserError: it has none.
    """
    found = find_model(Folder(path), stage)
    if found is None:
        named = f"{key}={path}" if key else path
        for other in _STAGES:  # an experiment may lack the stage
            if (Folder(path) / other).exists("model/config.json"):
                raise UserError(
                    f"{named}: no model of {stage} here, but one of {other}; name {path}/{other}"
                )
        raise UserError(f"{named}: no model here (config.json is missing); name a model/ or a run")
    return found
