"""Which two models can be teacher and student, and which folders are refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.config.models import Template as TemplateSettings
from components.errors import ModelError
from components.models.families import FAMILIES, family_of, parts
from components.models.load import check_images, check_kind, check_pair, check_same_template, load
from components.models.template import Template
from tests.families import toy
from tests.families.table import CHECKS

TEMPLATE = TemplateSettings(style="processor", system="")


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_two_sizes_of_one_family_share_the_vocabulary(family: str) -> None:
    teacher = load(toy.folder(family, 1, 3), "cpu")
    student = toy.loaded(family)
    assert check_pair(teacher, student) == student.vocabulary < teacher.vocabulary


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_quantised_teacher_keeps_head_tower_and_projector_in_float(family: str) -> None:
    model = toy.loaded(family).model
    skipped = {*FAMILIES[family].unquantised}
    unquantised = {id(p) for name, p in model.named_parameters() if skipped & set(name.split("."))}
    held = parts(model)
    head = model.get_output_embeddings().weight
    assert unquantised >= {id(p) for part in ("vision_tower", "projector") for p in held[part]}
    assert unquantised & {id(p) for p in held["language_model"]} <= {id(head)}


def test_families_that_agree_by_vocabulary_and_pixels_are_a_pair() -> None:
    idefics, smolvlm = toy.loaded("idefics3"), toy.loaded("smolvlm")
    assert check_pair(idefics, smolvlm) == smolvlm.vocabulary
    check_same_template(idefics, smolvlm, TEMPLATE)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ("llava_next", "llava_onevision", "disagree, first at id|is .* and .*; both read"),
        ("llava_next", "qwen2_vl", "visual tokens per image"),
        ("llava", "paligemma", "tokenizers disagree"),
    ],
)
def test_families_that_do_not_agree_are_refused(teacher: str, student: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_pair(toy.loaded(teacher), toy.loaded(student))


def test_different_chat_templates_are_refused_only_where_they_are_used() -> None:
    pair = toy.loaded("qwen2_vl"), toy.loaded("internvl")
    with pytest.raises(ModelError, match="write one conversation differently"):
        check_same_template(*pair, TEMPLATE)
    check_same_template(*pair, TemplateSettings(style="vicuna", system=""))


def test_the_table_of_families_is_whole() -> None:
    assert list(toy.FAMILIES) == list(FAMILIES)
    assert all(find_spec(f"tests.families.test_{name}") for name in CHECKS)
    for family in toy.FAMILIES:
        assert toy.loaded(family).model.config.model_type == family


def test_another_type_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"models of type 'blip-2' are not supported.*llava_next"):
        family_of(SimpleNamespace(model_type="blip-2", name_or_path="somewhere"))


def edited(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    parts = {key: config[key] | value for key, value in changes.items() if isinstance(config.get(key), dict)}
    path.write_text(json.dumps(config | changes | parts))


def stored_as(kind: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({key: w.to(kind) for key, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})

    return change


UNUSABLE = "cannot be opened as an image-text model"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another number of image tokens": (
        lambda f: edited(f / "processor_config.json", image_seq_length=9),
        r"its processor writes \d+ image tokens for 64 x 64 pixels, and the model makes \d+ features",
    ),
    "another image token": (lambda f: edited(f / "config.json", image_token_id=3), "the image token is missing on one side"),
    "quantised": (lambda f: edited(f / "config.json", quantization_config={"quant_method": "awq"}), r"are quantised \(awq\)"),
    "float8": (stored_as(torch.float8_e4m3fn), "in F8_E4M3: weights are read in F64, F32, F16, BF16"),
    "a dtype that torch has not": (
        lambda f: edited(f / "config.json", dtype="float31"),
        "config.json cannot be read: .*'float31'",
    ),
    "another number of heads": (lambda f: edited(f / "config.json", text_config={"num_attention_heads": 3}), UNUSABLE),
    "another vocabulary": (lambda f: edited(f / "config.json", text_config={"vocab_size": 10}), UNUSABLE),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a type that is not supported": (lambda f: edited(f / "config.json", model_type="blip-2"), "'blip-2' are not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_get_one_sentence(case: str, tmp_path: Path) -> None:
    damage, message = BAD[case]
    folder = shutil.copytree(toy.folder("internvl"), tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message) as refusal:
        check_kind(folder)
        check_images(load(folder, "cpu"))
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_weights_in_half_precision_are_read_as_asked(tmp_path: Path) -> None:
    folder = shutil.copytree(toy.folder("internvl"), tmp_path / "model")
    stored_as(torch.float16)(folder)
    assert load(folder, "cpu").model.dtype == torch.float32


@pytest.mark.parametrize("style", ["vicuna", "processor"])
def test_a_sample_is_spelt_out_for_the_log(style: Any) -> None:
    text = toy.collator("qwen2_vl", style=style).decoded_text(toy.SAMPLES[0])
    assert "around 8 visual tokens" in text and text.endswith("red one<|im_end|>'") and "what digit ?" in text


def test_a_mask_without_the_answers_end_is_refused() -> None:
    collator = toy.Collator(toy.loaded("qwen2_vl").processor, Template(""), 400, train=True)
    collator.eos_id = 5
    with pytest.raises(ModelError, match="do not go together"):
        collator.decoded_text(toy.SAMPLES[0])
