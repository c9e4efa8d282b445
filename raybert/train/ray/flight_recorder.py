"""The last collectives of each rank, which PyTorch's flight recorder writes where one times out.

NCCL's watchdog writes them to a file of the node's temporary folder and ends the process. The
workers of the next attempt move them to the run, where they outlive the node:
`collectives/<attempt>/rank-<rank>`. `torchfrtrace` compares those of all ranks and names the
collective that some of them did not enter.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from raybert.storage.folder import Folder

FOLDER = "collectives"  # in the folder of a run
_PREFIX = "TORCH_FR_DUMP_TEMP_FILE"  # of the file names; PyTorch appends the rank


def recorder_environment(name: str) -> dict[str, str]:
    """Variables for workers with NCCL; `name` is the run's, unlike any other's of a node."""
    path = Path(tempfile.gettempdir(), f"raybert-collectives-{os.getuid()}-{name}-")
    return {
        _PREFIX: str(path),
        "TORCH_FR_BUFFER_SIZE": "20000",  # collectives; a step of 24 layers has some tens
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def keep_recordings(run: Folder, attempt: int) -> int:
    """Move what earlier attempts left on this node to the run; return the number of files.

    A file that another worker of this node moves at the same time counts for that one.
    """
    prefix = os.environ.get(_PREFIX)
    if not prefix:
        return 0
    path, kept = Path(prefix), 0
    for file in sorted(path.parent.glob(f"{path.name}*")):
        taken = file.with_name(f"taken-{os.getpid()}-{file.name}")
        try:
            file.rename(taken)
            rank = file.name.removeprefix(path.name)
            (run / FOLDER / str(attempt - 1)).write_bytes(f"rank-{rank}", taken.read_bytes())
            taken.unlink()
        except FileNotFoundError:
            continue
        kept += 1
    return kept
