from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from components.cli import look
from components.config.load import load_settings
from components.errors import DataError, InputError, TryAgainError
from components.study import expand
from components.study.compare import compare
from components.study.runs import SCORE, load_runs, read_csv, write_csv
from components.tracking import journal
from components.tracking.mlflow_client import client
from tests.study.test_compare import CELLS, FAMILIES, RUNS


def test_arms_that_only_a_journal_holds_are_sent_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load_settings().runtime.model_copy(update={"tracking_uri": "sqlite:///mlflow.db", "experiment": "align-ti"})
    monkeypatch.chdir(tmp_path)
    client("sqlite:///mlflow.db").create_experiment("align-ti")
    tags = {"stage": "cell", "study": "terms", "cell": "kd-seed1", "variant": "kd", "recipe": "digits"}
    journal.record("cell-kd-seed1", "kd-seed1", runtime=runtime, tags=tags, params={"seed": 1}, metrics={SCORE: 0.5})
    runs = load_runs("sqlite:///mlflow.db", "align-ti", "terms")
    assert [(run.cell, run.recipe) for run in runs] == [("kd-seed1", "digits")]


def test_an_address_without_an_mlflow_is_said_and_not_repeated() -> None:
    with pytest.raises(InputError, match="tracking_uri is journal"):
        load_runs("journal", "x", "terms")
    with pytest.raises(TryAgainError, match="does not answer") as error:
        load_runs("http://me:secret@127.0.0.1:9", "x", "terms")
    assert "secret" not in str(error.value)


def test_a_database_of_an_older_mlflow_is_told_with_the_remedy(tmp_path: Path) -> None:
    opened = client(f"sqlite:///{tmp_path}/new.db")
    opened.create_run(opened.create_experiment("x"))  # a database without runs would be made anew
    shutil.copy(tmp_path / "new.db", tmp_path / "old.db")
    with closing(sqlite3.connect(tmp_path / "old.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '75868b020152'")
    with pytest.raises(TryAgainError, match=r"does not answer .*out-of-date database schema .*mlflow db upgrade"):
        load_runs(f"sqlite:///{tmp_path}/old.db", "x", "terms")


def test_a_csv_of_runs_gives_the_comparison_again(tmp_path: Path) -> None:
    path = tmp_path / "compare.csv"
    runs = [replace(run, recipe="digits") for run in RUNS]
    write_csv(path, runs)
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as spreadsheets do
    assert compare("terms", read_csv(path), CELLS, FAMILIES, 0.95) == compare("terms", runs, CELLS, FAMILIES, 0.95)


def test_the_runs_of_several_csvs_are_compared_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    cells = expand.cells("terms")
    for seed in (1, 2):
        named = zip([cell for cell in cells if cell.arm.seed == seed], RUNS[seed - 1 :: 3], strict=True)
        write_csv(Path(f"{seed}.csv"), [replace(run, cell=cell.name, variant=cell.variant) for cell, run in named])
    look.compare("terms", [Path("1.csv"), Path("2.csv")])
    compared = {run.cell for run in read_csv(Path("reports/studies/terms/compare.csv"))}
    assert compared == {cell.name for cell in cells if cell.arm.seed < 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fingerprint", "print", "line 2: no fingerprint"),
        ("variant", "cell", "line 1: cell heads two columns"),
        ("0.49", "1e308", f"line 2: metrics.{SCORE}: Input should be less than"),
        ("0.49", "half", f"line 2: metrics.{SCORE}: Input should be a valid number"),
        ("0.49", "nan", f"line 2: metrics.{SCORE}: Input should be"),
        ("0.49", "", f"line 2: no metrics.{SCORE}"),
        ("iva0-tpa0-1-0,", "", "line 2: more or fewer cells"),
        ('""abc""', "abc", "line 2: Expecting value"),
        ('"{""kit"": ""alignti"", ""dataset_hash"": ""abc""}"', "[" * 20_000, "line 2: .*recursion"),
        ("0.49", "49", "line 2: exact_match is a share of 1"),
        ('"{""kit"": ""alignti"", ""dataset_hash"": ""abc""}"', "7", "line 2: the fingerprint is no JSON object"),
        ("iva0-tpa0-1-0", "\xff", "compare.csv: .*can't decode"),
        ("iva0-tpa0-1-0", '"a"b', "line 2: .*expected after"),
    ],
)
def test_a_csv_that_is_none_of_runs_is_refused_with_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "compare.csv"
    write_csv(path, RUNS)
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode("latin-1"), 1))
    with pytest.raises(DataError, match=message):
        read_csv(path)


def test_a_csv_without_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "compare.csv").write_text("run_id,cell\n")
    with pytest.raises(DataError, match=r"compare\.csv holds no run"):
        read_csv(tmp_path / "compare.csv")
