from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub

from components.config.models import Checkpoint
from components.errors import ModelError, TryAgainError
from components.models import download as module
from components.models.download import locate, obtain
from components.models.load import load
from tests.models.conftest import saved, word_processor

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("theirs"), word_processor())
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def test_local_folder_is_copied_without_pickles_code_and_subfolders(local: Path, tmp_path: Path) -> None:
    target = obtain(Checkpoint(source=str(local), revision=None), tmp_path / "teachers" / "theirs")
    expected = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in target.iterdir()} == expected
    assert not (target / "model.safetensors").samefile(local / "model.safetensors")  # a user's own file may change
    load(target, "cpu")


def test_hub_snapshot_is_pinned_filtered_and_linked(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache holds symbolic links to blobs; what comes out are the blobs themselves, taking no room twice."""
    snapshot = tmp_path / "cache" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in (f for f in local.iterdir() if f.is_file()):
        (snapshot / file.name).symlink_to(file)
    request = {}

    def download(source: str, **options) -> str:
        request.update(options, source=source)
        return str(snapshot)

    monkeypatch.setattr(module, "snapshot_download", download)
    target = obtain(Checkpoint(source="org/model", revision=COMMIT), tmp_path / "teachers" / "theirs")
    assert request["source"] == "org/model" and request["revision"] == COMMIT
    assert not any("bin" in p or ".pt" in p or ".py" in p for p in request["allow_patterns"]) and request[
        "ignore_patterns"
    ] == ["*/*"]
    locate(Checkpoint(source="org/model", revision=COMMIT), weights=False)
    assert "*.json" in request["allow_patterns"] and not any("safetensors" in p for p in request["allow_patterns"])
    weights = target / "model.safetensors"
    assert not weights.is_symlink() and weights.samefile(local / "model.safetensors")
    assert not (target / "optimizer.pt").exists()
    load(target, "cpu")


def test_no_link_across_disks_means_a_copy(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: str(local))
    monkeypatch.setattr(module.os, "link", refuse)
    target = obtain(Checkpoint(source="org/model", revision=COMMIT), tmp_path / "theirs")
    assert not (target / "model.safetensors").samefile(local / "model.safetensors")
    load(target, "cpu")


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


FAILURES = {
    "gated": (hub.GatedRepoError("gated", response=response(403)), ModelError, "org/model is gated: accept its terms"),
    "not found": (hub.RepositoryNotFoundError("404", response=response(404)), ModelError, "no such model on the hub"),
    "no revision": (hub.RevisionNotFoundError("404", response=response(404)), ModelError, f"no revision {COMMIT}"),
    "not an id": (hub.HFValidationError("bad id"), ModelError, "no such model on the hub"),
    "no network": (hub.LocalEntryNotFoundError("no network"), TryAgainError, "cannot be reached"),
    "half a cache": (hub.IncompleteSnapshotError("3 files absent", "x"), TryAgainError, "cannot be reached"),
    "server down": (hub.HfHubHTTPError("503", response=response(503)), TryAgainError, "broke off"),
    "reset": (ConnectionResetError("reset by peer"), TryAgainError, "broke off"),
    "reset under hf_xet": (RuntimeError("Task error: CAS Client Error: error sending request"), TryAgainError, "broke off"),
    "no room under hf_xet": (RuntimeError("IO Error: No space left on device (os error 28)"), TryAgainError, "disk is full"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_hub_failures_say_what_to_do(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, kind, message = FAILURES[case]

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(module, "snapshot_download", fail)
    with pytest.raises(kind, match=message) as refusal:
        obtain(Checkpoint(source="org/model", revision=COMMIT), tmp_path / "theirs")
    assert refusal.value.exit_code == (75 if kind is TryAgainError else 2)
    assert not (tmp_path / "theirs").exists()


def test_offline_the_real_hub_client_asks_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(TryAgainError, match="unset HF_HUB_OFFLINE"):
        obtain(Checkpoint(source="org/model", revision=COMMIT), tmp_path / "theirs")


def test_repository_of_pickles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match="pickled ones are not taken"):
        obtain(Checkpoint(source="org/model", revision=COMMIT), tmp_path / "theirs")


def test_local_folders_are_checked(local: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="for a hub id, give its 40-digit commit"):
        obtain(Checkpoint(source="org/model", revision=None), tmp_path / "theirs")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((local / "config.json").read_bytes())
    (half / "model.safetensors").write_bytes((local / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ModelError, match="cut short"):
        obtain(Checkpoint(source=str(half), revision=None), tmp_path / "theirs")
    (half / "model.safetensors").rename(half / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        obtain(Checkpoint(source=str(half), revision=None), tmp_path / "theirs")
