from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import devices


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(devices, "PAUSE_S", 0.05)
    monkeypatch.setenv(devices.VISIBLE, "0,1")


def test_each_holder_sees_a_gpu_of_its_own() -> None:
    with devices.lock_gpu() as first, devices.lock_gpu() as second:
        assert [environment[devices.VISIBLE] for environment in (first, second)] == ["0", "1"]
    with devices.lock_gpu() as again:
        assert again == first


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", " -1,0"])
def test_without_gpus_nothing_is_held(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, visible)
    with devices.lock_gpu() as first, devices.lock_gpu() as second:
        assert first == second == {}


def test_a_killed_holder_frees_its_gpu(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from flows import devices\n"
        f"devices.LOCKS = Path({str(tmp_path / 'locks')!r})\n"
        "with devices.lock_gpu() as held: print(held['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert holder.stdout is not None and holder.stdout.readline() == b"0\n"
    with devices.lock_gpu() as environment:
        assert environment[devices.VISIBLE] == "1"
    holder.kill()
    holder.communicate()
    with devices.lock_gpu() as environment:
        assert environment[devices.VISIBLE] == "0"


def test_a_training_that_outlives_its_flow_keeps_its_gpu_until_it_ends() -> None:
    code = "import time; from components.process import share_lock\nshare_lock(); print('held', flush=True); time.sleep(600)"
    with devices.lock_gpu() as given:
        assert given[devices.VISIBLE] == "0"
        training = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env={**os.environ, **given}
        )
        assert training.stdout is not None and training.stdout.readline() == b"held\n"
    with devices.lock_gpu() as environment:  # the flow is gone, the training is not
        assert environment[devices.VISIBLE] == "1"
    training.kill()
    training.communicate()
    with devices.lock_gpu() as environment:
        assert environment[devices.VISIBLE] == "0"
