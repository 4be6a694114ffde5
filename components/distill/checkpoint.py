"""Training checkpoints, outside DVC's outs: atomic writes; resume only under an equal fingerprint, for equal bytes."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from accelerate.utils import DistributedType

from components.errors import InputError
from components.io import write_text
from components.models.checkpoint_folder import as_model_error
from components.process import locked
from components.records.paths import RUNS

# accelerate warns at every checkpoint that tied weights are stored once, which is intended (the resume test compares bytes).
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one arm at one fingerprint, in `.runs/distill/ARM/FINGERPRINT/step-N/`.

    A checkpoint depends on the sharding of the weights (`layout`), but on the number of processes only under DeepSpeed.
    """

    folder: Path

    @classmethod
    @contextmanager
    def of(cls, arm: str, fingerprint: str, main: bool = True) -> Iterator[Self]:
        """Checkpoints under a lock, which the main process holds. Raises TryAgainError if another training holds it."""
        folder = RUNS / "distill" / arm / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", "another process is training this arm") if main else nullcontext():
            yield cls(folder)

    def latest(self) -> Path | None:
        """Newest complete checkpoint, None without one; folders are renamed into place after their last write."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, accelerator: Accelerator, progress: dict[str, Any]) -> None:
        """Save the state at `progress["step"]` and delete older checkpoints. Collective: every rank calls it."""
        final = self.folder / f"step-{progress['step']:08d}"
        with collective_draft(accelerator, final) as draft:
            accelerator.save_state(str(draft))
            if accelerator.is_main_process:
                write_text(draft / "progress.json", json.dumps({**progress, "layout": layout(accelerator)}))
        if accelerator.is_main_process:
            for older in [path for path in self.folder.glob("step-*") if path != final]:
                shutil.rmtree(older)

    @staticmethod
    def restore(accelerator: Accelerator, path: Path) -> dict[str, Any]:
        """Load the state at `path` and return its progress. Raises InputError if it was saved under another `layout`, or is
        damaged."""
        with as_model_error(f"{path} is damaged, so delete {path.parent} to begin anew"):
            progress: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            saved, current = progress.pop("layout"), layout(accelerator)
            if saved != current:
                raise InputError(
                    f"{path} was saved under {saved}, and this is {current}: go on as it began (`devices`, `accelerate` in"
                    f" params/runtime.yaml), or delete {path.parent} to begin anew"
                )
            if not zipfile.is_zipfile(path / "random_states_0.pkl"):  # accelerate goes on without it
                raise ValueError(f"{path}/random_states_0.pkl is missing or cut off")
            accelerator.load_state(str(path))
            return progress

    def clear(self) -> None:
        """Delete all checkpoints, after the export."""
        for path in (*self.folder.glob("step-*"), *self.folder.glob(".step-*")):
            shutil.rmtree(path)


@contextmanager
def collective_draft(accelerator: Accelerator, folder: Path) -> Iterator[Path]:
    """Draft into which every rank writes; the main process then moves it to `folder`. Collective."""
    draft = folder.with_name(f".{folder.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield draft
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    accelerator.wait_for_everyone()


def layout(accelerator: Accelerator) -> str:
    """Format of the weights on disk: whole (one process or DDP), FSDP, or DeepSpeed shards per process."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed on {accelerator.num_processes} processes"
    return "FSDP" if accelerator.distributed_type == DistributedType.FSDP else "whole weights"
