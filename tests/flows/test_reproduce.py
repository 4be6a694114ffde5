"""How a run is named for `alignti reproduce`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from components.errors import DataError, InputError
from flows import reproduce

FROM_JOURNAL = reproduce._from_journal
SETTINGS: Any = SimpleNamespace(runtime=SimpleNamespace(tracking_uri="sqlite:///.mlflow/mlflow.db"))


@pytest.fixture(autouse=True)
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / ".runs/journal"
    folder.mkdir(parents=True)
    (folder / "1-kd.jsonl").touch()
    (folder / "1-kd.sent").write_text('{"run_id": "0123"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "_from_journal", lambda _run, journal, _settings: journal.name)
    return folder


@pytest.mark.parametrize("name", ["1-kd", "1-kd.jsonl", "1-kd.sent", ".runs/journal/1-kd.jsonl", "0123"])
def test_a_run_is_found_by_its_id_and_by_each_of_its_files(name: str) -> None:
    assert reproduce.find(name, SETTINGS) == "1-kd.jsonl"


def test_a_name_that_is_no_id_is_not_asked_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce.mlflow_client, "client", lambda _: pytest.fail("asked"))
    with pytest.raises(InputError, match=r"there is no run '1-kt' in .runs/journal; did you mean '1-kd'\? `alignti runs` l"):
        reproduce.find("1-kt", SETTINGS)


@pytest.mark.parametrize("code", ["RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"])
def test_a_name_that_is_nobodys_is_a_mistake_and_no_fault_of_mlflows(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("no", error_code=getattr(__import__("mlflow").protos.databricks_pb2, code))

    monkeypatch.setattr(reproduce.mlflow_client, "client", lambda _: None)
    monkeypatch.setattr(reproduce, "_from_mlflow", refuse)
    with pytest.raises(InputError, match=r"neither .runs/journal nor MLflow has a run 0123456789abcdef0123456789abcdef$"):
        reproduce.find("0123456789abcdef" * 2, SETTINGS)


@pytest.mark.parametrize(
    ("journal", "error", "message"),
    [
        ("", InputError, "cannot be reproduced"),  # killed before it wrote a word
        ('{"event": "start", "tags": {}}\n{"event": "ta', InputError, "cannot be reproduced"),  # and amid one
        ('{"event": "start", "tags": {}}\nnoise\n', DataError, "1-kd.jsonl holds a line that is no event"),
    ],
)
def test_a_journal_that_is_cut_off_or_damaged_ends_in_a_sentence(
    journals: Path, journal: str, error: type[Exception], message: str
) -> None:
    (journals / "1-kd.jsonl").write_text(journal)
    with pytest.raises(error, match=message):
        FROM_JOURNAL("1-kd", journals / "1-kd.jsonl", SETTINGS)
