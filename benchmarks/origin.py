"""The provenance of a result: date, commit, machine and versions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raybert.cluster.machine import cpu_name

HERE = Path(__file__).parent


def origin(*packages: str) -> dict[str, Any]:
    """The first keys of a result.

    Args:
        packages: whose versions are listed besides those of Python, Ray and torch.
    """
    versions = {name: version(name) for name in ("ray", "torch", *packages)}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions},
    }


def commit() -> str | None:
    """The commit of this checkout, with `+` if files differ from it; None outside of git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
