"""A sample for `limit`: seeded, in the proportions of the labels, of bounded memory."""

import json
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import labelled
from source_files import csv_bytes, texts_of, write

from raybert.data.sources.documents import documents, sampled_shards
from raybert.data.sources.files import File, Shard
from raybert.data.sources.sampling import Sampler, chosen_rows, quotas
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import DataError

SORTED = [(f"text {n} of {label}", label) for label in ("a", "b", "c") for n in range(300)]


def sample(path, **options):
    found = labelled(SourceConfig(path=str(path), **options))
    return found.texts.to_pylist(), Counter(found.names[i] for i in found.labels)


def test_a_limit_takes_a_sample_in_the_proportions_of_the_labels(tmp_path):
    path = write(tmp_path / "a.csv", csv_bytes([*SORTED, ("rare 1", "d"), ("rare 2", "d")]))
    texts, counts = sample(path, limit=50)
    assert counts == {"a": 17, "b": 16, "c": 16, "d": 1} or sum(counts.values()) == 50
    assert min(counts.values()) >= 1 and max(counts.values()) <= 17
    assert sample(path, limit=50)[0] == texts
    other, _ = sample(path, limit=50, sample_seed=1)
    assert other != texts
    first, counts = sample(path, limit=302, sample="first")
    assert (first, counts) == ([t for t, _ in SORTED[:302]], {"a": 300, "b": 2})
    everything, _ = sample(path, limit=5000)
    assert len(everything) == 902


def test_the_sample_depends_neither_on_the_order_nor_on_the_files(tmp_path):
    whole = write(tmp_path / "a.csv", csv_bytes(SORTED))
    for number in range(3):
        part = SORTED[::-1][number::3]
        write(tmp_path / "parts" / f"{number}.csv", csv_bytes(part))
    one, of_parts = (sorted(sample(path, limit=77)[0]) for path in (whole, tmp_path / "parts"))
    assert one == of_parts
    unlabelled = (
        texts_of(SourceConfig(path=str(p), limit=77)) for p in (whole, tmp_path / "parts")
    )
    assert len(set(map(tuple, map(sorted, unlabelled)))) == 1


def test_without_labels_all_parts_of_a_source_are_sampled(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"{t}\n" for t, _ in SORTED).encode())
    texts = texts_of(SourceConfig(path=str(path), limit=90))
    counts = Counter(text[-1] for text in texts)
    assert len(texts) == 90 and min(counts.values()) > 15
    assert texts == [text for text, _ in SORTED if text in set(texts)]  # in the source's order


def test_bad_rows_are_counted_once_or_raise(tmp_path):
    path = write(tmp_path / "a.csv", csv_bytes([*SORTED[:300], (" ", "x"), *SORTED[300:]]))
    for limit in (50, 5000):
        skipped = Counter()
        config = SourceConfig(path=str(path), limit=limit, on_bad_row="skip")
        texts = [
            t for table in documents(config, skipped=skipped) for t in table["text"].to_pylist()
        ]
        assert (len(texts), skipped) == (min(limit, 900), {"empty": 1})
    with pytest.raises(DataError, match="a.csv: row 301: empty"):
        texts_of(SourceConfig(path=str(path), limit=50))


def test_readers_get_the_numbers_of_their_rows(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", b'{"text": "only"}\n' * (number + 1))
    config = SourceConfig(path=[f"{tmp_path}/{n}.jsonl" for n in range(3)], limit=4)
    found = sampled_shards(config, skipped=Counter())
    assert [list(chosen_rows(shard)) for shard in found] == [[0], [0, 1], [0]]  # of equal texts


@given(
    st.dictionaries(st.text(max_size=2), st.integers(1, 50), min_size=1, max_size=6),
    st.integers(1, 120),
)
def test_quotas_are_proportional_and_complete(totals, size):
    size = max(len(totals), min(size, sum(totals.values())))
    found = quotas(totals, size)
    assert sum(found.values()) == size
    whole = sum(totals.values())
    for label, total in totals.items():
        share = size * total / whole
        assert 1 <= found[label] <= total
        assert found[label] <= max(1, share + 1)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=80), st.integers(1, 30))
def test_a_sampler_keeps_no_more_than_it_needs(labels, size):
    def table(begin, part):
        texts = [f"text {n}" for n in range(begin, begin + len(part))]
        return pa.table({"text": texts, "label": part, "problem": pa.nulls(len(part), pa.string())})

    shard = Shard("text", (File("a", "a", 0, None),))
    results = []
    for step in (1, 7, 100):
        sampler = Sampler(size, 0)
        for begin in range(0, len(labels), step):
            sampler.add(table(begin, labels[begin : begin + step]), 0, begin)
        kept = [stratum.kept for stratum in sampler._strata.values()]
        assert max(kept) <= 5 * size + step
        chosen = sampler.choose([shard])
        rows = None if chosen[0].rows is None else list(chosen_rows(chosen[0]))
        assert rows is None if len(labels) <= size else len(rows) == size == len(set(rows))
        results.append(rows)
    assert results[0] == results[1] == results[2]


def test_copies_with_other_spaces_are_held_out_together(tmp_path):
    rows = [{"text": f"{space}film {n}{space}"} for n in range(200) for space in ("", " ", "\t")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = SourceConfig, EvaluationSource
    parts = [set(texts_of(kind(path=str(path), hold_out=0.3))) for kind in kinds]
    assert min(map(len, parts)) > 0 and parts[0].isdisjoint(parts[1])
    with pytest.raises(DataError, match="hold_out=0.5 sets (all|none) of the texts apart"):
        for kind in kinds:
            path.write_text('{"text": "a film"}\n')
            list(documents(kind(path=str(path), hold_out=0.5)))
