"""The manifest of a corpus: its splits, its parts, and where their row groups lie."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from raybert.config import Settings, build
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class Layout(Settings):
    """Where the bytes of a row group lie; all offsets in bytes."""

    first: int  # of the first row group, from the start of the part
    stride: int  # from one row group to the next
    input_ids: int  # of the ids, from the start of the row group
    word_starts: int  # of the bit mask, from the start of the row group


class PartFile(Settings):
    """One part of a split."""

    name: str  # in the corpus folder
    rows: int
    bytes: int
    sha256: str


class SplitManifest(Settings):
    """The parts of one split. All but the last hold `rows_per_part` rows."""

    rows: int
    rows_per_part: int
    rows_per_group: int
    layout: Layout | None  # None where the split has no full row group
    tail: Layout | None  # of the last, shorter row group: its page headers may be shorter, too
    parts: list[PartFile]


class Manifest(Settings):
    """The description of a corpus. Written last: a folder without it holds no corpus."""

    format_version: int
    seq_len: int
    dtype: str  # of the stored ids: uint16 or uint32
    vocab_size: int
    tokenizer_hash: str
    splits: dict[str, SplitManifest]
    info: dict[str, Any] = {}

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        """Read a corpus's manifest; a DataError where there is none, or a newer raybert made it."""
        try:
            values = folder.read_json(MANIFEST)
        except FileNotFoundError:
            raise DataError(
                f"{folder}: no corpus here ({MANIFEST} is missing); make one with `raybert corpus`"
            ) from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(
                f"{folder}: the corpus has format {version}, this raybert reads up to "
                f"{FORMAT_VERSION}; upgrade raybert or make the corpus again"
            )
        try:
            return build(cls, values, folder.join(MANIFEST))
        except ConfigError as error:
            raise DamagedError(f"{error}; make the corpus again") from None

    @property
    def source(self) -> SourceConfig | None:
        """The source that the corpus was made from; None where the manifest does not say."""
        given = self.info.get("config", {}).get("source")
        return None if given is None else build(SourceConfig, given, MANIFEST)

    @property
    def digest(self) -> str:
        """A hash of the content, not of the build, the sources or the versions that made it."""
        content = self.model_dump(mode="json", exclude={"info"})
        for split in content["splits"].values():
            for part in split["parts"]:
                part["name"] = re.sub(r"-a\d+(?=\.)", "", part["name"])  # which build wrote it
        # The unigram model's loss depends on every token of the training split.
        content["content"] = {key: self.info.get(key) for key in ("tokens", "unigram_loss")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
