"""Output of a finished arm: a Hugging Face folder that stock transformers loads, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from components.io import whole_folder, write_text
from components.models.load import Loaded
from components.models.template import IMAGE, ChatTemplate, Template
from components.records.distill import Cost
from components.records.record import jsonl


def gathered(accelerator: Accelerator, wrapped: nn.Module) -> dict[str, Tensor] | None:
    """The student's whole weights, by its own names, where they are divided over processes; None where each has them all.

    Every rank calls it; the first gets the weights.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    prefix = "method.student.model."
    state = accelerator.get_state_dict(wrapped).items()  # of the student, and of terms that train a module of their own
    return {name.removeprefix(prefix): tensor for name, tensor in state if name.startswith(prefix)}


def export(
    folder: Path, student: Loaded, template: Template | ChatTemplate, card: str, losses: list[dict[str, float]], cost: Cost
) -> None:
    """Write `folder/model/`, `losses.jsonl` and `cost.json`; the folder gets its name once all of it is there.

    Raises TryAgainError if the disk is full; nothing half-written is left.
    """
    with whole_folder(folder) as draft:
        save(draft / "model", student, template, card)
        write_text(draft / "losses.jsonl", jsonl(losses))
        cost.write(draft / "cost.json")


def save(folder: Path, student: Loaded, template: Template | ChatTemplate, card: str, **how: Any) -> None:
    """The model's folder. `how`: options of `save_pretrained`."""
    student.model.save_pretrained(folder, safe_serialization=True, **how)
    asked = template.jinja.replace(IMAGE, student.processor.image_token)
    student.processor.chat_template = asked  # servers and kits then ask as the student was trained
    student.processor.save_pretrained(folder)
    write_text(folder / "README.md", card)
