"""Masking: rates, shares, whole words, and draws that depend only on their key."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.config import build
from raybert.data.corpus.parts import Rows
from raybert.data.masking import (
    IGNORE_INDEX,
    MaskingConfig,
    Vocabulary,
    document_lengths,
    mask_rows,
    predicted,
    usual_size,
)
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


@given(st.data())
def test_predicted_positions_have_labels_and_their_padding_none(
    data: st.DataObject,
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    labels = np.where(rng.random(shape) < 0.4, rng.integers(0, V, shape), IGNORE_INDEX)
    positions, ids = predicted(labels.astype(np.int32))
    assert len(positions) == (labels != IGNORE_INDEX).sum()
    size = data.draw(st.integers(1, 20))
    padded, padded_ids = predicted(labels.astype(np.int32), size)
    assert len(padded) == len(padded_ids) and len(padded) % size == 0
    assert 0 < len(padded) < len(positions) + size + (not len(positions))
    for at, labels_at in ((positions, ids), (padded, padded_ids)):
        again = np.full(labels.size, IGNORE_INDEX)
        again[at[labels_at >= 0]] = labels_at[labels_at >= 0]
        assert (again.reshape(shape) == labels).all()
        assert ((at >= 0) & (at < labels.size)).all()


def test_usual_sizes_hold_the_predicted_tokens_of_nearly_every_batch() -> None:
    for tokens, rate in ((64, 0.15), (8192, 0.2), (16384, 0.4)):
        counts = np.random.default_rng(0).binomial(tokens, rate, 10_000)
        size = usual_size(tokens, rate)
        assert counts.max() <= size <= max(64, 2 * tokens * rate) and size % 64 == 0


@given(st.data())
def test_documents_begin_with_rows_with_their_first_token_and_with_padding(
    data: st.DataObject,
) -> None:
    n, t = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    starts = rng.random((n, t)) < 0.3
    padding = np.arange(t) >= rng.integers(1, t + 1, (n, 1))
    lengths = document_lengths(starts & ~padding, padding)
    assert sum(lengths) == n * t and min(lengths) > 0
    number = np.repeat(np.arange(len(lengths)), lengths).reshape(n, t)
    for row in range(n):
        for at in range(t):
            is_first = at == 0 or bool(number[row, at] != number[row, at - 1])
            begins_padding = padding[row, at] and (at == 0 or not padding[row, at - 1])
            assert is_first == (at == 0 or (starts & ~padding)[row, at] or begins_padding)
