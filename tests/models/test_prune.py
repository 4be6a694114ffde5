"""Cut from a teacher: the same logits where nothing is left out, and those of the teacher with parts silenced where some is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageTextToText

from components.config.models import Cut
from components.errors import ModelError
from components.models.load import load
from components.models.prune import _kept_layers, cut, largest_neurons
from components.models.vlm import VLM
from tests.families import toy

LAYERS = 3  # Qwen3-VL's toy has one more


def spec(every: int = 1, mlp: int | None = None) -> Cut:
    return Cut(teacher="t", every=every, mlp=mlp)


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    view, batch = VLM(model), toy.batch(family)
    hidden, _ = view.plain(batch, view.features(batch), keep=False)
    return view.head(hidden)


def load_model(folder: Path) -> Any:
    return load(folder, "cpu", torch.float64).model


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_cut_is_the_teacher_without_what_is_left_out(family: str, tmp_path: Path) -> None:
    """Nothing: the same logits. Else the reference: layers taken out of the live teacher, lesser neurons' columns set to 0."""
    teacher = toy.folder(family, 1, LAYERS)
    uncut = cut(teacher, spec(), tmp_path / "students/whole")
    reference = load_model(teacher)
    torch.testing.assert_close(logits(load_model(uncut), family), logits(reference, family), rtol=1e-6, atol=1e-6)
    assert {file.name for file in uncut.iterdir()} == {file.name for file in teacher.iterdir()}
    assert (uncut / "config.json").read_text() == (teacher / "config.json").read_text()

    every = 1 if family == "qwen3_vl" else 2
    student = load_model(cut(teacher, spec(every, mlp=20), tmp_path / "students/cut"))
    _silence(reference, every, 20)
    assert len(student.get_decoder().layers) == len(reference.get_decoder().layers)
    assert student.get_decoder().layers[0].mlp.gate_proj.weight.shape[0] == 20
    torch.testing.assert_close(logits(student, family), logits(reference, family), rtol=1e-10, atol=1e-10)


def _silence(model: Any, every: int, mlp: int) -> None:
    decoder, text = model.get_decoder(), model.config.get_text_config()
    decoder.layers = torch.nn.ModuleList(decoder.layers[::every])
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[::every]
    text.num_hidden_layers = len(decoder.layers)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
        gate, up, down = (getattr(layer.mlp, f"{part}_proj").weight.data for part in ("gate", "up", "down"))
        sizes = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
        down[:, sizes.argsort()[:-mlp]] = 0


def test_windows_stay_with_their_layers(tmp_path: Path) -> None:
    student = cut(toy.folder("gemma3", 1, LAYERS), spec(every=2), tmp_path / "students/cut")
    text = json.loads((student / "config.json").read_text())["text_config"]
    assert text["layer_types"] == ["sliding_attention"] * 2 and text["num_hidden_layers"] == 2


def test_a_head_of_its_own_stays_whatever_the_config_says(tmp_path: Path) -> None:
    """transformers ties no head that is stored with other values than the embeddings; a trained one may be so."""
    teacher = Path(shutil.copytree(toy.folder("qwen2_vl", 1, LAYERS), tmp_path / "teachers/t"))
    config = json.loads((teacher / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (teacher / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    models = [load_model(folder) for folder in (teacher, cut(teacher, spec(every=2), tmp_path / "students/cut"))]
    heads, embeddings = ([getattr(m, f"get_{side}_embeddings")().weight for m in models] for side in ("output", "input"))
    assert torch.equal(*heads) and torch.equal(*embeddings) and not torch.equal(heads[0], embeddings[0])


def test_stock_transformers_opens_it_whole(tmp_path: Path) -> None:
    student = cut(toy.folder("internvl", 1, LAYERS), spec(every=2, mlp=16), tmp_path / "students/cut")
    _, report = AutoModelForImageTextToText.from_pretrained(student, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 6), st.data())
def test_the_largest_neurons_in_their_order(neurons: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, neurons))
    grid = st.lists(st.integers(-2, 2), min_size=3 * neurons * width, max_size=3 * neurons * width)
    gate, up, down = torch.tensor(data.draw(grid), dtype=torch.float32).view(3, neurons, width)
    largest = largest_neurons(gate, up, down.T, count).tolist()
    sizes = [float(gate[i].square().sum() + up[i].square().sum() + down[i].square().sum()) for i in range(neurons)]
    assert largest == sorted(sorted(range(neurons), key=lambda i: (-sizes[i], i))[:count])


@pytest.mark.parametrize(
    ("change", "every", "mlp", "message"),
    [
        ({"model_type": "qwen3_moe"}, 2, None, "of type 'qwen3_moe', which is not cut"),
        ({}, 1, 100, "have 48 neurons, fewer than mlp: 100"),
        ({"deepstack": [0, 1]}, 2, None, "image features enter its first 2 layers"),
    ],
)
def test_what_cannot_be_cut_exactly_is_refused(change: dict[str, Any], every: int, mlp: int | None, message: str) -> None:
    kind = change.get("model_type", "qwen3")
    text = SimpleNamespace(model_type=kind, intermediate_size=48, num_hidden_layers=4)
    vision = SimpleNamespace(deepstack_visual_indexes=change.get("deepstack"))
    config = SimpleNamespace(get_text_config=lambda: text, vision_config=vision)
    with pytest.raises(ModelError, match=message):
        _kept_layers(config, spec(every, mlp), Path("theirs"))


def test_a_teacher_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    teacher = shutil.copytree(toy.folder("llava", 1, LAYERS), tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors weights"):
        cut(teacher, spec(), tmp_path / "cut")
