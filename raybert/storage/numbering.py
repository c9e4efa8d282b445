"""Numbers of attempts and versions, which only one process may get, on any storage.

Object stores have no locks and no rename.
"""

from __future__ import annotations

import re
import uuid

from raybert.storage.folder import Folder

_NUMBER = re.compile(r"(\d+)-[0-9a-f]{8}\.json")


def take_number(folder: Folder) -> int:
    """Take the next number of a folder, which no other process gets, and leave a file for it.

    Two processes may ask at once. Each writes a file under a unique name and then lists the folder:
    of those with one number, whoever wrote last sees the others, and takes a higher one.
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
