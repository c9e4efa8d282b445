"""Find the model that a path or a registered name refers to."""

from __future__ import annotations

from dataclasses import dataclass

from raybert.errors import UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.fill_mask import MaskFiller
from raybert.storage.folder import Folder
from raybert.storage.registry import NAME, Registry, resolve_model

_GENERIC = ("model", "finetune", "pretrain")  # folders of a run, which do not name the model


@dataclass(frozen=True)
class ModelSource:
    """A folder, or a registered name whose current version may change at any time."""

    name: str
    location: str  # a path, or the registered name
    registry: str | None = None  # the storage whose registry has the name
    stage: str = "finetune"  # of an experiment, if the location is one

    def current(self) -> Folder:
        """Return the folder of the current version.

        Raises:
            UserError: there is none.
        """
        if self.registry is None:
            return resolve_model(self.location, self.stage)
        return Registry(self.registry).current(self.location)


def find_source(
    location: str, registry: str | None, name: str | None = None, stage: str = "finetune"
) -> ModelSource:
    """Find a model by a path or by a name in the registry; an existing path has priority.

    Args:
        location: a folder with a model, a run, an experiment, or a registered name.
        registry: the storage whose registry may have the name.
        name: of the model in requests; None: the registered name, or that of the folder.
        stage: whose model is used, where the location is an experiment.

    Raises:
        UserError: there is neither.
    """
    if registry is not None and is_registered_name(location, registry):
        if Registry(registry).versions(location):
            return ModelSource(name or location, location, registry)
        raise UserError(
            f"{location}: neither a folder nor a name in the registry of {registry}; name a "
            "model/, a run, an experiment or a registered model"
        )
    folder = resolve_model(location, stage)
    parts = [part for part in folder.path.split("/") if part and part not in _GENERIC]
    return ModelSource(name or (parts[-1] if parts else "model"), location, stage=stage)


def is_registered_name(location: str, registry: str | None) -> bool:
    """Return whether a model is looked up in the registry: a name that is not an existing path."""
    is_name = NAME.fullmatch(location) is not None
    return is_name and registry is not None and not Folder(location).exists()


def is_masked_lm(folder: Folder) -> bool:
    """Return whether a model directory has a pretrained model and no classifier."""
    architectures = folder.read_json("config.json").get("architectures") or [""]
    return str(architectures[0]).endswith("MaskedLM")


def check_model(folder: Folder) -> None:
    """Load a model of either kind once, to check that it is complete.

    Raises:
        UserError: there is no model.
        DamagedError: a file is cut short or altered.
    """
    if is_masked_lm(folder):
        MaskFiller(folder)
    else:
        TextClassifier(folder, precision="fp32")
