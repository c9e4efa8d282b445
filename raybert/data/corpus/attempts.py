"""Attempts at building a corpus in one folder: only the last one that began may finish.

An attempt writes parts under names of its own, so that those of two attempts never mix, and the
manifest, which names its parts, last. The corpus that an attempt replaces stays until then.
"""

from __future__ import annotations

import re

from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from raybert.errors import DamagedError, DataError, Superseded
from raybert.storage.exclusive import numbers_taken, take_number
from raybert.storage.folder import Folder

_ATTEMPTS = "attempts"
_PART = re.compile(r"(?:train|heldout)-\d+(?:-a(\d+))?\.parquet")
_JSON = {MANIFEST, TOKENIZER_FILE, CONFIG_FILE}
_UNFINISHED = re.compile(
    rf"\.(?P<name>{_PART.pattern}|{'|'.join(map(re.escape, _JSON))})\.[0-9a-f]{{8}}"
)


class Attempt:
    """One build of the corpus in a folder."""

    def __init__(self, folder: Folder) -> None:
        """Begin: from now on, earlier attempts fail at the next part that they write."""
        self._folder = folder
        self.number = take_number(folder / _ATTEMPTS)
        is_first = self.number == 1 and not folder.exists(MANIFEST)
        self.suffix = "" if is_first else f"-a{self.number:04d}"  # of the names of its parts

    def check(self) -> None:
        """Raise Superseded if a later attempt has begun."""
        latest = max(numbers_taken(self._folder / _ATTEMPTS), default=self.number)
        if latest > self.number:
            raise Superseded(
                f"{self._folder}: build {latest} of this corpus has taken over; build "
                f"{self.number} ends here"
            )

    def commit(self, tokenizer: Tokenizer, manifest: Manifest) -> None:
        """Write the tokenizer and the manifest, and delete what the corpus replaces."""
        self.check()
        folder = self._folder
        replaced = self._committed()
        if replaced is None or replaced.tokenizer_hash != tokenizer.hash:
            folder.delete(MANIFEST)  # no moment with the parts of one tokenizer beside another
        tokenizer.save(folder)
        folder.write_json(MANIFEST, manifest.model_dump(mode="json"))
        self.delete_leftovers()

    def delete_leftovers(self) -> None:
        """Delete the files of earlier attempts that belong to no corpus; no other file."""
        folder, manifest = self._folder, self._committed()
        kept: set[str] = set()
        if manifest is not None:
            kept = {part.name for split in manifest.splits.values() for part in split.parts} | _JSON
        for name in folder.names(hidden=True):
            unfinished = _UNFINISHED.fullmatch(name)
            part = _PART.fullmatch(unfinished["name"] if unfinished else name)
            if name in kept or not (part or unfinished or name in _JSON):
                continue
            number = int(part[1] or 1) if part else 1
            is_own = part is not None and self.suffix == (f"-a{part[1]}" if part[1] else "")
            if number <= self.number and not is_own:
                folder.delete(name)

    def _committed(self) -> Manifest | None:
        """The manifest of the corpus in the folder; None where there is none that can be read."""
        try:
            return Manifest.read(self._folder)
        except (DataError, DamagedError):
            return None
