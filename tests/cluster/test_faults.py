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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_a_worker_that_is_killed_on_a_real_cluster_changes_nothing():
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "--json"]
    command += ["--faults", "1", "--kinds", "worker", "--workers", "2", "--steps", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["identical"] and result["digests_equal"]
    assert result["restarts"] == 1 and result["manual_steps"] == []
    assert [fault["kind"] for fault in result["faults"]] == ["worker"]
    assert result["faults"][0]["recovered"] is not None
