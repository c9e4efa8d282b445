"""The configuration of a source of documents."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from raybert.config import KeyOf, Settings
from raybert.data.sources.formats import FORMATS

FormatName = Annotated[str, KeyOf(FORMATS, "auto", "imdb")]


class SourceConfig(Settings):
    """A set of documents, labelled or not."""

    is_for_evaluation: ClassVar[bool] = False

    path: str | list[str] = Field(
        "sample:imdb",
        description="local paths, URIs that pyarrow's filesystems read, globs, or the embedded "
        "default: sample:imdb, sample:rotten-tomatoes, sample:all; {split} is replaced by `split`",
    )
    format: FormatName = Field(
        "auto", description="auto: by the file's name (.gz and .zst are decompressed)"
    )
    split: str | list[str] | None = Field(
        None,
        description="which parts of the source: train, test, unsup of IMDB's archive; train, test "
        "of the sample; null: train for labels, all but test for a corpus, test for evaluation",
    )
    text_column: str = "text"
    pair_column: str | None = Field(
        None, description="column of a second text, for tasks on pairs of texts; null: none"
    )
    group_column: str | None = Field(
        None,
        description="column of what texts have in common, as an author; texts of one group are "
        "never split between training and validation; null: copies of a text are a group",
    )
    label_column: str | list[str] = Field(
        "label", description="column of the labels, or several: of 0 and 1, or of numbers"
    )
    label_separator: str | None = Field(
        None, description="between several labels in one string, as | or ,; null: one label"
    )
    labels: list[str] | None = Field(
        None,
        description="the labels in the order of their ids: their names, or names for the integers "
        "0, 1, ... in the data; null: those found in the data, sorted",
    )
    document: Literal["line", "file"] = Field("line", description="what one document is, in text")
    html_breaks: Literal["space", "keep"] = Field(
        "space", description="HTML line breaks (<br />): replace by spaces, or keep"
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail",
        description="rows that are empty, not UTF-8, without a label, ...: stop, or skip and count",
    )
    limit: int | None = Field(None, ge=1, description="read at most this many documents")

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        names = [str(name) for name in value]
        if len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(f"labels={value}: expected two or more different labels")
        return names

    @field_validator("path")
    @classmethod
    def _path(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all([value] if isinstance(value, str) else value):
            raise ValueError(
                f"path={value!r}: name a file, a folder, a glob, a URI, or sample:imdb"
            )
        return value

    @property
    def paths(self) -> list[str]:
        """The configured paths as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def other_columns(self) -> dict[str, str]:
        """The configured columns beside text and label, by what they are."""
        columns = {"pair": self.pair_column, "group": self.group_column}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def splits(self) -> list[str] | None:
        """The configured splits as a list; None where none is configured."""
        return [self.split] if isinstance(self.split, str) else self.split


class EvaluationSource(SourceConfig):
    """Documents for evaluation only: the default split is test, where the source has splits."""

    is_for_evaluation: ClassVar[bool] = True
