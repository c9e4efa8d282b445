"""A short fault drill on several real nodes; `benchmarks/faults.py` has the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import faults  # noqa: E402
from nodes import refusal  # noqa: E402


def test_a_seed_gives_the_same_faults_and_every_kind_its_share():
    for seed in range(20):
        drawn = faults.draw(seed, 20, list(faults.KINDS), workers=3)
        assert drawn == faults.draw(seed, 20, list(faults.KINDS), workers=3)
        counts = {kind: sum(f.kind == kind for f in drawn) for kind in faults.KINDS}
        assert min(counts.values()) >= 3
        assert {f.node for f in drawn} <= {1, 2, 3}
    assert faults.draw(1, 20, list(faults.KINDS), 3) != faults.draw(2, 20, list(faults.KINDS), 3)


def test_runs_differ_where_a_digest_does(tmp_path):
    def run(name, *attempts):
        folder = tmp_path / name / "digests"
        folder.mkdir(parents=True)
        for number, lines in enumerate(attempts, 1):
            (folder / f"{number:04d}-0000.txt").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    quiet = run("quiet", ["0 0 a", "0 1 b", "1 0 c"])
    assert faults.same_digests(quiet, run("resumed", ["0 0 a", "0 1 b"], ["0 1 b", "1 0 c"]))
    assert not faults.same_digests(quiet, run("other", ["0 0 a", "0 1 b", "1 0 d"]))
    assert not faults.same_digests(quiet, run("short", ["0 0 a", "0 1 b"]))
    assert not faults.same_digests(quiet, run("two", ["0 0 a", "0 1 x"], ["0 1 b", "1 0 c"]))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_a_worker_that_is_killed_on_a_real_cluster_changes_nothing():
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "--json"]
    command += ["--faults", "1", "--kinds", "worker", "--workers", "2", "--steps", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["identical"] and result["digests_equal"]
    assert result["restarts"] == 1 and result["manual_steps"] == []
    assert [fault["kind"] for fault in result["faults"]] == ["worker"]
    assert result["faults"][0]["hit"] and result["faults"][0]["recovered"] is not None
