"""Masking: rates, shares, whole words, and draws that depend only on their key."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.config import build
from raybert.data.corpus.parts import Rows
from raybert.data.masking import IGNORE_INDEX, MaskingConfig, Vocabulary, mask_rows
from raybert.errors import ConfigError

V = 1000
SPECIAL = np.arange(V) < 5
VOCABULARY = Vocabulary(mask_id=4, special=SPECIAL)


def make(n: int = 400, t: int = 256, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, V, (n, t)).astype(np.uint16)
    ids[:, 0], ids[:, -1] = 2, 3
    return Rows(ids, rng.random((n, t)) < 0.6)


def mask(
    rows: Rows, config: MaskingConfig, rate: float | None = None, epoch: int = 0, seed: int = 7
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    n = len(rows.input_ids)
    return mask_rows(
        rows,
        np.arange(n),
        epoch,
        config.mask_rate if rate is None else rate,
        config=config,
        vocabulary=VOCABULARY,
        seed=seed,
    )


@pytest.mark.parametrize("strategy", ["tokens", "words", "spans"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_statistics_over_100_000_tokens(strategy: str, rate: float) -> None:
    rows = make()
    config = build(MaskingConfig, {"strategy": strategy, "mask_rate": rate}, "test")
    inputs, labels = mask(rows, config)
    eligible = ~SPECIAL[rows.input_ids]
    chosen = labels != IGNORE_INDEX
    assert not chosen[~eligible].any()
    assert chosen[eligible].mean() == pytest.approx(rate, abs=0.01)
    masked = inputs[chosen] == 4
    same = inputs[chosen] == labels[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1, abs=0.01)
    assert (~masked & ~same).mean() == pytest.approx(0.1, abs=0.01)
    assert (inputs[~chosen] == rows.input_ids[~chosen]).all()
    assert (labels[chosen] == rows.input_ids[chosen]).all()
    assert not SPECIAL[inputs[chosen][~masked]].any()


def test_words_are_masked_as_a_whole() -> None:
    rows = make()
    _, labels = mask(rows, MaskingConfig(strategy="words"))
    chosen = labels != IGNORE_INDEX
    inside = ~rows.word_starts[:, 1:] & ~SPECIAL[rows.input_ids[:, 1:]]
    inside &= ~SPECIAL[rows.input_ids[:, :-1]]
    assert (chosen[:, 1:] == chosen[:, :-1])[inside].all()


def test_spans_mask_consecutive_words() -> None:
    rows = Rows(make().input_ids, np.ones((400, 256), np.bool_))
    single = mask(rows, MaskingConfig(strategy="tokens"))[1] != IGNORE_INDEX
    spans = mask(rows, MaskingConfig(strategy="spans"))[1] != IGNORE_INDEX

    def follows(chosen: npt.NDArray[np.bool_]) -> float:
        return float((chosen[:, 1:] & chosen[:, :-1]).sum() / chosen.sum())

    assert follows(single) < 0.3 < 0.6 < follows(spans)


@given(st.permutations(range(12)), st.sampled_from(["tokens", "words", "spans"]))
def test_a_row_has_the_same_mask_in_any_batch(order: list[int], strategy: str) -> None:
    rows, config = make(12, 40), build(MaskingConfig, {"strategy": strategy}, "test")
    at = np.array(order)
    inputs, labels = mask(rows, config)
    moved = mask_rows(
        Rows(rows.input_ids[at], rows.word_starts[at]),
        at,
        0,
        config.mask_rate,
        config=config,
        vocabulary=VOCABULARY,
        seed=7,
    )
    assert (moved[0] == inputs[at]).all() and (moved[1] == labels[at]).all()


def test_masks_differ_by_epoch_and_seed_and_nest_by_rate() -> None:
    rows, config = make(50), MaskingConfig()
    base = mask(rows, config)[1]
    assert (base != mask(rows, config, epoch=1)[1]).mean() > 0.2
    assert (base != mask(rows, config, seed=8)[1]).mean() > 0.2
    low, high = (mask(rows, config, rate=r)[1] != IGNORE_INDEX for r in (0.1, 0.3))
    assert (high | ~low).all()  # a lower rate masks a subset of the tokens of a higher one


def test_the_mask_rate_changes_linearly() -> None:
    config = MaskingConfig(mask_rate=0.3, mask_rate_end=0.1)
    assert [round(config.rate(p), 6) for p in (0, 0.5, 1, 2)] == [0.3, 0.2, 0.1, 0.1]


def test_shares_over_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask_share=0.9 and random_share=0.2 add up to more"):
        build(MaskingConfig, {"mask_share": 0.9, "random_share": 0.2}, "test")
