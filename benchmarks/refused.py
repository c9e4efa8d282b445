"""The time until a submission without the cluster's token, or with a wrong one, is rejected.

    sudo .venv/bin/python benchmarks/refused.py --json

Starts a head with token authentication on the cluster of `nodes.py`, and submits to it without a
token and with a wrong one. Prints one JSON object: for each the message, the exit codes, and the
seconds of the submissions, process start included.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from nodes import Cluster, refusal
from origin import origin


def submitted(cluster: Cluster, config: Path, token: Path | None) -> tuple[int, str, float]:
    """Submit with the token in a file; return the exit code, the last line, and the seconds."""
    words = ["submit", "pretrain", "-c", str(config), "--address", cluster.address]
    env = {key: value for key, value in cluster.env.items() if not key.startswith("RAY_")}
    env["HOME"] = str(cluster.folder)  # it has no token file
    if token is not None:
        env["RAY_AUTH_TOKEN_PATH"] = str(token)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "raybert", *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1], time.perf_counter() - begun


def main() -> None:
    """Measure rejected submissions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    given = parser.parse_args()
    why = refusal()
    if why is not None:
        raise SystemExit(f"refused.py: {why}")
    with Cluster(0) as cluster:
        config = cluster.folder / "experiment.yaml"
        config.write_text(json.dumps({"run": {"name": "refused", "storage": str(cluster.folder)}}))
        wrong = cluster.folder / "wrong"
        wrong.write_text(secrets.token_hex(32))
        tokens = {"no token": None, "a wrong token": wrong}
        tries = {
            name: [submitted(cluster, config, tokens[name]) for _ in range(given.repeats)]
            for name in tokens
        }
        measured = {
            name: {
                "line": found[0][1],
                "exit_codes": [code for code, _, _ in found],
                "median_s": round(median(seconds for _, _, seconds in found), 2),
                "max_s": round(max(seconds for _, _, seconds in found), 2),
            }
            for name, found in tries.items()
        }
    result = {**origin(), **measured}
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
