import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from components.digits import raw
from components.errors import DataError
from tests.dataset.conftest import REPOSITORY


def test_what_is_written_is_what_scikit_learn_ships(raw_folder: Path) -> None:
    drawings, labels = raw.read(raw_folder)
    digits = load_digits()
    assert np.array_equal(drawings, digits.images)
    assert np.array_equal(labels, digits.target)
    assert sum(path.stat().st_size for path in raw_folder.iterdir()) < 400 * 2**10
    assert "Alpaydin" in (raw_folder / "ATTRIBUTION").read_text()
    assert "CC BY 4.0" in (raw_folder / "LICENSE-DATA").read_text()


def test_a_fresh_clone_pulls_these_bytes_from_the_remote_inside_the_repository(tmp_path: Path, raw_folder: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".dvc").mkdir(parents=True)
    shutil.copy(REPOSITORY / ".dvc" / "config", clone / ".dvc")
    shutil.copy(REPOSITORY / "data.dvc", clone)
    shutil.copytree(REPOSITORY / ".dvc-remote", clone / ".dvc-remote")
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    environment = os.environ | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_NO_ANALYTICS": "1"}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")  # nobody listens
    subprocess.run([sys.executable, "-m", "dvc", "pull", "-q", "data.dvc"], cwd=clone, env=environment, check=True, timeout=60)
    for file in raw_folder.iterdir():
        assert (clone / "data" / file.name).read_bytes() == file.read_bytes()


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make data"):
        raw.read(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(",16,", ",17,", 1),
        lambda text: text.replace("\n3,", "\n13,", 1),
        lambda text: text.replace(",5,", ",x,", 1),
        lambda text: text.replace(",5,", f",{10**20},", 1),
    ],
    ids=["empty", "cut", "too bright", "no digit", "no number", "too large a number"],
)
def test_a_damaged_file_says_how_to_get_it_back(tmp_path: Path, raw_folder: Path, damage: Callable[[str], str]) -> None:
    (tmp_path / raw.FILE).write_text(damage((raw_folder / raw.FILE).read_text()))
    with pytest.raises(DataError, match="dvc checkout"):
        raw.read(tmp_path)


def test_a_folder_in_its_place_says_how_to_get_it_back(tmp_path: Path) -> None:
    (tmp_path / raw.FILE).mkdir()
    with pytest.raises(DataError, match="dvc checkout"):
        raw.read(tmp_path)
