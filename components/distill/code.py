"""Stage `terms`: hashes of the source files that each arm's loss terms import.

python -m components.distill.code     params/study.yaml -> artifacts/terms/ARM.json

`distill@ARM` depends on that file and on the engine's sources, so that a new term makes no other arm stale, and an edit only
the arms that use the term. The same files enter the fingerprint of checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from components.align_ti import terms
from components.config.load import load_settings
from components.io import sha256, whole_folder, write_text
from components.process import exit_from
from components.records.paths import TERMS
from components.tracking.import_graph import ROOT, SHARED, closure, modules

# Modules that only report on a training, and do not change a student's bytes.
REPORTING = tuple(f"components.distill.{name}" for name in ("card", "footprint", "memory", "replay"))


def main() -> None:
    arms = load_settings().study.arms
    with whole_folder(TERMS) as draft:
        for name, arm in arms.items():
            hashes = {path.relative_to(ROOT).as_posix(): sha256([path]) for path in term_files(arm.weights)}
            write_text(draft / f"{name}.json", json.dumps(hashes, indent=2) + "\n")
    print(f"terms: the code of {len(arms)} arms -> {TERMS}")


def term_files(weights: Iterable[str]) -> list[Path]:
    """Source files of these terms and their imports."""
    return _files(f"{terms.__name__}.{name}" for name in terms.computed(weights))


def training_files(weights: Iterable[str]) -> list[Path]:
    """Source files that determine the bytes of a student with these terms."""
    return sorted({*_files(["components.distill.__main__"]), *term_files(weights)})


def _files(names: Iterable[str]) -> list[Path]:
    return sorted({modules()[module] for name in names for module in closure(name, (*SHARED, *REPORTING))})


if __name__ == "__main__":
    exit_from(main)
