"""What only one process may create, on storages without locks and rename: numbers and files."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from contextlib import suppress
from typing import Any

from raybert.storage.folder import Folder, new_file

_NUMBER = re.compile(r"(\d+)-[0-9a-f]{8}\.json")
#: Longer than an object store takes to look up one file and to write another.
_PROPOSAL_WAIT_SECONDS = 3.0


def take_number(folder: Folder) -> int:
    """Take the next number of a folder, which no other process gets, and leave a file for it.

    Each process writes a file under a unique name and then lists the folder: of those with one
    number, whoever wrote last sees the others, and takes a higher one.
    """
    number = 1 + max(numbers_taken(folder), default=0)
    while True:
        mine = f"{number:04d}-{uuid.uuid4().hex[:8]}.json"
        folder.write_json(mine, {"number": number})
        rivals = [name for name in folder.names() if name.startswith(f"{number:04d}-")]
        if rivals == [mine]:
            return number
        # Those that saw each other take different numbers.
        number = 1 + max(numbers_taken(folder)) + rivals.index(mine)


def numbers_taken(folder: Folder) -> list[int]:
    """The numbers that were taken, in no order."""
    return [int(match[1]) for match in map(_NUMBER.fullmatch, folder.names()) if match]


def create_json(folder: Folder, name: str, value: Any) -> None:
    """Write a JSON file unless there is one; of many writers at once, all find the same file."""
    if folder.is_local:
        with new_file(folder.join(name), _link_if_absent) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")
    elif not folder.exists(name):
        _create_remote(folder, name, value)


def _link_if_absent(file: str, path: str) -> None:
    with suppress(FileExistsError):
        os.link(file, path)


def _create_remote(folder: Folder, name: str, value: Any) -> None:
    """Write a file on an object store, without locks, such that concurrent writers agree.

    Each writer writes a proposal under a name of its own and waits, so that all who found no file
    have written one by then. All list the same proposals and write the first one's content.
    """
    proposals = f".{name}."
    own = proposals + uuid.uuid4().hex[:8]
    folder.write_json(own, value)
    time.sleep(_PROPOSAL_WAIT_SECONDS)
    names = folder.names(hidden=True)
    # A proposal is deleted after its writer has written the file: a writer that misses a proposal
    # finds the file.
    if name not in names:
        first = min(other for other in names if other.startswith(proposals))
        with suppress(FileNotFoundError):  # deleted since: the file has been written
            folder.write_json(name, folder.read_json(first))
    folder.delete(own)
