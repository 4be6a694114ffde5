"""The meter against counters made up: files laid out as Linux's powercap has them, and a module that answers as pynvml does."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.config.runtime import RuntimeSettings
from components.tracking import history, system_metrics
from components.tracking.journal import JOURNALS
from components.tracking.stage_run import JOURNAL_ONLY, stage_run
from tests.tracking.test_tracking import REST

RUNTIME = RuntimeSettings(tracking_uri=JOURNAL_ONLY, **{**REST, "device": "auto", "devices": 2})
WRAP = 262_143_328_850


class NVMLError(Exception):
    """As pynvml's."""


class Nvml:
    """Two GPUs; each reading of a counter finds 7,200 J more."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.millijoules = {0: 1_000_000, 1: 5_000_000}
        self.broken = False

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid != "GPU-one":
            raise NVMLError("Not Found")
        return 1

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.broken:
            raise NVMLError("GPU is lost")
        self.millijoules[handle] += 7_200_000
        return self.millijoules[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=2_000_000, total=8_000_000)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=40 + handle)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return 150_000


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, a part of one, and a zone that is no package."""
    root = tmp_path / "powercap"
    zones = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"}
    for zone, name in zones.items():
        (root / zone).mkdir(parents=True)
        (root / zone / "name").write_text(f"{name}\n")
        (root / zone / "energy_uj").write_text(f"{WRAP - 3_600_000_000}\n")
        (root / zone / "max_energy_range_uj").write_text(f"{WRAP}\n")
    monkeypatch.setattr(system_metrics, "POWERCAP", root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("components.config.recipes.nearest", lambda: ("digits", 0))
    return root


def gains(root: Path, zone: str, microjoules: int) -> None:
    file = root / zone / "energy_uj"
    file.write_text(f"{(int(file.read_text()) + microjoules) % (WRAP + 1)}\n")


def test_energy_of_packages_is_counted_past_their_wrap_and_parts_not_twice(powercap: Path) -> None:
    packages, why = system_metrics.packages()
    assert len(packages) == 2 and why is None
    measured = system_metrics.Meter([], packages)
    assert measured.energy() == {system_metrics.CPU_WH: 0}
    gains(powercap, "intel-rapl:0", 7_200_000_000)  # over the end
    gains(powercap, "intel-rapl:1", 1_800_000_000)
    assert measured.energy()[system_metrics.CPU_WH] == pytest.approx(2.5)
    gains(powercap, "intel-rapl:0", 3_600_000_000)
    measured.sample()
    gains(powercap, "intel-rapl:0", 3_600_000_000)
    assert measured.energy()[system_metrics.CPU_WH] == pytest.approx(4.5)


@pytest.mark.parametrize(("visible", "expected"), [(None, [40, 41]), ("1", [41]), ("GPU-one, 0", [41, 40]), ("", [])])
def test_the_gpus_that_the_stage_sees(visible: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    gpus, why = system_metrics.gpus()
    assert why is None
    assert [gpu.sample()["utilization_percentage"] for gpu in gpus] == expected
    measured = system_metrics.Meter(gpus, [])
    assert measured.energy() == ({system_metrics.GPU_WH: pytest.approx(2.0 * len(expected))} if expected else {})
    sampled = {name for name in measured.sample() if name.startswith("system/gpu_")}
    assert len(sampled) == 4 * len(expected)


@pytest.mark.parametrize("name", ["GPU-gone", "MIG-1"])
def test_a_gpu_that_nvml_does_not_know_is_not_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert system_metrics.gpus() == ([], "not measured: Not Found")


def stage(monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None, during: Any = lambda: None) -> list[dict[str, Any]]:
    """The journal of a stage during which at least three samples are taken."""
    taken = threading.Semaphore(0)
    sample = system_metrics.Meter.sample

    def counted(self: system_metrics.Meter) -> dict[str, float]:
        try:
            return sample(self)
        finally:
            taken.release()

    monkeypatch.setattr(system_metrics.Meter, "sample", counted)
    monkeypatch.setattr(system_metrics, "SAMPLE_S", 0.01)
    if nvml:
        monkeypatch.setattr(system_metrics.importlib, "import_module", lambda _: nvml)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with stage_run("distill", cell="a", runtime=RUNTIME):
        assert taken.acquire(timeout=60)
        during()
        for _ in range(2 if not (nvml and nvml.broken) else 0):
            assert taken.acquire(timeout=60)
    (journal,) = JOURNALS.glob("*.jsonl")
    return [json.loads(line) for line in journal.read_text().splitlines()]


def final_metrics(events: list[dict[str, Any]]) -> dict[str, float]:
    return {k: v for e in events if e["event"] == "metrics" and e["step"] is None for k, v in e["values"].items()}


def test_a_stage_records_what_it_used(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = itertools.chain([0.0], itertools.repeat(50.0))  # psutil's first value means nothing
    monkeypatch.setattr("psutil.cpu_percent", lambda: next(loads))
    events = stage(monkeypatch, Nvml(), lambda: gains(powercap, "intel-rapl:1", 3_600_000_000))
    samples = [e for e in events if e["event"] == "metrics" and "system/gpu_1_power_usage_watts" in e["values"]]
    assert [e["step"] for e in samples] == list(range(len(samples))) and len(samples) >= 3
    assert samples[0]["values"]["system/gpu_0_memory_usage_percentage"] == 25
    assert 0 < samples[0]["values"]["system/process_memory_usage_megabytes"] < 1e6
    assert samples[0]["values"]["system/cpu_utilization_percentage"] == 50
    final = final_metrics(events)
    assert final[system_metrics.CPU_WH] == pytest.approx(1.0)
    assert final[system_metrics.GPU_WH] == pytest.approx(4.0)
    assert final[system_metrics.DEVICE_HOURS] == pytest.approx(2 * final["seconds"] / 3600)
    assert not any(name.startswith(("best/", "final/")) for name in final)
    last = history.last("distill@a")
    assert last is not None and history.energy(last.run) == {
        system_metrics.CPU_WH: final[system_metrics.CPU_WH],
        system_metrics.GPU_WH: final[system_metrics.GPU_WH],
    }
    assert history.energy("of-another-machine") == {}


def test_without_counters_nothing_is_recorded_and_a_tag_says_why(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energy = powercap / "intel-rapl:1/energy_uj"
    energy.unlink()
    events = stage(monkeypatch, None)
    tags = {e["key"]: e["value"] for e in events if e["event"] == "tag"}
    assert tags["energy.cpu"] == f"not measured: {energy} may not be read (No such file or directory)"
    assert tags["energy.gpu"].startswith("not measured: ")
    assert not {system_metrics.CPU_WH, system_metrics.GPU_WH} & set(final_metrics(events))


def test_a_gpu_that_is_lost_ends_the_samples_and_not_the_stage(
    powercap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml = Nvml()
    events = stage(monkeypatch, nvml, lambda: setattr(nvml, "broken", True))
    assert events[-1] == {**events[-1], "event": "end", "status": "FINISHED"}
    assert system_metrics.GPU_WH not in final_metrics(events)
    assert "no longer sampled: GPU is lost" in capsys.readouterr().err


def test_a_flow_is_not_metered_its_stages_are(powercap: Path) -> None:
    with stage_run("pipeline", runtime=RUNTIME, metered=False):
        pass
    (journal,) = JOURNALS.glob("*.jsonl")
    assert "system/" not in journal.read_text() and system_metrics.DEVICE_HOURS not in journal.read_text()
