"""The package of a job: raybert's code and one resolved configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

from raybert.config import Settings, dump
from raybert.errors import UserError

CONFIG = "experiment.yaml"
ENTRYPOINT = "raybert/jobs/entrypoint.sh"  # in the package
MAX_BYTES = 20 << 20  # code and a configuration are far below
#: What the package consists of: other files, as keys in a `.env`, stay on this machine.
_SUFFIXES = {".cfg", ".css", ".html", ".js", ".py", ".pyi", ".sh", ".svg", ".typed", ".yaml"}


def _excluded(folder: str, names: list[str]) -> list[str]:
    """The names in a folder that are no part of the package."""
    return [
        name
        for name in names
        if name.startswith(".")
        or name == "__pycache__"
        or (Path(folder, name).is_file() and Path(name).suffix not in _SUFFIXES)
    ]


def write_package(folder: Path, settings: Settings) -> int:
    """Write the package and a configuration into an empty folder; return its bytes."""
    source = Path(__file__).resolve().parents[1]
    shutil.copytree(source, folder / "raybert", ignore=_excluded)
    (folder / CONFIG).write_text(dump(settings), encoding="utf-8")
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        raise UserError(
            f"the package has {total / 1e6:.0f} MB, more than {MAX_BYTES >> 20} MB: "
            f"{source / largest.relative_to(folder / 'raybert')} has "
            f"{sizes[largest] / 1e6:.0f} MB; move data to a storage that every node reads"
        )
    return total
