"""`raybert push`, against a server with the endpoints of the Hub that its client calls."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import refused
from model_directories import make_directory

from raybert.storage.folder import Folder

TOKEN = "hf_secretsecretsecret"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: by name, whether it is private and its files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.paths = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.paths.append(self.path)
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        known = self.server.repositories.get(name)
        if known is None:
            self.answer({"error": "Repository not found"}, 404)
        else:
            self.answer({"id": name, "private": known["private"], "siblings": [], "tags": []})

    def do_POST(self):
        self.server.paths.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            given = json.loads(body)
            if given["organization"] != "me":
                return self.answer({"error": "You don't have the rights"}, 403)
            name = f"me/{given['name']}"
            if name in self.server.repositories:
                return self.answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            private = given.get("visibility") == "private" or bool(given.get("private"))
            self.server.repositories[name] = {"private": private, "files": {}}
            return self.answer({"url": f"{self.server.url}/{name}"})
        name, _, what = self.path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        assert what == "commit"
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.server.repositories[name]["files"][line["value"]["path"]] = data
        self.answer(
            {
                "commitUrl": f"{self.server.url}/{name}/commit/{0:040}",
                "commitOid": "0" * 40,
                "success": True,
            }
        )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # they are read when it is imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("made"))
    files = make_directory(folder, "ngrams")
    (folder / "model").write_text("README.md", "---\nlibrary_name: transformers\n---\nA card.\n")
    files["README.md"] = (folder / "model").read_bytes("README.md")
    return (folder / "model").path, files


def test_all_files_come_to_a_private_repository(raybert, hub, model):
    path, files = model
    listed = raybert("push", path, "me/mine", "--dry-run")
    assert listed.code == 0 and hub.paths == []
    assert all(f"{len(data):,}  {name}" in listed.out for name, data in files.items())
    done = raybert("push", path, "me/mine")
    assert done.code == 0, done.err
    assert hub.repositories["me/mine"] == {"private": True, "files": files}
    assert f"{hub.url}/me/mine (private)" in done.out and TOKEN not in done.out + done.err
    assert raybert("push", path, "me/mine", "--json").json["files"].keys() == files.keys()


def test_a_public_repository_is_written_when_that_is_asked_for(raybert, hub, model):
    hub.repositories["me/open"] = {"private": False, "files": {}}
    told = refused(raybert("push", model[0], "me/open"))
    assert "is public" in told and not hub.repositories["me/open"]["files"]
    assert raybert("push", model[0], "me/open", "--public").code == 0
    assert hub.repositories["me/open"]["files"] == model[1]


def test_what_refuses_is_one_line(raybert, hub, model, monkeypatch):
    from huggingface_hub import constants

    path = model[0]
    assert "OWNER/NAME" in refused(raybert("push", path, "mine"))
    told = refused(raybert("push", path, "others/mine"))
    assert "may not write there (403)" in told
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    told = refused(raybert("push", path, "me/mine"))
    assert "(401)" in told and "hf_wrong" not in told
    monkeypatch.setenv("HF_TOKEN", "hf_wröng\u00a0")  # no header may have it
    assert "push to me/mine" in refused(raybert("push", path, "me/mine"))
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN" in refused(raybert("push", path, "me/mine"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "did not take it (" in refused(raybert("push", path, "me/mine"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "push to me/mine" in refused(raybert("push", path, "me/mine"))
