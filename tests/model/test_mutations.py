"""Whatever is changed in a model directory: it is refused in one line, or it answers."""

import json
import resource
import signal
from contextlib import contextmanager

import psutil
import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_directories import TASKS, make_directory
from mutations import as_json, byte_strings, json_values, safetensors_headers

from raybert.errors import RaybertError
from raybert.inference.classifier import TextClassifier
from raybert.inference.fill_mask import MaskFiller
from raybert.model.huggingface import make_classifier_on
from raybert.model.settings import HeadConfig
from raybert.serve.runtime.model_sources import is_masked_lm
from raybert.storage.folder import Folder
from raybert.tasks.protocol import ALL_SCORES

TEXT = "a superb film, 1 2 3 文字"
_BYTES = 2 << 30  # beyond what the process has before
_HANGS_S = 60


class Files(dict):
    """A dictionary that failing tests do not print."""

    def __repr__(self):
        return f"{len(self)} directories"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    return Files({name: make_directory(Folder(made / name), name) for name in (*TASKS, "masked")})


@contextmanager
def bounded():
    """Let allocations far beyond the model fail, and interrupt what never ends."""

    def hangs(*_):
        raise AssertionError("it never ends")

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + _BYTES, before[1]))
    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(_HANGS_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def use(folder):
    """Everything that reads a model directory: answers, masks, fine-tuning."""
    make_classifier_on(folder, 3, HeadConfig())
    if is_masked_lm(folder):
        filler = MaskFiller(folder)
        answers = filler.fill(f"a {filler.mask_token} film", 3)
    else:
        classifier = TextClassifier(folder, precision="fp32")
        text = (TEXT, TEXT) if classifier.reads_pairs else TEXT
        answers = classifier.answers([text, text], ALL_SCORES)
        assert len(answers) == 2
        classifier.task.columns(answers)
        classifier.task.column_types()
        outputs = classifier.logits([text])
        classifier.task.tensors(outputs, classifier.words([text]))
    json.dumps(answers, allow_nan=False, ensure_ascii=False).encode()


def check(folder, files, file, data):
    for name in set(folder.names()) - set(files):  # of the example before
        folder.delete(name)
    for name, content in files.items():
        folder.write_bytes(name, data if name == file else content)
    with bounded():
        try:
            use(folder)
        except RaybertError as error:
            assert str(error).isprintable(), repr(str(error))
            assert len(str(error)) < 2000


def mutate(data, directories, folder):
    """Draw a directory, a file of it and a mutation, and use what results."""
    files = directories[data.draw(st.sampled_from(sorted(directories)))]
    kinds = ["config.json"] * 4 + ["tokenizer.json"] * 3
    kinds += ["model.safetensors"] * 3 + ["tokenizer_config.json"]
    if "ngrams.json" in files:
        kinds += ["ngrams.json", "ngrams.safetensors"] * 4
    file = data.draw(st.sampled_from(kinds))
    given = files[file]
    if data.draw(st.integers(0, 4)) == 0:
        first = 4000 if file.endswith("safetensors") else None
        changed = data.draw(byte_strings(given, first))
    elif file.endswith("safetensors"):
        changed = data.draw(safetensors_headers(given))
    else:
        changed = data.draw(json_values(json.loads(given)).map(as_json))
    check(folder, files, file, changed)


UNLIMITED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=examples(25), suppress_health_check=UNLIMITED)
@given(data=st.data())
def test_a_changed_model_directory_is_refused_or_answers(data, directories, tmp_path):
    mutate(data, directories, Folder(tmp_path))


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=UNLIMITED)
@given(data=st.data())
def test_many_changed_model_directories_are_refused_or_answer(data, directories, tmp_path):
    mutate(data, directories, Folder(tmp_path))
