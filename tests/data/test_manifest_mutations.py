"""Whatever is changed in a corpus's manifest: it is refused in one line, or all rows are read."""

import json

import numpy as np
import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import make_corpus, pretrain_job, reviews, write_csv
from mutations import as_json, byte_strings, json_values

from raybert.config import build
from raybert.data.corpus.build import existing, warn_of_unknown
from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.data.corpus.parts import PartReader
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.corpus.verification import verify_parts
from raybert.errors import RaybertError
from raybert.pipeline.stages import _format_corpus
from raybert.storage.folder import Folder

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("corpus"))
    values = {"source": {"path": write_csv(folder, "a.csv", reviews(40))}, "seq_len": 16}
    config = build(CorpusConfig, values, "")
    make_corpus(folder, texts=[text for text, _ in reviews(40)], config=config)
    return folder, config, folder.read_bytes(MANIFEST)


def use(folder, config):
    """Everything that reads a manifest before a run trains."""
    manifest = existing(config, folder)
    _format_corpus(manifest)
    warn_of_unknown(config, manifest.info.get("unknown"))
    assert manifest.source is None or manifest.source.paths is not None
    spec = pretrain_job(folder)
    spec.check()
    spec.inputs()
    verify_parts(folder, manifest, lambda done, of: None)
    for split in ("train", "heldout"):
        reader = PartReader(folder, manifest, split)
        assert len(reader.read_rows(np.arange(reader.rows)).input_ids) == reader.rows


def check(corpus, data):
    folder, config, given = corpus
    if data.draw(st.integers(0, 4)) == 0:
        changed = data.draw(byte_strings(given))
    else:
        changed = data.draw(json_values(json.loads(given)).map(as_json))
    folder.write_bytes(MANIFEST, changed)
    try:
        use(folder, config)
    except RaybertError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)


@settings(max_examples=examples(60), suppress_health_check=QUIET)
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_read(corpus, data):
    check(corpus, data)


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=QUIET)
@given(data=st.data())
def test_many_changed_manifests_are_refused_or_read(corpus, data):
    check(corpus, data)


def test_a_manifest_as_it_was_written_is_read(corpus):
    folder, config, given = corpus
    folder.write_bytes(MANIFEST, given)
    use(folder, config)
    assert Manifest.read(folder).digest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dtype", "float64"),
        ("seq_len", 10**12),
        ("vocab_size", 0),
        ("splits", {}),
        ("splits.train.rows_per_group", 0),
        ("splits.train.rows", 10**12),
        ("splits.heldout.layout.stride", 10**15),
        ("splits.train.layout", None),
        ("info.config", "x"),
        ("info.config.tokenizer", [1]),
        ("info.unknown", "much"),
        ("info.inputs.source", [1, 2]),
        ("info.inputs.source", [["a.csv", {}, "x"]]),
    ],
)
def test_a_value_that_no_corpus_has_is_damage(corpus, path, value):
    folder, config, given = corpus
    inside = values = json.loads(given)
    *parents, last = path.split(".")
    for parent in parents:
        inside = inside[parent]
    inside[last] = value
    folder.write_json(MANIFEST, values)
    with pytest.raises(RaybertError, match=MANIFEST):
        use(folder, config)
