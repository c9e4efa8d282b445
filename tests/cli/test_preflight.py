"""Misspelt files, columns and models are found before PyTorch is imported and Ray is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused
from making import make_corpus, reviews, write_csv

from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.settings import SourceConfig
from raybert.storage.folder import Folder

SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr
from raybert.cli import commands

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["raybert", *arguments]
    error = io.StringIO()
    try:
        with redirect_stderr(error):
            commands.main()
        code = 0
    except SystemExit as end:
        code = end.code
    heavy = sorted({"torch", "ray", "sklearn"} & set(sys.modules))
    print(json.dumps([code, error.getvalue(), heavy]))
"""


def mistakes(tmp_path):
    """Commands with a mistake, and the words of their message."""
    texts = write_csv(Folder(tmp_path), "a.csv", reviews(6), header="body,stars")
    usual = write_csv(Folder(tmp_path), "usual.csv", reviews(6))
    (tmp_path / "no.yaml").write_text(f"run: {{storage: {tmp_path}/runs}}\n")
    config = ["-c", str(tmp_path / "no.yaml")]
    for command in ("corpus", "run", "finetune", "tune", "evaluate"):
        yield [command, *config, "--data", "/typo.csv"], "/typo.csv: no such file or folder"
    for command in ("finetune --seeds 2", "finetune --folds 2"):
        yield [*command.split(), *config, "--data", "/typo.csv"], "/typo.csv: no such file"
    for command in ("corpus", "run"):
        yield [command, *config, "--data", texts, "--text-column", "x"], "no column 'x'"
    for command in ("run", "finetune", "tune"):
        columns = ["--text-column", "text", "--label-column", "y"]
        yield [command, *config, "--data", usual, *columns], "no column 'y'; set label_column"
    for key in ("corpus.overlap", "finetune.validation", "evaluate.source"):
        given = ["--data", usual, "--set", f"{key}.path=/typo.csv"]
        yield ["run", *config, *given], "/typo.csv: no such file or folder"
    yield (
        ["evaluate", *config, "--data", usual, "-m", "/no"],
        "/no: no such folder; name a model/ or a run",
    )
    yield ["predict", *config, "-m", "/no", "a text"], "/no: no such folder; name a model/ or a run"
    yield ["predict", *config, "-i", "/typo.csv", "-o", "a.jsonl"], "/typo.csv: no such file"
    yield ["predict", *config, "-i", usual], "--input needs --output"
    for output, words in (("a.txt", "name a .jsonl"), (f"{usual}/a.csv", "can't be written")):
        yield ["predict", *config, "-i", usual, "-o", output], words
    columns = ["--text-column", "x", "-o", "a.csv"]
    yield ["predict", *config, "-i", usual, *columns], "no column 'x'; set text_column"


def test_a_misspelt_name_is_found_before_anything_heavy_is_imported(tmp_path):
    given = list(mistakes(tmp_path))
    command = [sys.executable, "-c", SCRIPT, json.dumps([arguments for arguments, _ in given])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(given)
    for (code, error, heavy), (arguments, words) in zip(found, given, strict=True):
        assert (code, heavy) == (2, []), arguments
        assert error.startswith("raybert: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("named", [True, False])
def test_columns_that_the_corpus_remembers_are_no_mistake(raybert, tmp_path, named):
    """The first looks find no mistake where the stages would read a file."""
    texts = write_csv(Folder(tmp_path), "mine.csv", reviews(20), header="body,label")
    config = CorpusConfig(source=SourceConfig(path=texts, text_column="body"))
    make_corpus(Folder(tmp_path / "runs" / "mine" / "corpus"), config=config)
    (tmp_path / "tokenizer").mkdir()
    given = ["--set", f"finetune.source.path={texts}"] if named else []
    done = raybert("finetune", "-n", "mine", "--bare", "--set", f"run.storage={tmp_path}/runs",
                   "--set", "finetune.initialize_from=/no", *given)  # fmt: skip
    assert "finetune.initialize_from=/no: no such folder" in refused(done)


def test_options_of_predict_that_exclude_each_other_are_refused(raybert, model, tmp_path):
    texts = write_csv(Folder(tmp_path), "a.csv", reviews(4))
    (tmp_path / "link.csv").symlink_to(texts)
    at = ("predict", "-m", model.uri)
    file = (*at, "-i", texts, "-o")
    assert "leave out the texts" in refused(raybert(*file, tmp_path / "o.csv", "a text"))
    assert "name one with --input" in refused(raybert(*at, "-o", tmp_path / "o.csv", "a text"))
    for output in (texts, tmp_path / "link.csv", f"{tmp_path}/../{tmp_path.name}/a.csv"):
        assert "is a file that --input reads" in refused(raybert(*file, output))
    assert "can't be written" in refused(raybert(*file, "/proc/o.csv"))
    assert "text 1 is not UTF-8" in refused(raybert(*at, "caf\udce9"))
    assert "text 1 is not UTF-8" in refused(raybert("fill-mask", "[MASK] caf\udce9"))
    assert "--threshold=nan: name a number" in refused(raybert(*at, "x", "--threshold", "nan"))
    assert Path(texts).read_text().count("\n") == 5


def test_the_mark_of_a_file_that_is_piped_is_no_part_of_a_text(raybert, model):
    done = raybert("predict", "-m", model.uri, stdin=b"\xef\xbb\xbfa film\r\na film\r\n")
    first, second = map(json.loads, done.out.splitlines())
    assert first["text"] == "a film" and first == {**second, "row": 0}
