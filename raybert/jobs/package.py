"""The package of a job: raybert's code and one resolved configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

from raybert.config import Settings, dump
from raybert.errors import UserError

CONFIG = "experiment.yaml"
MAX_BYTES = 20 << 20  # code and a configuration are far below
_EXCLUDED = shutil.ignore_patterns("__pycache__", "*.pyc")


def write_package(folder: Path, settings: Settings) -> int:
    """Write the package and a configuration into an empty folder; return its bytes."""
    source = Path(__file__).resolve().parents[1]
    shutil.copytree(source, folder / "raybert", ignore=_EXCLUDED)
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
