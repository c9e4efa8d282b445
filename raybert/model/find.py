"""Which model directory is meant by a path: it, a run's, or an experiment's."""

from __future__ import annotations

from raybert.errors import UserError
from raybert.storage import Folder


def resolve_model(path: str, stage: str = "finetune", key: str = "") -> Folder:
    """The model directory that a path means: itself, a run's `model/`, or an experiment's.

    Args:
        path: a folder.
        stage: the run that is meant inside an experiment.
        key: the configuration's key that names it, for messages.

    Raises:
        UserError: there is none.
    """
    folder = Folder(path)
    for inside in ("", "model", f"{stage}/model"):
        candidate = folder / inside if inside else folder
        if candidate.exists("config.json"):
            return candidate
    named = f"{key}={path}" if key else path
    raise UserError(f"{named}: no model here (config.json is missing); name a model/ or a run")
