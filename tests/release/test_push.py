"""`alignti push`: nothing leaves without the flag, and every refusal of the hub is one sentence without the token."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub import errors as hub
from typer.testing import CliRunner

from components.cli import app
from components.errors import InputError, ModelError, TryAgainError
from components.records.paths import STUDENTS
from components.release import push as module
from components.release.push import Upload, plan, push
from tests.families import toy

ROOT = Path(__file__).parents[2]
TOKEN = "hf_canaryAbCdEfGhIj"
REPO = "org/mine"
CARD = """---
license: apache-2.0
licences_of_inputs:
  teacher: mit
  data:
    a: CC BY 4.0
model-index:
- name: mine
  results: []
---
# Mine
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "params", "params")
    path = Path(shutil.copytree(toy.folder("llava_onevision", 2, 2), "out"))
    (path / "README.md").write_text(CARD)
    (path / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (path / "optimizer.pt").write_bytes(b"x")
    (path / "logs").mkdir()
    (path / "logs/config.json").write_text("{}")
    return path


@pytest.fixture(autouse=True)
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `hf auth login`: the token is in a file, not in the environment."""
    monkeypatch.setattr(module, "get_token", lambda: TOKEN)


class Hub:
    """A stub of HfApi with the calls of push."""

    token = None
    private = True

    def __init__(self, files: list[str] | None = None, fails: dict[str, Exception] | None = None) -> None:
        self.files = files or [".gitattributes"]
        self.fails = fails or {}
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}

    def create_repo(self, repo: str, **options: Any) -> str:
        self._fail("create_repo")
        self.created = {"repo": repo, **options}
        return f"https://hub/{repo}"

    def repo_info(self, repo: str) -> SimpleNamespace:
        self._fail("repo_info")
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, repo: str) -> list[str]:
        self._fail("list_repo_files")
        return self.files

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        self._fail("upload_folder")
        self.uploaded = options
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")

    def _fail(self, step: str) -> None:
        if step in self.fails:
            raise self.fails[step]


def test_the_plan_names_files_and_sizes_and_leaves_out_what_is_no_models(folder: Path) -> None:
    upload = plan(folder, REPO, private=True)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(upload.files)
    assert upload.left_out == [".env", "logs/config.json", "optimizer.pt"]
    assert upload.warnings == []
    printed = str(upload)
    assert "out -> org/mine on huggingface.co (private):" in printed and "not uploaded: .env" in printed
    assert f"{len(upload.files)} files, {sum(upload.files.values()) / 2**20:,.2f} MiB" in printed


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        ("license: apache-2.0\n", "", "names no `license:`"),
        ("teacher: mit", "teacher: not stated", "the licence of teacher is not stated"),
        ("a: CC BY 4.0", "a: CC BY-NC 4.0", r"data a is for non-commercial use or research \(CC BY-NC 4.0\)"),
        ("a: CC BY 4.0", "a: Note it here before you pass it on.", "the licence of data a is not stated"),
        ("model-index:\n- name: mine\n  results: []\n", "", "has no scores"),
        (CARD[4:-12], "tags: [x]\n", "does not say under which licences"),
        ("  teacher: mit\n  data:\n    a: CC BY 4.0", "  unknown", "the licence of its inputs is not stated"),
        ("  teacher: mit\n  data:\n    a: CC BY 4.0", "- CC BY-NC 4.0", "its inputs is for non-commercial use"),
    ],
)
def test_open_questions_about_licences_are_said(old: str, new: str, warning: str, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace(old, new))
    (line,) = [candidate for candidate in plan(folder, REPO, True).warnings if re.search(warning, candidate)]
    assert f"WARNING: {line}" in str(plan(folder, REPO, True))


def test_without_the_flag_nothing_is_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(module, "HfApi", refuse)
    result = CliRunner().invoke(app, ["push", str(folder), REPO])
    assert (result.exit_code, result.exception) == (0, None)
    assert result.output.endswith("Nothing was uploaded; add --yes-upload to do it.\n") and "model.safetensors" in result.output


@pytest.mark.parametrize("public", [False, True])
def test_with_the_flag_it_goes_up_as_one_commit(public: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Hub()
    monkeypatch.setattr(module, "HfApi", lambda: api)
    args = ["push", str(folder), REPO, "--yes-upload", *(["--public"] if public else [])]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0 and "uploaded: https://hub/org/mine/commit/1" in result.output
    assert api.created == {"repo": REPO, "private": not public, "exist_ok": True}
    assert api.uploaded["folder_path"] == folder and api.uploaded["allow_patterns"] == list(plan(folder, REPO, True).files)
    assert TOKEN not in result.output


def upload(folder: Path) -> Upload:
    return plan(folder, REPO, private=True)


def test_what_is_on_the_hub_is_not_written_over_unasked(folder: Path) -> None:
    api: Any = Hub(files=[".gitattributes", "model.safetensors"])
    with pytest.raises(InputError, match=r"org/mine is on the hub already and holds 1 files; .*--update"):
        push(upload(folder), update=False, api=api)
    assert not api.uploaded
    push(upload(folder), update=True, api=api)
    assert api.uploaded


@pytest.mark.parametrize("update", [False, True])
def test_what_is_to_be_private_does_not_go_to_a_public_repository(update: bool, folder: Path) -> None:
    """`create_repo` leaves one that exists as it is."""
    api: Any = Hub()
    api.private = False
    with pytest.raises(InputError, match=r"org/mine is on the hub already and public; .*--public"):
        push(upload(folder), update, api=api)
    assert not api.uploaded
    push(plan(folder, REPO, private=False), update, api=api)
    assert api.uploaded


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


FAILURES = {
    "gated": (hub.GatedRepoError("gated", response=response(403)), InputError, "org/mine is gated"),
    "bad token": (hub.HfHubHTTPError(f"401 for {TOKEN}", response=response(401)), InputError, "does not take this token"),
    "not ours": (hub.HfHubHTTPError("403", response=response(403)), InputError, "may not write to org/mine"),
    "no org": (hub.RepositoryNotFoundError("404", response=response(404)), InputError, "may not write to org/mine"),
    "odd": (hub.HfHubHTTPError(f"422 {TOKEN} no", response=response(422)), InputError, r"the hub refuses: 422 \*\*\* no"),
    "busy": (hub.HfHubHTTPError("429", response=response(429)), TryAgainError, "answers 429; run again later"),
    "down": (hub.HfHubHTTPError("503", response=response(503)), TryAgainError, "answers 503; run again later"),
    "offline": (hub.OfflineModeIsEnabled("offline"), TryAgainError, "cannot be reached"),
    "reset": (ConnectionResetError("reset by peer"), TryAgainError, "cannot be reached"),
    "no network": (httpx2.ConnectError("no route to host"), TryAgainError, "cannot be reached"),
    "slow": (httpx2.ReadTimeout("timed out"), TryAgainError, "cannot be reached"),
    "hf_xet": (RuntimeError("CAS Client Error: error sending request"), TryAgainError, "cannot be reached"),
}


@pytest.mark.parametrize("step", ["create_repo", "repo_info", "list_repo_files", "upload_folder"])
@pytest.mark.parametrize("case", FAILURES)
def test_refusals_of_the_hub_say_what_to_do(case: str, step: str, folder: Path) -> None:
    error, kind, message = FAILURES[case]
    api: Any = Hub(fails={step: error})
    with pytest.raises(kind, match=message) as refusal:
        push(upload(folder), update=False, api=api)
    assert refusal.value.exit_code == (75 if kind is TryAgainError else 2)
    assert TOKEN not in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_a_token_the_real_client_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token of the hub: `hf auth login`, or set HF_TOKEN"):
        push(upload(folder), update=False)


def test_offline_the_real_client_asks_to_try_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TryAgainError, match="the hub cannot be reached"):
        push(upload(folder), update=False, api=HfApi(token=TOKEN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "README.md").unlink(), "no README.md, and a model without a card"),
        (lambda f: (f / "README.md").write_text("---\n: [\n---\n"), "front matter is not valid"),
        (lambda f: (f / "model.safetensors").unlink(), "only pickled weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), "missing or cut short"),
    ],
)
def test_what_is_no_model_to_hand_on_is_refused(change: Any, message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(ModelError, match=message):
        plan(folder, REPO, private=True)


def test_an_arm_is_handed_on_by_its_name(folder: Path) -> None:
    shutil.copytree(folder, STUDENTS / "kd/model")
    result = CliRunner().invoke(app, ["push", "kd", REPO])
    assert result.output.startswith(f"{STUDENTS}/kd/model -> {REPO} on huggingface.co"), result


class Stub(BaseHTTPRequestHandler):
    """The hub's endpoints that the real client calls to make a repository and commit small files."""

    paths: ClassVar[list[str]] = []  # paths
    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[dict[str, Any]] = {}

    @property
    def address(self) -> str:
        return f"http://{self.headers['host']}"

    def do_GET(self) -> None:
        self._answer([] if "/tree/" in self.path else {"id": REPO, "sha": "1" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        assert self.headers["authorization"] == f"Bearer {TOKEN}"
        if self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            self._answer({"url": f"{self.address}/{REPO}", "id": REPO})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({entry["path"]: base64.b64decode(entry["content"]) for entry in added})
            self._answer({"commitUrl": f"{self.address}/{REPO}/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, reply: object) -> None:
        self.paths.append(self.path)
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def test_the_real_client_makes_a_private_repository_and_sends_the_planned_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        planned = upload(folder)
        url = push(planned, update=False, api=HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=TOKEN))
    finally:
        server.shutdown()
        server.server_close()
    assert url.endswith(f"/{REPO}/commit/1") and Stub.created["visibility"] == "private"
    assert Stub.files == {name: (folder / name).read_bytes() for name in planned.files}
    assert sum("/commit/" in path for path in Stub.paths) == 1
