"""TinyLLaVA folders against a forward pass as theirs is: the tower's layer, its tokens, the projector, the language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from components.config.models import Checkpoint
from components.errors import ModelError
from components.models.__main__ import obtain_member
from components.models.collate import Collator
from components.models.load import check_images, load
from components.models.template import Template
from components.models.vlm import VLM
from tests.families.parts import qwen_folder, siglip_folder
from tests.models.conftest import sample

HIDDEN = 32


def tinyllava_folder(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, Any]:
    """As TinyLLaVA Factory saves one, and its parts."""
    language_folder = qwen_folder(folder / "qwen", tied=tied, hidden=HIDDEN)
    language = tf.AutoModelForCausalLM.from_pretrained(language_folder)
    tower = tf.SiglipVisionModel.from_pretrained(siglip_folder(folder / "siglip", with_text=False))
    width = tower.config.hidden_size
    projector = torch.nn.Sequential(torch.nn.Linear(width, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    target = folder / "tinyllava"
    tf.AutoTokenizer.from_pretrained(language_folder).save_pretrained(target)
    names = {
        "language_model.": load_file(language_folder / "model.safetensors"),  # without the head where it is tied
        "vision_tower._vision_tower.": load_file(folder / "siglip/model.safetensors"),
        "connector._connector.": projector.state_dict(),
    }
    weights = {prefix + name: w.to(dtype).contiguous() for prefix, some in names.items() for name, w in some.items()}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    content = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "image_aspect_ratio": "square",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "text_config": language.config.to_diff_dict() | {"model_type": "qwen2"},
        "vision_config": tower.config.to_diff_dict() | {"model_type": "siglip_vision_model"},
    }
    (target / "config.json").write_text(json.dumps(content | config))
    return target, (tower, projector, language)


def obtain(source: Path, target: Path) -> Path:
    return obtain_member(Checkpoint(source=str(source), revision=None), target, "")


@pytest.mark.parametrize(("strategy", "first"), [("patch", 1), ("cls_patch", 0)])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_it_says_what_tinyllava_says(tied: bool, strategy: str, first: int, tmp_path: Path) -> None:
    source, (tower, projector, language) = tinyllava_folder(tmp_path, tied, vision_feature_select_strategy=strategy)
    loaded = load(obtain(source, tmp_path / "teachers/it"), "cpu")
    check_images(loaded)
    batch = Collator(loaded.processor, Template(""), 200, train=True)([sample(("what digit ?", "two"))])
    assert int(batch.visual.sum()) == 4 - first
    view = VLM(loaded.model)
    logits = view.head(view.plain(batch, view.features(batch), keep=False)[0])

    features = projector(tower(batch.pixel_values, output_hidden_states=True).hidden_states[-2][:, first:])
    start = int(batch.visual[0].int().argmax())
    embed = language.get_input_embeddings()
    prefix, suffix = batch.input_ids[:, :start], batch.input_ids[:, start + features.shape[1] :]
    expected = language(inputs_embeds=torch.cat([embed(prefix), features, embed(suffix)], dim=1)).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)


def test_weights_keep_their_precision(tmp_path: Path) -> None:
    source, _ = tinyllava_folder(tmp_path, dtype=torch.bfloat16)
    stored = load_file(obtain(source, tmp_path / "teachers/it") / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"connector_type": "resampler"}, "connector_type mlp2x_gelu and image_aspect_ratio square are read, not resampler"),
        ({"image_aspect_ratio": "pad"}, "not mlp2x_gelu and pad"),
        ({"vision_feature_select_strategy": "all"}, "is none of patch, cls_patch"),
        ({"text_config": {"model_type": "phi"}}, "a part is of type 'phi', and is to be qwen2 or qwen3"),
        ({"vision_config": None}, "a part is of type None, and is to be siglip or siglip_vision_model"),
        ({"vision_feature_layer": -9}, "feature_layer is -9, and the tower has 3 layers"),
    ],
)
def test_others_are_refused_in_a_sentence(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    source, _ = tinyllava_folder(tmp_path, **config)
    with pytest.raises(ModelError, match=message):
        obtain(source, tmp_path / "teachers/it")
    assert not (tmp_path / "teachers/it").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [("connector._connector.2.bias", "projector does not fit"), ("language_model.model.norm.weight", "1 weights are missing")],
)
def test_what_is_not_whole_is_refused(missing: str, message: str, tmp_path: Path) -> None:
    source, _ = tinyllava_folder(tmp_path)
    weights = load_file(source / "model.safetensors")
    save_file({name: w for name, w in weights.items() if name != missing}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        obtain(source, tmp_path / "teachers/it")
