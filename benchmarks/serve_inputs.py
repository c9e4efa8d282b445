"""Serving of invalid input, authentication, and secrets in logs.

    python benchmarks/serve_inputs.py --json

Serves the small classifier with `raybert serve` and an API key; all limits are the defaults. Sends
10,000 requests drawn by hypothesis (empty, a megabyte, control characters, lone surrogates, wrong
types, deep JSON, 50,000 words, thousands of masks, random bytes), and runs schemathesis on the
server's OpenAPI document. Meanwhile another client sends valid requests, none of which may fail.
Compares scores of texts alone, in lists and by `raybert predict`, and sends requests without the
key. Then searches all files of Ray, Serve and raybert for the key and for a text, and starts
servers with broken models. Prints one JSON object; `ok` says whether every check passed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from drawn import NAME, kinds, requests
from hypothesis import HealthCheck, Phase, given, settings
from origin import origin
from servers import RAYBERT, ROOT, Server, free_port, raybert_serve, reviews, say, small_classifier

from raybert.serve.settings import ServeConfig

SECRET = "the zymurgist whispered of quinces"  # a text that no log may contain
LEAKS = re.compile(rb"Traceback|site-packages|File \"|raybert/serve/|/python3")
TIMEOUT_SECONDS = ServeConfig().timeout_s + 5  # for a response
CLOSE = 1e-5  # the largest difference of a text's scores, in fp32
LIST = 100  # texts per request when scores are compared; one more is still below `max_texts`
PAUSE_SECONDS = 0.05  # between requests of the bystander

# Requests ----------------------------------------------------------------------------------------


class Bystander(threading.Thread):
    """A context in which a client sends valid requests; `found` has the results."""

    def __init__(self, port: int, key: str) -> None:
        super().__init__(daemon=True)
        self._port, self._over = port, threading.Event()
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self._statuses: Counter[int] = Counter()
        self._slowest = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Send requests until the context ends."""
        body = json.dumps({"inputs": "a joy to watch"}).encode()
        while not self._over.wait(PAUSE_SECONDS):
            begun = time.monotonic()
            status, _ = ask(self._port, "POST", "/predict", body, self._headers)
            self._slowest = max(self._slowest, time.monotonic() - begun)
            self._statuses[status] += 1

    @property
    def found(self) -> dict[str, Any]:
        """The statuses and the slowest response."""
        return {
            "statuses": {str(status): n for status, n in sorted(self._statuses.items())},
            "slowest_seconds": round(self._slowest, 2),
            # The other requests may overload the server.
            "ok": self._statuses[200] > 0 and set(self._statuses) <= {200, 429},
        }


def draw_inputs(port: int, key: str, count: int) -> dict[str, Any]:
    """Send the requests that hypothesis draws, and count the responses."""
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    slowest = 0.0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(request=requests, kind=kinds)
    def send(request: tuple[str, bytes], kind: str) -> None:
        nonlocal slowest
        path, body = request
        begun = time.monotonic()
        headers = {"Content-Type": kind, "Authorization": f"Bearer {key}"}
        status, answer = ask(port, "POST", path, body, headers)
        seconds = time.monotonic() - begun
        slowest = max(slowest, seconds)
        statuses[status] += 1
        late = status == 0 or seconds > TIMEOUT_SECONDS
        if late or status >= 500 or LEAKS.search(answer):
            wrong.append(f"{status} for {path} {body[:80]!r}: {answer[:80]!r}")

    send()
    return {
        "sent": sum(statuses.values()),
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "slowest_seconds": round(slowest, 2),
        "wrong": wrong[:20],
        "ok": not wrong and sum(statuses.values()) >= count,
    }


def ask(
    port: int, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Send one request on a new connection; return status and body, or 0 after an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def run_schemathesis(url: str, key: str, examples: int, folder: Path) -> dict[str, Any]:
    """Run schemathesis on the OpenAPI document."""
    report = folder / "schemathesis.json"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {key}", "--max-examples", str(examples)]
    command += ["--checks", "not_a_server_error,response_schema_conformance"]
    command += ["--checks", "status_code_conformance,content_type_conformance"]
    command += ["--continue-on-failure", "--seed", "0", "--report-json-path", str(report)]
    say(" ".join(command).replace(key, "KEY"))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return {"ok": done.returncode == 0, "tail": done.stdout.strip().splitlines()[-25:]}


# Scores, secrets, broken models ------------------------------------------------------------------


def same_scores(
    server: Server, key: str, model: Path, every: Sequence[str], scratch: Path
) -> dict[str, Any]:
    """Compare the scores of texts alone, in lists, in other batches, and by `raybert predict`."""
    alone = [server.ask(text, key) for text in every]
    listed, among = [], []
    for begin in range(0, len(every), LIST):
        group = every[begin : begin + LIST]
        listed += server.ask(list(group), key)
        others = server.ask([*group[1:], "short", *group[:1]], key)
        among += [others[-1], *others[: len(group) - 1]]
    source, output = scratch / "texts.jsonl", scratch / "labels.jsonl"
    source.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in every))
    command = [*RAYBERT, "predict", "--model", str(model), "--input", str(source)]
    command += ["--output", str(output), "--set", "serve.precision=fp32", "--json"]
    say(" ".join(command))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    ways = {
        "in_a_list": [ranked(scores) for scores in listed],
        "in_another_batch": [ranked(scores) for scores in among],
        "through_predict": [(row["label"], row["scores"]) for row in rows],
    }
    reference = [ranked(scores) for scores in alone]
    found: dict[str, Any] = {"texts": len(every)}
    for way, answers in ways.items():
        pairs = list(zip(reference, answers, strict=True))
        found[way] = {
            "same_labels": sum(one[0] == other[0] for one, other in pairs),
            "max_difference": max(
                abs(one[1][name] - other[1][name]) for one, other in pairs for name in one[1]
            ),
        }
    ok = all(
        found[way]["same_labels"] == len(every) and found[way]["max_difference"] <= CLOSE
        for way in ways
    )
    return {**found, "ok": ok}


def ranked(scores: Sequence[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """The label of a response, and its scores by label."""
    return scores[0]["label"], {score["label"]: score["score"] for score in scores}


def without_the_key(port: int, key: str) -> dict[str, Any]:
    """The statuses of requests without the key, or with the key in the wrong place."""
    body = json.dumps({"inputs": SECRET}).encode()
    json_body = {"Content-Type": "application/json"}
    tries = {
        "no key": ("/predict", {}),
        "a wrong key": ("/predict", {"Authorization": f"Bearer {secrets.token_hex(16)}"}),
        "the key cut short": ("/predict", {"Authorization": f"Bearer {key[:-1]}"}),
        "the key in the URL": (f"/predict?key={key}", {}),
        "the key as a path": (f"/{key}", {}),
        "another scheme": ("/predict", {"Authorization": f"Basic {key}"}),
    }
    found = {
        what: ask(port, "POST", path, body, {**json_body, **headers})[0]
        for what, (path, headers) in tries.items()
    }
    with_key = {**json_body, "Authorization": f"Bearer {key}"}
    answered = ask(port, "POST", "/predict", body, with_key)[0]
    ok = set(found.values()) == {401} and answered == 200
    return {"statuses": found, "with_the_key": answered, "ok": ok}


def search_logs(folders: Sequence[Path], printed: str, words: Sequence[str]) -> dict[str, Any]:
    """Search for words in all files in the folders, and in the server's output."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = []
    size = 0
    for path in files:
        content = path.read_bytes()
        size += len(content)
        found += [str(path) for word in words if word.encode() in content]
    found += ["standard error" for word in words if word in printed]
    return {"files": len(files), "bytes": size, "found_in": found, "ok": bool(files) and not found}


def broken_models(model: Path, scratch: Path) -> dict[str, Any]:
    """The exit codes and messages of servers started with missing or damaged models."""
    damaged = {"missing": scratch / "missing"}
    for name in ("cut short", "no tokenizer", "no config"):
        damaged[name] = Path(shutil.copytree(model, scratch / name.replace(" ", "-")))
    weights = damaged["cut short"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (damaged["no tokenizer"] / "tokenizer.json").unlink()
    (damaged["no config"] / "config.json").unlink()
    found: dict[str, Any] = {}
    for name, folder in damaged.items():
        done = subprocess.run(
            raybert_serve(folder, free_port()),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if line.startswith("raybert: ")]
        found[name] = {"code": done.returncode, "said": said}
        say(f"{name}: {' '.join(said)}")
    ok = all(end["code"] == 2 and len(end["said"]) == 1 for end in found.values())
    return {"ends": found, "ok": ok}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: made by configs/bench-serve.yaml")
    parser.add_argument("--inputs", type=int, default=10_000, help="requests that hypothesis draws")
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, per route")
    parser.add_argument("--texts", type=int, default=200, help="whose scores are compared")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args()


def main() -> None:
    given_ = parse_arguments()
    model = small_classifier(given_.model)
    every = reviews(model, given_.texts)[0][: given_.texts]
    pretrained = model.parent.parent / "pretrain" / "model"
    result: dict[str, Any] = {"benchmark": "inputs", **origin()}
    # Paths of Unix sockets are limited.
    with tempfile.TemporaryDirectory(prefix="rbi-", dir="/tmp") as ray_files:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            key = secrets.token_hex(32)
            (scratch / "keys").write_text(f"{key}\n")
            port = free_port()
            command = raybert_serve(
                model,
                port,
                precision="fp32",
                keys=scratch / "keys",
                models=json.dumps({NAME: str(model)}),
                **({"fill_mask": pretrained} if pretrained.exists() else {}),
            )
            environment = {**os.environ, "RAY_TMPDIR": ray_files}
            with Server("raybert", command, port, environment) as server:
                result["keys"] = without_the_key(port, key)
                result["scores"] = same_scores(server, key, model, every, scratch)
                with Bystander(port, key) as bystander:
                    result["inputs"] = draw_inputs(port, key, given_.inputs)
                    say(f"inputs: {result['inputs']['statuses']}")
                    result["schemathesis"] = run_schemathesis(
                        server.url, key, given_.examples, scratch
                    )
                result["bystander"] = bystander.found
                result["still_answers"] = bool(server.ask("still there?", key))
                printed = server.printed()
            result["logs"] = search_logs([Path(ray_files)], printed, [key, SECRET])
            result["broken_models"] = broken_models(model, scratch)
    parts = ("keys", "scores", "inputs", "schemathesis", "bystander", "logs", "broken_models")
    result["ok"] = all(result[part]["ok"] for part in parts) and result["still_answers"]
    print(json.dumps(result, indent=None if given_.json else 2))


if __name__ == "__main__":
    main()
