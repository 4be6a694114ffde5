"""System metrics of a stage: processor, memory, GPUs, and energy.

A thread samples into the stage's journal, under MLflow's own names `system/...`, so that MLflow's page of system metrics draws
them. Energy is the increase of counters: NVML's of each visible GPU, and RAPL's of each processor package
(https://www.kernel.org/doc/html/latest/power/powercap/powercap.html), which counts all processes of the machine. Without a
readable counter nothing is recorded, and a tag of the run gives the reason.
"""

from __future__ import annotations

import importlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.config.runtime import RuntimeSettings
from components.tracking.journal import Run, warn

SAMPLE_S, FIRST_S = 10, 0.2  # between two samples, and before the first
POWERCAP = Path("/sys/class/powercap")
GPU_WH, CPU_WH = "usage/gpu_wh", "usage/cpu_wh"
CPU_HOURS, DEVICE_HOURS = "usage/cpu_hours", "usage/device_hours"
MJ_PER_WH, UJ_PER_WH, MB = 3.6e6, 3.6e9, 1e6


@dataclass
class Package:
    """RAPL energy counter of one processor package; wraps to 0 after `wraps_uj`. Reading raises OSError."""

    file: Path
    wraps_uj: int
    last_uj: int = field(init=False)
    total_uj: int = 0

    def __post_init__(self) -> None:
        self.last_uj = int(self.file.read_text())

    def read(self) -> None:
        now = int(self.file.read_text())
        self.total_uj += (now - self.last_uj) % (self.wraps_uj + 1)
        self.last_uj = now


class Gpu:
    """NVML counters of one GPU. Reading raises pynvml.NVMLError."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._first_mj = int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def energy_mj(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) - self._first_mj

    def sample(self) -> dict[str, float]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return {
            "utilization_percentage": self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu,
            "memory_usage_megabytes": memory.used / MB,
            "memory_usage_percentage": 100 * memory.used / memory.total,
            "power_usage_watts": self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
        }


def packages() -> tuple[list[Package], str | None]:
    """RAPL counters of the processor packages, or none and the reason."""
    zones = sorted(POWERCAP.glob("intel-rapl:[0-9]*"))  # the name on AMD too; intel-rapl:0:0 is a part of intel-rapl:0
    try:
        counters = [
            Package(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
            for zone in zones
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package")
        ]
    except OSError as error:
        return [], f"not measured: {error.filename} may not be read ({error.strerror})"
    return counters, None if counters else f"not measured: there is no RAPL counter in {POWERCAP}"


def gpus() -> tuple[list[Gpu], str | None]:
    """GPUs visible to this process (CUDA_VISIBLE_DEVICES, else all), or none and the reason."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return [], "not measured: nvidia-ml-py is not installed (pip install -c constraints.txt -e '.[gpu]')"
    try:
        nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(i) for i in range(nvml.nvmlDeviceGetCount())] if visible is None else visible.split(",")
        return [Gpu(nvml, _handle(nvml, name.strip())) for name in names if name.strip()], None
    except nvml.NVMLError as error:
        return [], f"not measured: {error}"


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


class Meter:
    """Samples of system metrics, and the energy used since construction."""

    def __init__(self, gpus: Sequence[Gpu], packages: Sequence[Package]) -> None:
        self._gpus, self._packages = gpus, packages

    def sample(self) -> dict[str, float]:
        """Metrics under MLflow's names. Also reads the RAPL counters, which wrap within minutes to hours."""
        import psutil  # a dependency of accelerate

        for package in self._packages:
            package.read()
        memory = psutil.virtual_memory()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MB,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_usage_megabytes": psutil.Process().memory_info().rss / MB,
        }
        for index, gpu in enumerate(self._gpus):
            values |= {f"system/gpu_{index}_{name}": float(value) for name, value in gpu.sample().items()}
        return values

    def energy(self) -> dict[str, float]:
        """Energy in Wh per available counter."""
        for package in self._packages:
            package.read()
        energy = {}
        if self._gpus:
            energy[GPU_WH] = sum(gpu.energy_mj() for gpu in self._gpus) / MJ_PER_WH
        if self._packages:
            energy[CPU_WH] = sum(package.total_uj for package in self._packages) / UJ_PER_WH
        return energy


@contextmanager
def metered(run: Run, runtime: RuntimeSettings, used: Mapping[str, float]) -> Iterator[None]:
    """Sample into `run` during the block and record its energy at the end, beside what its earlier attempts `used`. A failing
    counter ends the sampling only."""
    gpu_counters, gpu_reason = ([], "not measured: params/runtime.yaml says cpu") if runtime.device == "cpu" else gpus()
    rapl_counters, rapl_reason = packages()
    for key, reason in {"energy.gpu": gpu_reason, "energy.cpu": rapl_reason}.items():
        if reason:
            run.tag(key, reason)
    meter, done = Meter(gpu_counters, rapl_counters), threading.Event()

    def sample_loop() -> None:
        import psutil

        with _warn_on_fault():
            psutil.cpu_percent()  # load since the last call of this thread: 0 at its first
            done.wait(FIRST_S)
            for step in itertools.count():
                run.metrics(meter.sample(), step)
                if done.wait(SAMPLE_S):
                    return

    watcher = threading.Thread(target=sample_loop, name="meter", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        with _warn_on_fault():
            run.metrics({name: wh + used.get(name, 0.0) for name, wh in meter.energy().items()})


@contextmanager
def _warn_on_fault() -> Iterator[None]:
    """Warning for a sampling fault (a GPU off its bus, a vanished file, a hidden process), which does not end the stage."""
    try:
        yield
    except Exception as error:
        warn(f"what this stage uses is no longer sampled: {error}")
