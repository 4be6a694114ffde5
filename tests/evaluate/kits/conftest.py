"""One tiny student, served once for the session; kits that are not installed are a reason to skip, with the command."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.kits import serve, vlmeval
from components.evaluate.kits.client import Endpoint

LIGHT = sorted((Path(sys.prefix) / "vlmeval").glob("ms_vlmeval-*.dist-info"))
needs_vlmeval = pytest.mark.skipif(not LIGHT, reason="VLMEvalKit is not installed: `make kits`")
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: `make kits`")
needs_server = pytest.mark.skipif(find_spec("openai") is None, reason="the server's extra is not installed: `make kits`")


# Replaces the server's last line: the same server, which logs the inputs and outputs of `generate`.
RECORDING = """
import json
from transformers import LlavaForConditionalGeneration as Model
generate = Model.generate
def recorded(*args, **inputs):
    found = generate(*args, **inputs)
    with open(os.environ["ALIGNTI_TEST_TOKENS"], "a") as file:
        print(json.dumps([inputs["input_ids"][0].tolist(), found[0, inputs["input_ids"].shape[1] :].tolist()]), file=file)
    return found
Model.generate = recorded
main()
"""


@pytest.fixture(scope="session")
def served_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of [prompt's token ids, answer's], one for each question that the served student has answered."""
    return tmp_path_factory.mktemp("served") / "tokens.jsonl"


@pytest.fixture(scope="session")
def endpoint(model_folder: Path, served_tokens: Path) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNTI_TEST_TOKENS", str(served_tokens))
        patch.setattr(serve, "TRANSFORMERS", serve.TRANSFORMERS.removesuffix("main()\n") + RECORDING)
        with serve.served(model_folder, "toy@v1:b", "cpu", served_tokens.with_name("server.log")) as (server, _):
            yield server


class Scripted:
    """A server whose answers a test chooses: `answer` gives (status, text) for a question. Records its requests."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.systems: list[str] = []
        self.images: list[str] = []  # as data URLs
        self.answer: Any = lambda question: (200, "yes")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                *system_messages, message = body["messages"]
                question = "<image>".join(part["text"] for part in message["content"] if part["type"] == "text")
                outer.systems += [system["content"] for system in system_messages]
                outer.questions.append(question)
                outer.images += [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
                status, text = outer.answer(question)
                payload = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = Endpoint(f"http://127.0.0.1:{self.server.server_port}", "scripted")


def session(scripted: Scripted, folder: Path) -> vlmeval.Session:
    return vlmeval.Session(vlmeval.kit(full=False), scripted.endpoint, folder, folder / "answers.jsonl", new_tokens=8)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
