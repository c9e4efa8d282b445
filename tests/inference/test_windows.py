"""Windows over long texts: they cover the text exactly, and their logits are averaged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.inference.classifier import OVERLAP, pool, windows

CLS, SEP = 1, 2


def text_of(length):
    return np.array([CLS, *range(10, 10 + length), SEP])


@given(st.integers(0, 400), st.integers(8, 64))
def test_windows_cover_a_text_in_order(length, seq_len):
    ids = text_of(length)
    found = windows(ids, seq_len)
    assert all(len(window) <= seq_len for window in found)
    assert all((window[0], window[-1]) == (CLS, SEP) for window in found)
    inner = [window[1:-1].tolist() for window in found]
    assert sorted({token for part in inner for token in part}) == ids[1:-1].tolist()
    assert all(part == list(range(part[0], part[-1] + 1)) for part in inner if part)
    assert inner == sorted(inner)


@given(st.integers(0, 400), st.integers(8, 64))
def test_a_text_that_fits_is_one_window_and_windows_of_longer_texts_are_full(length, seq_len):
    ids = text_of(length)
    found = windows(ids, seq_len)
    if len(ids) <= seq_len:
        assert [window.tolist() for window in found] == [ids.tolist()]
    else:
        assert {len(window) for window in found} == {seq_len}
        stride = seq_len - 2 - (seq_len - 2) // OVERLAP
        assert len(found) <= 1 + -(-(length - (seq_len - 2)) // stride)


@given(st.lists(st.integers(2, 40), max_size=8), st.integers(1, 3))
def test_the_logits_of_a_text_are_the_mean_of_its_windows(lengths, num_labels):
    counts = [len(windows(np.arange(length), 10)) for length in lengths]
    logits = np.random.default_rng(0).normal(size=(sum(counts), num_labels)).astype(np.float32)
    found = pool(logits, lengths, 10)
    assert found.shape == (len(counts), num_labels)
    begin = 0
    for row, count in zip(found, counts, strict=True):
        assert row == pytest.approx(logits[begin : begin + count].mean(axis=0), abs=1e-5)
        begin += count


def test_logits_of_single_windows_are_returned_unchanged():
    logits = np.ones((3, 2), np.float32)
    assert pool(logits, [3, 2, 8], 8) is logits


@given(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(8, 20))
def test_each_token_has_the_output_of_one_of_its_windows(lengths, seq_len):
    """The output of a token is that token's id, whatever the window."""
    texts = [np.arange(1, length + 1) for length in lengths]
    rows = [row for text in texts for row in windows(text, seq_len)]
    outputs = [np.stack([row, np.full(len(row), i)], axis=1) for i, row in enumerate(rows)]
    for text, found in zip(texts, pool(outputs, lengths, seq_len), strict=True):
        assert found[:, 0].tolist() == text.tolist()
        if len(text) > seq_len:  # tokens at a window's end are read in the middle of another
            begins = np.flatnonzero(np.diff(found[:, 1])) + 1
            assert len(begins) == len(windows(text, seq_len)) - 1
