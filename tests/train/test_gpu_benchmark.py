"""`benchmarks/gpu.py` works before a GPU is paid for, and where there is PyTorch alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
ABSENT = (
    "ray pydantic pydantic_core yaml psutil numpy.typing pyarrow safetensors tokenizers".split()
)


def run(tmp_path, *options):
    """Run it where the packages that a GPU machine may lack can't be imported."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT}));"
        f"sys.argv = ['gpu.py', *{options}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_part_of_it_runs_on_a_cpu(tmp_path):
    result = run(tmp_path, "--device", "cpu", "--short", "--json", "result.json")
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert not result["errors"]
    assert all(case["tokens_per_second"] > 0 for case in result["training"])
    compiled = [case for case in result["training"] if case["compile"]]
    assert [(case["graph_breaks"], case["recompilations"]) for case in compiled] == [(0, 0)]
    errors = result["loss_curve"]["largest_relative_error"]
    assert errors["fp32"] == 0 < errors["bf16"] < 0.01
    assert result["where_time_goes"] and result["inference"]["bf16"] > 0


def test_what_does_not_fit_into_the_time_is_named(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--short", "--minutes", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["errors"]["inference"] == "no time was left"
