"""Origin of a comparison, as its report states it: recipe, commit, date, data set, machine and software.

Printed in report.html and samples.html only: compare.json and compare.md are byte-identical on every run over the same scores.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from components.records.dataset import Manifest
from components.records.paths import DATASET
from components.tracking import provenance
from components.tracking.stage_run import nearest_recipe

CPUINFO = Path("/proc/cpuinfo")


def facts(devices: Iterable[str]) -> dict[str, str]:
    """Name -> value of each fact, for the current folder; `devices`: device kinds from the arms' cost records."""
    tags = provenance.commit_tags()
    commit = tags["mlflow.source.git.commit"][:8] + (", with uncommitted changes" if tags.get("git.dirty") == "true" else "")
    data = Manifest.read(DATASET / "manifest.json")
    split_sizes = (f"{name} {split.samples:,} questions about {split.images:,} images" for name, split in data.splits.items())
    return {
        "recipe": nearest_recipe().tag.get("recipe", "none of params/recipes"),
        "commit": commit,
        "compared": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "data": f"{data.source}, digest {data.digest[:8]}: {', '.join(split_sizes)}",
        "machine": f"{machine()}; arms trained on {' and '.join(sorted(set(devices)))}",
        "software": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
    }


def machine() -> str:
    """CPU model and core count, then the visible GPUs."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([cpu, *(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))])
