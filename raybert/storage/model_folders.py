"""Which model directory is meant by a path: it, a run's, or an experiment's."""

from __future__ import annotations

from raybert.errors import UserError
from raybert.storage.folder import Folder

_STAGES = ("pretrain", "finetune", "tune")  # whose runs have a model


def find_model(folder: Folder, stage: str) -> Folder | None:
    """The model directory that a folder means: itself, a run's `model/`, or an experiment's.

    Args:
        folder: where to look.
        stage: the run that is meant inside an experiment.
    """
    candidates = (folder, folder / "model", folder / f"{stage}/model")
    return next((candidate for candidate in candidates if candidate.exists("config.json")), None)


def resolve_model(path: str, stage: str = "finetune", key: str = "") -> Folder:
    """The same for a path that must lead to one.

    Args:
        path: a folder.
        stage: the run that is meant inside an experiment.
        key: the configuration's key that names it, for messages.

    Raises:
        UserError: there is none.
    """
    found = find_model(Folder(path), stage)
    if found is None:
        named = f"{key}={path}" if key else path
        for other in _STAGES:  # an experiment that has not come as far, or begins later
            if (Folder(path) / other).exists("model/config.json"):
                raise UserError(
                    f"{named}: no model of {stage} here, but one of {other}; name {path}/{other}"
                )
        raise UserError(f"{named}: no model here (config.json is missing); name a model/ or a run")
    return found
