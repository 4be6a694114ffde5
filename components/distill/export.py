"""What a finished arm leaves: a Hugging Face folder that two lines of stock transformers load, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from components.artifacts import Cost, jsonl, write_text
from components.models.load import Loaded
from components.models.template import IMAGE, ChatTemplate, Template


def gathered(accelerator: Accelerator, wrapped: nn.Module) -> dict[str, Tensor] | None:
    """The student's whole weights, by its own names, where they are divided over processes; None where each has them all.

    Every rank calls it; the first gets the weights.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    prefix = "method.student.model."
    return {name.removeprefix(prefix): tensor for name, tensor in accelerator.get_state_dict(wrapped).items()}


def export(
    folder: Path, student: Loaded, template: Template | ChatTemplate, card: str, losses: list[dict[str, float]], cost: Cost
) -> None:
    """Write `folder/model/`, `losses.jsonl` and `cost.json`; the folder gets its name once all of it is there."""
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model = draft / "model"
    student.model.save_pretrained(model, safe_serialization=True)
    asked = template.jinja.replace(IMAGE, student.processor.image_token)
    student.processor.chat_template = asked  # servers and kits then ask as the student was trained
    student.processor.save_pretrained(model)
    write_text(model / "README.md", card)
    write_text(draft / "losses.jsonl", jsonl(losses))
    cost.write(draft / "cost.json")
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


ALIGNED = (
    "A model that learnt to read its vision tower from captions, before distillation: cross-entropy on the captions alone."
)
DISTILLED = """\
A student distilled with Align-TI (arXiv 2602.09483): L = w_sft L_sft + w_kd L_kd + w_iva L_iva + w_tpa L_tpa, with the
weights below."""


def model_card(arm: str, facts: dict[str, Any]) -> str:
    """Deterministic: what varies from run to run (seconds, memory) stands in cost.json."""
    settings = json.dumps(facts, indent=2, sort_keys=True, default=str)
    made = ALIGNED if facts["distill"]["stage"] == "align" else DISTILLED
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [align-ti, knowledge-distillation]
---

# {arm}

{made} Scores with intervals are in `reports/compare.md` of the repository that made it.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{arm}/model")
processor = AutoProcessor.from_pretrained("{arm}/model")
```

Everything that decided its weights:

```json
{settings}
```
"""
