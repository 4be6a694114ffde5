"""A loss that is not finite: the dump, and what running it again says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from components.distill.replay import Finding, replay
from components.errors import AlignTIError, InputError, ModelError
from components.models.checkpoint_folder import record
from components.models.collate import Collator
from components.models.image_processor import Processed
from components.records.models import ModelIndex
from components.records.paths import DUMPS, MODELS
from tests.distill.conftest import write_params
from tests.distill.test_stage import run

START = MODELS / "students/student"


def planted(monkeypatch: pytest.MonkeyPatch, sample_id: str, value: float) -> None:
    """One pixel of one sample's image is `value`."""
    clean = Collator.images

    def images(self: Collator, samples) -> list[Processed]:
        processed = clean(self, samples)
        for i, sample in enumerate(samples):
            if sample.id == sample_id:
                pixels = processed[i].tensors["pixel_values"].clone()
                pixels[0, 0, 0, 0] = value
                processed[i] = Processed(processed[i].texts, {"pixel_values": pixels})
        return processed

    monkeypatch.setattr(Collator, "images", images)


def stopped(arm: str = "align_ti") -> Path:
    """Run an arm into its end; returns the dump that the message names."""
    with pytest.raises(AlignTIError, match=r"step \d: .* is not finite; `alignti replay .runs/dumps/\w+-step-\d`") as caught:
        run(arm)
    return Path(str(caught.value).split("`alignti replay ")[1].split("`")[0])


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_a_nan_pixel_is_traced_to_its_sample_and_terms(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
) -> None:
    write_params(workplace, "distill", {"micro_batch_size": micro_batch_size, "steps": 20})
    planted(monkeypatch, "3-digit", float("nan"))
    dump = stopped()
    assert dump.parent == DUMPS and not list(DUMPS.glob(".*"))
    assert len(list(dump.glob("rank-0-batch-*.safetensors"))) == 4 // micro_batch_size
    *others, last = list(replay(dump))
    assert others == ["pixels of image image-3 are not finite"]
    assert isinstance(last, Finding) and last.sample == "3-digit" and last.precision == "fp32"
    assert {"sft", "kd", "gradient norm"} <= set(last.values)


def test_the_dump_holds_the_weights_from_before_the_step(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(workplace, "distill", {"batch_size": 16, "micro_batch_size": 16})  # all samples: the first step meets it
    planted(monkeypatch, "3-digit", float("inf"))
    dumped = load_file(stopped("kd") / "student.safetensors")
    start = load_file(START / "model.safetensors")
    embedding = next(name for name in dumped if name.endswith("embed_tokens.weight"))
    start_embedding = next(name for name in start if name.endswith("embed_tokens.weight"))
    assert torch.equal(dumped[embedding], start[start_embedding])
    assert all(tensor.isfinite().all() for tensor in dumped.values())


def test_an_infinite_weight_is_named_and_the_cli_prints_it(workplace: Path) -> None:
    weights = load_file(START / "model.safetensors")
    name = next(n for n in weights if n.endswith("embed_tokens.weight"))
    weights[name][:, 0] = float("inf")
    save_file(weights, START / "model.safetensors", metadata={"format": "pt"})
    index = ModelIndex.read(MODELS / "index.json")
    broken = record(START, "student", "embedded", None, index.students["student"].visual_tokens)
    index.model_copy(update={"students": {"student": broken}}).write(MODELS / "index.json")
    dump = stopped("sft")
    findings = [str(finding) for finding in replay(dump)]
    assert any(f.startswith("student's weights before the step") and "embed_tokens.weight" in f for f in findings)
    assert sum("sft is nan" in f for f in findings) == 4, "every sample of the batch"
    from components.cli import app

    printed = CliRunner().invoke(app, ["replay", str(dump)])
    assert printed.exit_code == 0 and findings[-1] in printed.output


def test_a_dump_is_refused_when_its_models_changed_or_it_is_none(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(workplace, "distill", {"batch_size": 16, "micro_batch_size": 16})
    planted(monkeypatch, "3-digit", float("nan"))
    dump = stopped("sft")
    with pytest.raises(InputError, match=r"there is no dump of a step 'nowhere'; there are .runs/dumps/sft-step-1"):
        list(replay(Path("nowhere")))
    about = json.loads((dump / "dump.json").read_text())
    (Path(about["teacher"]["path"]) / "README.md").write_text("another teacher")
    with pytest.raises(ModelError, match=r"the teacher at .* has changed since"):
        list(replay(dump))
