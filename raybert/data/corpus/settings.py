"""The configuration of a corpus."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raybert.config import Settings
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.data.tokenizer_training import TokenizerConfig


class CorpusConfig(Settings):
    """How text becomes a corpus."""

    source: SourceConfig = SourceConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int = Field(256, ge=8, le=65536, description="tokens in a row")
    heldout_fraction: float = Field(
        0.01, gt=0, lt=1, description="share of the documents held out, chosen by a text hash"
    )
    heldout_max_documents: int = Field(
        5000,
        ge=1,
        description="held-out documents at most, since evaluation keeps them in memory; where the "
        "fraction is more than that, they come from the source's beginning: lower the fraction",
    )
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="documents whose text came before"
    )
    overlap: EvaluationSource | None = Field(
        None, description="a test set; documents that are also in it are counted"
    )
    overlap_drop: bool = Field(False, description="leave out documents that are in the test set")
    rows_per_part: int = Field(8192, ge=1, description="rows in a Parquet file")
    rows_per_group: int = Field(32, ge=1, description="rows in a row group, the unit of reading")
    seed: int = Field(0, description="keys the choice of held-out documents")
