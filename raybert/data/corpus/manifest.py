"""The manifest of a corpus: its splits, its parts, and where their row groups lie."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, field_validator, model_validator

from raybert.config import Settings, build
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Positive = Annotated[int, Field(ge=1, lt=1 << 32)]


class Layout(Settings):
    """Where the bytes of a row group lie; all offsets in bytes."""

    first: _Count  # of the first row group, from the start of the part
    stride: _Count  # from one row group to the next
    input_ids: _Count  # of the ids, from the start of the row group
    word_starts: _Count  # of the bit mask, from the start of the row group

    def holds(self, rows: int, seq_len: int, id_bytes: int) -> bool:
        """Whether a row group has room for its rows."""
        ids = self.input_ids + rows * seq_len * id_bytes
        starts = self.word_starts + rows * ((seq_len + 7) // 8)
        return max(ids, starts) <= self.stride


class PartFile(Settings):
    """One part of a split."""

    name: str = Field(pattern=r"^[\w.-]+$")  # in the corpus folder
    rows: _Count
    bytes: _Count
    sha256: str


class SplitManifest(Settings):
    """The parts of one split. All but the last hold `rows_per_part` rows."""

    rows: _Count
    rows_per_part: _Positive
    rows_per_group: _Positive
    layout: Layout | None  # None where the split has no full row group
    tail: Layout | None  # of the last, shorter row group: its page headers may be shorter, too
    parts: list[PartFile]

    def problem(self, seq_len: int, id_bytes: int) -> str | None:
        """What is wrong with it: rows that do not add up, or a row group outside of its part."""
        left = self.rows - self.rows_per_part * (len(self.parts) - 1)  # in the last part
        expected = [self.rows_per_part] * (len(self.parts) - 1) + [left] * bool(self.parts)
        is_whole = 0 < left <= self.rows_per_part if self.parts else not self.rows
        if not is_whole or [part.rows for part in self.parts] != expected:
            return f"its parts do not have the {self.rows:,} rows in order"
        if self.rows_per_part % self.rows_per_group:
            return "its parts do not have full row groups"
        for part in self.parts:
            groups, short = divmod(part.rows, self.rows_per_group)
            for count, size, layout in (
                (groups, self.rows_per_group, self.layout),
                (bool(short), short, self.tail),
            ):
                if count and (layout is None or not layout.holds(size, seq_len, id_bytes)):
                    return "a row group has no room for its rows"
            full = 0 if self.layout is None else self.layout.first + groups * self.layout.stride
            tail = 0 if self.tail is None or not short else self.tail.stride
            if full + tail > part.bytes:
                return f"{part.name} has a row group after its end"
        return None


class _Info(BaseModel):
    """The values of `info` that are read again."""

    config: dict[str, Any] = {}
    inputs: dict[str, list[list[Any]]] = {}
    unknown: Annotated[float, Field(ge=0, le=1)] | None = None
    unigram_loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    tokens: Any = None
    tokenizer_kind: str | None = None
    skipped: dict[str, int] = {}


class Manifest(Settings):
    """The description of a corpus. Written last: a folder without it holds no corpus."""

    format_version: int
    seq_len: _Positive
    dtype: Literal["uint16", "uint32"]  # of the stored ids
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]
    tokenizer_hash: str
    splits: dict[str, SplitManifest]
    info: dict[str, Any] = {}

    @field_validator("info")
    @classmethod
    def _check_info(cls, info: dict[str, Any]) -> dict[str, Any]:
        _Info.model_validate(info)
        return info

    @model_validator(mode="after")
    def _check_splits(self) -> Self:
        for name, split in self.splits.items():
            problem = split.problem(self.seq_len, np.dtype(self.dtype).itemsize)
            if problem is not None:
                raise ValueError(f"splits.{name}: {problem}")
        return self

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
            manifest = build(cls, values, folder.join(MANIFEST))
        except ConfigError as error:
            raise DamagedError(f"{error}; make the corpus again") from None
        if not {"train", "heldout"} <= manifest.splits.keys():
            raise DamagedError(
                f"{folder.join(MANIFEST)}: the split train or heldout is missing; make the corpus "
                "again"
            )
        return manifest

    @property
    def source(self) -> SourceConfig | None:
        """The source that the corpus was made from; None where the manifest does not say."""
        given = self.info.get("config", {}).get("source")
        try:
            return None if given is None else build(SourceConfig, given, MANIFEST)
        except ConfigError as error:
            raise DamagedError(f"{error}; make the corpus again") from None

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
