from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from components.errors import InputError
from flows import dvc, raw_data

OWN_ROWS = Path("data/mine/rows.json")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose data.dvc names two files that are in the remote, and neither here nor in the cache."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("digits.csv", "LICENSE"):
        Path("data", name).write_text(name)
    (tmp_path / "remote").mkdir()
    for args in (
        ["init", "--no-scm", "-q"],
        ["remote", "add", "--default", "theirs", "remote"],
        ["add", "-q", "data"],
        ["push", "-q"],
    ):
        subprocess.run([*dvc.DVC, *args], check=True, capture_output=True)
    subprocess.run(["rm", "-r", "data", ".dvc/cache"], check=True)
    return tmp_path


def test_what_data_dvc_records_comes_and_nothing_is_recorded_anew(fresh: Path) -> None:
    recorded = (fresh / "data.dvc").read_text()
    raw_data.main()
    assert sorted(path.name for path in (fresh / "data").iterdir()) == ["LICENSE", "digits.csv"]
    raw_data.main()
    assert (fresh / "data.dvc").read_text() == recorded


def test_rows_of_ones_own_are_recorded_beside_what_was_never_pulled(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OWN_ROWS.parent.mkdir(parents=True)
    OWN_ROWS.write_text("[]")
    raw_data.main()
    assert "data.dvc now records 1 new file of data/, such as data/mine/rows.json: commit it" in capsys.readouterr().out
    assert OWN_ROWS.read_text() == "[]"
    assert (fresh / "data/digits.csv").read_text() == "digits.csv"
    assert "nfiles: 3" in (fresh / "data.dvc").read_text()
    raw_data.main()
    assert capsys.readouterr().out == ""


def test_a_change_is_neither_recorded_nor_dropped(fresh: Path) -> None:
    raw_data.main()
    recorded = (fresh / "data.dvc").read_text()
    (fresh / "data/digits.csv").write_text("changed")
    (fresh / "data/LICENSE").unlink()
    with pytest.raises(
        InputError, match=r"1 changed file: data/digits\.csv; `dvc add data` .*`dvc checkout --force data/digits\.csv`"
    ):
        raw_data.main()
    assert (fresh / "data/digits.csv").read_text() == "changed"
    assert (fresh / "data/LICENSE").is_file()
    assert (fresh / "data.dvc").read_text() == recorded


def test_what_the_remote_lacks_is_an_input_error_and_nothing_is_recorded(fresh: Path) -> None:
    recorded = (fresh / "data.dvc").read_text()
    OWN_ROWS.parent.mkdir(parents=True)
    OWN_ROWS.write_text("[]")
    (fresh / "remote").rename(fresh / "away")
    with pytest.raises(InputError, match=r"no DVC remote has what data\.dvc records"):
        raw_data.main()
    (fresh / "away").rename(fresh / "remote")
    next(path for path in (fresh / "remote/files/md5").rglob("*") if path.is_file() and path.suffix != ".dir").unlink()
    with pytest.raises(InputError, match=r"`dvc fetch data\.dvc` failed"):
        raw_data.main()
    assert (fresh / "data.dvc").read_text() == recorded
