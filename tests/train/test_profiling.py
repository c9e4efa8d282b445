"""A profile of some steps is written beside the run, whatever else happens."""

import pytest
from making import Attempt, make_corpus, pretrain_job

from raybert.config import build
from raybert.errors import ConfigError
from raybert.storage.folder import Folder
from raybert.train.settings import TrainConfig
from raybert.train.task import Stopped


@pytest.mark.filterwarnings("ignore")  # the profiler's own, of the environment
def test_the_configured_steps_are_profiled(tmp_path):
    corpus, run = Folder(tmp_path) / "corpus", Folder(tmp_path) / "run"
    make_corpus(corpus)
    job = pretrain_job(corpus, steps=6, profile={"steps": [1, 3]})
    with pytest.raises(Stopped):
        Attempt(job, run, stop_at=2).run()  # in the middle of them
    Attempt(job, run).run()
    name = "steps-1-3-rank-0"
    assert sorted((run / "profile").names()) == [f"{name}.json", f"{name}.txt"]
    trace = (run / "profile").read_json(f"{name}.json")
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "aten::mm" in (run / "profile").read_text(f"{name}.txt")
    attempt = Attempt(pretrain_job(corpus, profile=5), Folder(tmp_path) / "other")
    attempt.run()  # 4 steps: the fifth is not reached
    assert not Folder(tmp_path).exists("other/profile")


def test_steps_without_an_end_are_refused():
    assert build(TrainConfig, {"steps": 9, "profile": 3}, "test").profile.steps == (3, 4)
    with pytest.raises(ConfigError, match=r"steps=\[3, 3\]: the second must be above the first"):
        build(TrainConfig, {"steps": 9, "profile": {"steps": [3, 3]}}, "test")
