"""Export of a trained arm: a Hugging Face model folder for stock transformers, with a model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from components.io import whole_folder, write_text
from components.models.chat_template import ChatTemplate
from components.models.load import Loaded
from components.models.template import IMAGE, Template
from components.records.distill import Cost
from components.records.record import jsonl


def gathered(accelerator: Accelerator, wrapped: nn.Module) -> dict[str, Tensor] | None:
    """Full state dict of a student sharded by FSDP or DeepSpeed, with the student's own keys; None for unsharded weights.

    Collective: every rank calls it; the main process gets the weights.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    prefix = "method.student.model."
    state = accelerator.get_state_dict(wrapped).items()  # student, and trained modules of terms
    return {name.removeprefix(prefix): tensor for name, tensor in state if name.startswith(prefix)}


def export(
    folder: Path, student: Loaded, template: Template | ChatTemplate, card: str, losses: list[dict[str, float]], cost: Cost
) -> None:
    """Write `folder/model/`, `losses.jsonl` and `cost.json` atomically.

    Raises TryAgainError if the disk is full; no partial output remains.
    """
    with whole_folder(folder) as draft:
        save(draft / "model", student, template, card)
        write_text(draft / "losses.jsonl", jsonl(losses))
        cost.write(draft / "cost.json")


def save(folder: Path, student: Loaded, template: Template | ChatTemplate, card: str, **save_options: Any) -> None:
    """Write the model folder: weights, processor, chat template and card. `save_options`: of `save_pretrained`."""
    student.model.save_pretrained(folder, safe_serialization=True, **save_options)
    _generation_config(student, template.eos).to_json_file(folder / "generation_config.json")
    chat_template = template.jinja.replace(IMAGE, student.processor.image_token)
    student.processor.chat_template = chat_template  # training template, for servers and evaluation kits
    student.processor.save_pretrained(folder)
    write_text(folder / "README.md", card)
    for weights in folder.glob("*.safetensors"):  # written for their owner alone, whatever the umask
        weights.chmod((folder / "README.md").stat().st_mode)


def _generation_config(student: Loaded, eos: str) -> Any:
    """Generation config with the token that ends every answer, where servers look: a base model's lacks it.

    `save_pretrained` writes no changed one with flags that transformers reads and ignores, as released ones have (a temperature
    without do_sample).
    """
    config, eos_id = copy.copy(student.model.generation_config), student.processor.tokenizer.convert_tokens_to_ids(eos)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if eos_id not in ends:
        config.eos_token_id = [eos_id, *(end for end in ends if end is not None)]
    return config
