"""Model card of a student: inputs and training configuration. Figures that vary from run to run are in cost.json.

Cards are deterministic, since DVC versions them: no commit, no time, no machine. `alignti export` adds scores, cost and
reproduction steps (components/release/card.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from components.records.dataset import Manifest, Sources
from components.records.models import ModelIndex, ModelRecord
from components.records.paths import DATASET, MODELS, STUDENTS

NOT_STATED = "not stated"
START, END = "<!-- everything that decided its weights -->\n```json\n", "\n```\n<!-- end -->\n"


def model_card(arm: str, facts: dict[str, Any]) -> str:
    """Model card of `arm`. `facts` are all inputs that determine its weights.

    Raises DataError if the data set or the models have no records.
    """
    index, manifest = ModelIndex.read(MODELS / "index.json"), Manifest.read(DATASET / "manifest.json")
    models = {"student before it": index.students[facts["student"]["name"]]}
    if facts["teacher"]:
        models["teacher"] = index.teachers[facts["teacher"]["name"]]
    title, licence = _data_title_and_licence(DATASET / "card.md", manifest)
    front_matter = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["align-ti", "knowledge-distillation"],
        "base_model": [model.origin for model in models.values() if model.revision is not None],
        "licences_of_inputs": {
            **{role: licence_of(model) for role, model in models.items()},
            "data": licences_of_data(licence),
        },
    }
    filled = {key: value for key, value in front_matter.items() if value}
    rows = "\n".join(f"| {role} | {_described(model)} | {licence_of(model)} |" for role, model in models.items())
    train, part = manifest.splits["train"], facts["distill"].get("rows")
    samples = f"{train.samples:,} training samples about {train.images:,} images"
    samples += "" if part is None else f", at most {part:,} of them trained on"
    return f"""---
{yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=120)}---

# {arm}

{_summary(facts)}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{(STUDENTS / arm / "model").as_posix()}")
processor = AutoProcessor.from_pretrained("{(STUDENTS / arm / "model").as_posix()}")
```

## What it was made of

| | | licence |
|---|---|---|
{rows}
| data | {title}: {samples}, `{manifest.digest[:16]}` | below |

{licence}

## How

- {_losses(facts)}
- {_steps(facts["distill"])}
- Asked as the chat template in this folder writes it ({facts["template"]["style"]} style).

## Everything that decided its weights

{START}{json.dumps(facts, indent=2, sort_keys=True, default=str)}{END}"""


def licence_of(model: ModelRecord) -> str:
    """Licence from the front matter of the checkpoint's README."""
    if model.origin == "embedded":
        return "built here from nothing"
    readme = Path(model.path) / "README.md"
    try:
        metadata = (metadata_load(readme) if readme.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):  # no mapping, or no YAML
        metadata = {}
    name = metadata.get("license_name") if metadata.get("license") == "other" else None
    return str(name or metadata.get("license") or NOT_STATED)


def licences_of_data(licence: str) -> dict[str, str] | str:
    """Licences of the data: per source for a mixture, else the data card's."""
    file = DATASET / "sources.json"
    if file.is_file():
        return {name: source.licence for name, source in Sources.read(file).sources.items()}
    return " ".join(licence.split())


def _data_title_and_licence(card: Path, manifest: Manifest) -> tuple[str, str]:
    """Title and licence from the data card."""
    if not card.is_file():
        return manifest.source, NOT_STATED
    text = card.read_text(encoding="utf-8", errors="replace")
    licence = text.partition("## Licence\n")[2].partition("\n## ")[0].strip()
    return text.partition("\n")[0].removeprefix("# "), licence or NOT_STATED


def _described(model: ModelRecord) -> str:
    """Model entry of the card. A local folder appears by name only, so that no path of a user's machine is published."""
    revision = f" at `{model.revision[:12]}`" if model.revision else ""
    origin = Path(model.origin).name if Path(model.origin).is_absolute() else model.origin
    location = "built and trained here" if model.origin == "embedded" else f"`{origin}`{revision}"
    return f"`{model.name}`: {location}, {model.parameters:,} parameters"


def _summary(facts: dict[str, Any]) -> str:
    if facts["distill"]["stage"] == "align":
        return "A model that learnt to read its vision tower from captions, before distillation."
    return "A student distilled with Align-TI (arXiv 2602.09483)."


def _losses(facts: dict[str, Any]) -> str:
    """Sentence on the loss: terms with their weights, and the source of the visual weights of L_iva."""
    if facts["distill"]["stage"] == "align":
        return "Loss: cross-entropy on the captions alone."
    weights, iva, layer = facts["arm"]["weights"], facts["arm"]["iva"], facts["irs_layer"]
    terms = " + ".join(f"{'' if weight == 1 else f'{weight:g} '}L_{term}" for term, weight in weights.items())
    selection = facts.get("searched")
    search_note = "" if layer is None else f" (the layer search's l* is {layer})"
    weighting_source = {
        "irs": f"layer l* = {layer} of the teacher, the layer search's",
        "searched": selection and _selection(selection),
        "layer": f"layer {iva['layer']} of the teacher, as asked{search_note}",
        "uniform": f"no layer: all weigh the same{search_note}",
        "gradient": f"what each adds to the teacher's log-probability of the answer{search_note}",
        "entropy": f"the teacher's entropy there{search_note}",
        "divergence": f"KL of the two models there{search_note}",
    }
    rollouts, control = facts["arm"].get("rollouts"), iva.get("change")
    answers_note = " The answers are the teacher's." if facts["arm"].get("answers") else ""
    if rollouts is not None:
        answers_note += f" Of the samples {rollouts['share']:.0%} had an answer that the student wrote."
    if "iva" not in weights:
        return f"Loss: L = {terms}; nothing weighs visual tokens{search_note}.{answers_note}"
    control_note = f"; a control: {control.replace('_', ' ')}" if control else ""
    return f"Loss: L = {terms}. L_iva weighs visual tokens by {weighting_source[iva['weighting']]}{control_note}.{answers_note}"


def _selection(searched: dict[str, Any]) -> str:
    rows = "all instruction rows" if searched["rows"] == "all" else "the question's words"
    return (
        f"{searched['weighting']} attention of the teacher's layer {searched['layer']} over {rows}, as the rule"
        f" `{searched['rule']}` of the layer search picks"
    )


def _steps(distill: dict[str, Any]) -> str:
    trained = [part.replace("_", " ") for part in ("vision_tower", "projector", "language_model") if distill["trainable"][part]]
    lora = distill["trainable"]["lora"]
    with_lora = f" (the language model by LoRA of rank {lora['rank']}, folded in)" if lora else ""
    part_rates = {part.replace("_", " "): rate for part, rate in distill.get("learning_rates", {}).items() if rate is not None}
    rates = "".join(f", {rate:g} for the {part}" for part, rate in part_rates.items())
    return (
        f"{distill['steps']:,} steps of {distill['batch_size']} samples, learning rate"
        f" {distill['optimiser']['learning_rate']:g}{rates}, {distill['precision']}; trained: {', '.join(trained)}{with_lora}."
    )
