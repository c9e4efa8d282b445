"""The configuration of a source of documents."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from raybert.config import KeyOf, Settings
from raybert.data.sources.files import ReadOptions
from raybert.data.sources.formats import FORMATS
from raybert.data.sources.labels import spell

_SIGNS = {"tab": "\t", "\\t": "\t", "none": ""}
#: Settings that stored sources of earlier versions lack.
_ADDED = {
    "encoding", "delimiter", "quote", "escape", "header", "follow_links", "keep_columns", "sample",
    "sample_seed", "hold_out",
}  # fmt: skip
#: Settings of how files are read, whatever is done with their texts.
READING = frozenset({"encoding", "delimiter", "quote", "escape", "header", "follow_links"})
FormatName = Annotated[str, KeyOf(FORMATS, "auto", "imdb")]


class SourceConfig(Settings):
    """A set of documents, labelled or not."""

    is_for_evaluation: ClassVar[bool] = False

    path: str | list[str] | None = Field(
        None,
        description="local paths, URIs that pyarrow's filesystems read, globs, or the embedded "
        "reviews: sample:imdb, sample:rotten-tomatoes, sample:all; {split} is replaced by `split`; "
        "null: fine-tuning reads what the corpus was made from, evaluation what fine-tuning reads",
    )
    format: FormatName = Field(
        "auto",
        description="auto: by the file's name, or by its content where the name has no suffix; "
        "compressed files and zip and tar archives are read by any",
    )
    encoding: str | None = Field(
        None, description="of text files, as cp1252 or utf-16; null: found out"
    )
    delimiter: str | None = Field(
        None, description="of CSV: the sign between fields, or tab; null: found out"
    )
    quote: str | None = Field(
        None, description="of CSV: the sign around fields, or none; null: found out"
    )
    escape: str | None = Field(
        None,
        description="of CSV: the sign before a quote in a quoted field, or none, where quotes are "
        "doubled; null: found out",
    )
    header: bool | None = Field(
        None,
        description="of CSV: whether the first row has the names of the columns, which else are "
        "1, 2, ...; null: found out",
    )
    follow_links: bool = Field(
        False, description="read what symbolic links in a folder name outside of it"
    )
    split: str | list[str] | None = Field(
        None,
        description="which parts of the source: train, test, unsup of IMDB's archive; train, test "
        "of the sample; null: train for labels, all but test for a corpus, test for evaluation",
    )
    text_column: str = Field(
        "text",
        description="column of the texts; review.text is a field of a nested column; --text-column "
        "sets it for every stage; where it is not set, the corpus's is read, and the model's in "
        "evaluation and prediction",
    )
    pair_column: str | None = Field(
        None, description="column of a second text, for tasks on pairs of texts; null: none"
    )
    group_column: str | None = Field(
        None,
        description="column of what texts have in common, as an author; texts of one group are "
        "never split between training and validation; null: copies of a text are a group",
    )
    label_column: str | list[str] = Field(
        "label",
        description="column of the labels, or several: of 0 and 1, or of numbers; --label-column "
        "sets it for every stage; where it is not set, the model's is read in evaluation",
    )
    keep_columns: list[str] = Field(
        [],
        description="columns that `raybert predict -i` writes beside its own; ids: columns such as "
        "id or review_id; all: every one",
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
    limit: int | None = Field(
        None, ge=1, description="read at most this many documents, chosen by `sample`"
    )
    sample: Literal["random", "first"] = Field(
        "random",
        description="what limit chooses: random: a sample of all, in the proportions of the "
        "labels, for which the source is read twice; first: the first ones",
    )
    sample_seed: int = Field(0, description="of that sample")
    hold_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a source without a test split that only evaluation reads, and all "
        "other stages leave out; chosen by a hash of the text, or of group_column, so that copies "
        "are on one side; 0: none",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        names = [spell(name)[0] for name in value]
        if len(set(names)) < len(names) or len(names) < 2 or None in names:
            raise ValueError(f"labels={value}: expected two or more different labels")
        return names

    @field_validator("text_column", "pair_column", "group_column", "label_column", mode="before")
    @classmethod
    def _column(cls, value: Any) -> Any:
        """A number is the name of a column in a table without a header."""
        if isinstance(value, list) and (not value or len(set(map(str, value))) < len(value)):
            raise ValueError(f"label_column={value}: name one column, or several different ones")
        return str(value) if type(value) is int else value

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, value: str | None) -> str | None:
        try:
            "a".encode(value or "utf-8")
        except LookupError:
            raise ValueError(
                f"encoding={value!r}: no such encoding; name one of Python's, as utf-8, utf-16, "
                "cp1252 or gb18030"
            ) from None
        return value

    @field_validator("delimiter", "quote", "escape")
    @classmethod
    def _sign(cls, value: str | None, info: ValidationInfo) -> str | None:
        sign = _SIGNS.get(value or "", value)
        name = info.field_name
        if sign is None or (len(sign) == 1 and sign not in "\r\n"):
            return sign
        if not sign and name != "delimiter":
            return sign
        known = "tab" if name == "delimiter" else "none"
        raise ValueError(f"{name}={value!r}: expected one character, or {known}")

    @field_validator("path")
    @classmethod
    def _path(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value
        if given is not None and not (given and all(given)):
            raise ValueError(
                f"path={value!r}: name a file, a folder, a glob, a URI, or sample:imdb"
            )
        return value

    @property
    def paths(self) -> list[str]:
        """The configured paths as a list; empty where none is."""
        return [self.path] if isinstance(self.path, str) else self.path or []

    @property
    def other_columns(self) -> dict[str, str]:
        """The configured columns beside text and label, by what they are."""
        columns = {"pair": self.pair_column, "group": self.group_column}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def read_options(self) -> ReadOptions:
        """How files are written, where that is configured."""
        return ReadOptions(self.delimiter, self.quote, self.escape, self.encoding, self.header)

    def identity(self) -> dict[str, Any]:
        """The settings as plain JSON; those added after files were written only where they are set.

        So a source is the one that an earlier version has stored.
        """
        values = self.model_dump(mode="json")
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if k not in _ADDED or v != fields[k].default}

    @property
    def splits(self) -> list[str] | None:
        """The configured splits as a list; None where none is configured."""
        return [self.split] if isinstance(self.split, str) else self.split


class EvaluationSource(SourceConfig):
    """Documents for evaluation only: the default split is test, where the source has splits."""

    is_for_evaluation: ClassVar[bool] = True
