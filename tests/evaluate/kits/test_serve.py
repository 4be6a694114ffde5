"""A served student's door is not open to everybody, and what is behind it is named when it is not there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.cli import hand_on
from components.errors import InputError, ModelError, TryAgainError
from components.evaluate.kits import client, serve
from components.evaluate.kits.client import Endpoint, RequestRejected, chat_completion
from tests.evaluate.kits.conftest import Scripted, needs_server

ROOT = Path(__file__).parents[3]


@needs_server
def test_a_server_that_ends_says_its_last_words(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "TRANSFORMERS", "import sys; sys.exit('out of memory')")
    server = serve.served(model_folder, "m", "cpu", tmp_path / "log")
    with pytest.raises(TryAgainError, match="ended with 1: out of memory"), server:
        pass


def test_serving_ends_with_its_server(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It went on waiting, with nothing behind its address."""

    @contextmanager
    def dying(*_: object) -> Iterator[tuple[Endpoint, subprocess.Popen[bytes]]]:
        log = tmp_path / ".runs/serve/8000/server.log"
        log.parent.mkdir(parents=True)
        log.write_text("out of memory")
        yield Endpoint("http://127.0.0.1:8000", "m"), subprocess.Popen([sys.executable, "-c", "exit(3)"])

    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "served", dying)
    monkeypatch.setattr(serve, "check_address", lambda *_: None)
    with pytest.raises(TryAgainError, match="the server ended with 3: out of memory"):
        hand_on.serve(str(model_folder), 8000, serve.LOOPBACK)


@needs_server
def test_a_video_part_without_torchvision_is_no_reason_to_try_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "TRANSFORMERS", "raise OSError(\"Can't load video processor for 'm'\")")
    server = serve.served(model_folder, "m", "cpu", tmp_path / "log")
    with pytest.raises(InputError, match="torchvision alone: install the extra `vision`"), server:
        pass


def test_an_address_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port} of 127.0.0.1 .*choose another --port"):
            serve.check_address("127.0.0.1", port)
    serve.check_address("127.0.0.1", port)
    with pytest.raises(InputError, match=r"cannot listen on port 8000 of 192\.0\.2\.1"):  # of nobody's machine (RFC 5737)
        serve.check_address("192.0.2.1", 8000)


def test_no_checkpoint_no_server(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"), serve.served(tmp_path / "none", "m", "cpu", tmp_path / "log"):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_open_door_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(client.KEY, raising=False)
    assert not serve.is_loopback(host)
    for server in ("openai uvicorn fastapi", "vllm"):
        monkeypatch.setattr(serve, "find_spec", lambda name, installed=server: name in installed)
        with pytest.raises(InputError, match="open to others"):
            serve.command(Path("m"), host, 1, "cpu")
    monkeypatch.setenv(client.KEY, "secret")
    assert "secret" not in serve.command(Path("m"), host, 1, "cpu")  # vLLM asks for keys, and reads its own elsewhere
    monkeypatch.setattr(serve, "find_spec", lambda name: name != "vllm")
    with pytest.raises(InputError, match="asks nobody for a key"):
        serve.command(Path("m"), host, 1, "cpu")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name != "vllm")
    assert serve.command(Path("m"), host, 1, "cpu")[-4:] == ["--host", host, "--port", "1"]


def test_what_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"openai is not installed.*make kits"):
        serve.command(Path("m"), "127.0.0.1", 1, "cpu")


def test_a_model_that_says_nothing_a_busy_server_and_none_at_all(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for loopback
    scripted.answer = lambda question: (200, None)
    assert chat_completion(scripted.endpoint, ["q"], 2) == "" and not scripted.systems  # a model that says nothing
    chat_completion(scripted.endpoint._replace(system="Be brief."), ["q"], 2)
    assert scripted.systems == ["Be brief."]
    scripted.answer = lambda question: (503, "busy")
    with pytest.raises(RequestRejected, match="HTTP 503"):
        chat_completion(scripted.endpoint, ["q"], 2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            chat_completion(Endpoint(f"http://127.0.0.1:{nobody.getsockname()[1]}", "m"), ["q"], 2, timeout_s=2)
