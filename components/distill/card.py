"""The model card of a student: what it was made of and how. What varies from run to run (seconds, memory) is in cost.json.

The same inputs give the same bytes: a card is part of what DVC versions, so it names no commit, no time and no machine.
`alignti export` adds what is known later: scores, cost, and how to make it again (components/release/card.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from components.artifacts import DATASET, MODELS, STUDENTS, Manifest, ModelIndex, ModelRecord, Sources

NOT_STATED = "not stated"
START, END = "<!-- everything that decided its weights -->\n```json\n", "\n```\n<!-- end -->\n"


def model_card(arm: str, facts: dict[str, Any]) -> str:
    """The card of `arm`. `facts` is everything that decided its weights; they are read back by `facts_in`.

    Raises DataError if the data set or the models have no records.
    """
    index, manifest = ModelIndex.read(MODELS / "index.json"), Manifest.read(DATASET / "manifest.json")
    teacher, start = index.teachers[facts["teacher"]["name"]], index.students[facts["student"]["name"]]
    title, licence = _of_data(DATASET / "card.md", manifest)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["align-ti", "knowledge-distillation"],
        "base_model": [one.origin for one in (start, teacher) if one.revision is not None],
        "licences_of_inputs": {
            "student before distillation": licence_of(start),
            "teacher": licence_of(teacher),
            "data": licences_of_data(licence),
        },
    }
    named = {key: value for key, value in front.items() if value}
    train = manifest.splits["train"]
    return f"""---
{yaml.safe_dump(named, sort_keys=False, allow_unicode=True, width=120)}---

# {arm}

A student distilled with Align-TI (arXiv 2602.09483): {_loss(facts["arm"]["weights"])}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{(STUDENTS / arm / "model").as_posix()}")
processor = AutoProcessor.from_pretrained("{(STUDENTS / arm / "model").as_posix()}")
```

## What it was made of

| | | licence |
|---|---|---|
| student before distillation | {_described(start)} | {licence_of(start)} |
| teacher | {_described(teacher)} | {licence_of(teacher)} |
| data | {title}: {train.samples:,} training samples about {train.images:,} images, `{manifest.digest[:16]}` | below |

{licence}

## How

- Loss: {_loss(facts["arm"]["weights"])}.
- {_looked(facts)}
- {_steps(facts["distill"])}
- Asked as the chat template in this folder writes it ({facts["template"]["style"]} style).

## Everything that decided its weights

{START}{json.dumps(facts, indent=2, sort_keys=True, default=str)}{END}"""


def facts_in(card: str) -> dict[str, Any]:
    """The facts that `model_card` wrote into this card; none if it is no card of ours."""
    _, found, rest = card.partition(START)
    facts: dict[str, Any] = json.loads(rest.partition(END)[0]) if found else {}
    return facts


def licence_of(model: ModelRecord) -> str:
    """What the front matter of the checkpoint's own README says."""
    if model.origin == "embedded":
        return "built here from nothing"
    readme = Path(model.path) / "README.md"
    parts = readme.read_text(encoding="utf-8").split("---\n", 2) if readme.is_file() else []
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        front = None
    stated = front if isinstance(front, dict) else {}
    named = stated.get("license_name") if stated.get("license") == "other" else None
    return str(named or stated.get("license") or NOT_STATED)


def licences_of_data(licence: str) -> dict[str, str] | str:
    """Of a mixture, each source's; else what the data card says."""
    file = DATASET / "sources.json"
    if file.is_file():
        return {name: source.licence for name, source in Sources.read(file).sources.items()}
    return " ".join(licence.split())


def _of_data(card: Path, manifest: Manifest) -> tuple[str, str]:
    """Title and licence, as the data card has them."""
    if not card.is_file():
        return manifest.source, NOT_STATED
    text = card.read_text(encoding="utf-8")
    licence = text.partition("## Licence\n")[2].partition("\n## ")[0].strip()
    return text.partition("\n")[0].removeprefix("# "), licence or NOT_STATED


def _described(model: ModelRecord) -> str:
    at = f" at `{model.revision[:12]}`" if model.revision else ""
    where = "built and trained here" if model.origin == "embedded" else f"`{model.origin}`{at}"
    return f"`{model.name}`: {where}, {model.parameters / 1e6:,.1f} million parameters"


def _loss(weights: dict[str, float]) -> str:
    return "L = " + " + ".join(f"{'' if w == 1 else f'{w:g} '}L_{term}" for term, w in weights.items() if w)


def _looked(facts: dict[str, Any]) -> str:
    iva = facts["arm"]["iva"]
    if not facts["arm"]["weights"]["iva"]:
        return f"Layer l* of the teacher: {facts['irs_layer']} (not used: no L_iva)."
    how = {
        "irs": f"layer l* = {facts['irs_layer']} of the teacher, the layer search's",
        "layer": f"layer {iva['layer']} of the teacher, as asked",
        "uniform": "no layer: all weigh the same",
    }
    return f"L_iva weighs visual tokens by {how[iva['weighting']]}."


def _steps(distill: dict[str, Any]) -> str:
    trained = [part.replace("_", " ") for part in ("vision_tower", "projector", "language_model") if distill["trainable"][part]]
    lora = distill["trainable"]["lora"]
    with_lora = f" (the language model by LoRA of rank {lora['rank']}, folded in)" if lora else ""
    return (
        f"{distill['steps']:,} steps of {distill['batch_size']} samples, learning rate"
        f" {distill['optimiser']['learning_rate']:g}, {distill['precision']}; trained: {', '.join(trained)}{with_lora}."
    )
