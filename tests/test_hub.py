"""Where a base model is looked for: here first, then the hub or the mirror that the user names."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lora_scripts.errors import UserError
from lora_scripts.models import hub

FETCH = "import sys; from lora_scripts.models import hub; print(hub.fetch(sys.argv[1]))"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fetch(name: str, **environment: str) -> str:
    """Fetch in a fresh process; the message it ends with."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    root = str(Path(hub.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", FETCH, name],
        env={**kept, "PYTHONPATH": root, "HF_HOME": "hf", "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert result.returncode == 1, result.stdout
    return result.stderr.strip().splitlines()[-1]


# --- local --------------------------------------------------------------------------------------


def test_local_first() -> None:
    Path("someone/model").mkdir(parents=True)
    assert hub.local_path("someone/model") == Path("someone/model")
    Path("model.safetensors").touch()
    assert hub.local_path("model.safetensors") == Path("model.safetensors")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.local_path("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "a/b",
        "org_1/Model.v2",
        "Linaqruf/anything-v3.0",
    ],
)
def test_hub_id(name: str) -> None:
    assert hub.local_path(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "./a/b", "/a/b", "a/b/c", "a\\b", "model", "a/b/", "a//b", "a b/c", "图/片", "a图/b",
        "a--b/c", "a/b..c", "a/b.git", "a/-b", "a-/b", "a/b.", f"a/{'b' * 97}", "C:\\models\\a",
        "models/v1-5-pruned.safetensors", "models/v1-5.CKPT",
    ],
)  # fmt: skip
def test_no_hub_id(name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        hub.local_path(name)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/model"])
def test_impossible_path(name: str) -> None:
    with pytest.raises(UserError):
        hub.local_path(name)


def test_nearest() -> None:
    Path("models").mkdir()
    Path("models/v1-5-pruned.safetensors").touch()
    for name, what in [
        ("./models/v1-5-prund.safetensors", "did you mean models/v1-5-pruned.safetensors?"),
        ("./modles/x.safetensors", "there is no folder modles either"),
    ]:
        with pytest.raises(UserError) as caught:
            hub.local_path(name)
        assert what in str(caught.value).replace("\\", "/")


# --- hub ----------------------------------------------------------------------------------------


def test_offline_is_answered_at_once() -> None:
    began = time.monotonic()
    said = fetch("someone/a-model", HF_HUB_OFFLINE="1")
    assert time.monotonic() - began < 15
    assert "UserError: someone/a-model: no such folder here, and the hub cannot be reached" in said
    assert "name a folder or file on this machine" in said
    assert "HF_ENDPOINT" in said


class Mirror(BaseHTTPRequestHandler):
    """Notes what it is asked and has nothing."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def mirror() -> Iterator[ThreadingHTTPServer]:
    Mirror.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_mirror_is_asked(mirror: ThreadingHTTPServer) -> None:
    address = f"http://127.0.0.1:{mirror.server_port}"
    said = fetch("someone/a-model", HF_ENDPOINT=address, NO_PROXY="127.0.0.1")
    assert "no such folder here and no such model on the hub" in said
    assert any("someone/a-model" in path for path in Mirror.asked)


def test_a_mirror_that_is_not_there() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        port = server.server_port
    began = time.monotonic()
    said = fetch("someone/a-model", HF_ENDPOINT=f"http://127.0.0.1:{port}", NO_PROXY="127.0.0.1")
    assert time.monotonic() - began < 30
    assert "the hub cannot be reached" in said
