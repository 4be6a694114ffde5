"""Centred attention against a plain loop, and what happens where nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from components.align_ti.visual_weights import visual_weights
from components.config.distill import Iva
from components.distill.teacher import FrozenTeacher
from components.errors import DataError
from components.irs.centred import centred, centred_in_batch, count_unweighted_images, shares
from components.irs.weighting import BACKGROUND, Weighting, weighting
from components.models.vlm import VLM
from components.records.irs import Picked
from tests import tiny
from tests.layers import layer_choice


def by_loop(attention: list[float], background: list[float]) -> list[float]:
    total = sum(attention)
    if total == 0:
        return [0.0] * len(attention)
    above = [max(value / total - taken, 0) for value, taken in zip(attention, background, strict=True)]
    return [value / sum(above) for value in above] if sum(above) > 1e-6 else [0.0] * len(above)


@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 9), rows=st.integers(1, 5))
@settings(max_examples=50)
def test_centred_equals_a_plain_loop(seed: int, tokens: int, rows: int) -> None:
    random = torch.Generator().manual_seed(seed)
    attention = torch.rand(rows, tokens, generator=random, dtype=torch.float64) ** 4
    attention[torch.rand(rows, generator=random) < 0.2] = 0
    background = shares(torch.rand(tokens, generator=random, dtype=torch.float64))
    weights = centred(attention, background)
    expected = [by_loop(row, background.tolist()) for row in attention.tolist()]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    sums = weights.sum(-1)
    assert bool((weights >= 0).all()) and bool((((sums - 1).abs() < 1e-9) | (sums == 0)).all())


def test_sinks_go_with_the_background_and_the_asked_place_stays() -> None:
    background = torch.tensor([0.7, 0.1, 0.1, 0.1])
    attention = torch.tensor([0.6, 0.1, 0.2, 0.1]) * 0.03  # of all attention, little goes to the image
    torch.testing.assert_close(centred(attention, background), torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("attention", [[0.0] * 4, [0.21, 0.03, 0.03, 0.03]], ids=["none at all", "the background itself"])
def test_where_nothing_is_left_tokens_weigh_the_same_and_are_counted(attention: list[float]) -> None:
    pictures = torch.tensor([[1] * 4 + [0] * 5, [1] * 4 + [0] + [2] * 4, [0] * 9])
    other = [0.1, 0.1, 0.3, 0.1]
    rows = torch.tensor([attention + [0.0] * 4, other + attention, [0.0] * 8])
    weights = centred_in_batch(rows, torch.tensor([0.7, 0.1, 0.1, 0.1]), pictures, ["a", "b", "text"])
    assert int(count_unweighted_images(weights, pictures)) == 2
    per_image = visual_weights(weights, pictures).unflatten(0, (3, 4))
    torch.testing.assert_close(per_image[[0, 2]], torch.full((2, 4), 0.25))
    assert float(per_image[1].sum()) == pytest.approx(1) and float(per_image[1].max()) > 0.5


def test_an_image_of_another_size_is_refused_by_name_and_text_alone_is_not() -> None:
    background = torch.full((4,), 0.25)
    pictures = torch.tensor([[1] * 4, [1] * 3 + [0]])
    with pytest.raises(DataError, match=r"sample other: its image has 3 visual tokens.*images of 4; set weighting: mean"):
        centred_in_batch(torch.rand(2, 4), background, pictures, ["one", "other"])
    nothing = centred_in_batch(torch.zeros(1, 0), background, torch.zeros(1, 4, dtype=torch.long), ["text"])
    assert nothing.shape == (1, 0)


def iva(kind: Any, layer: Any = None) -> Iva:
    return Iva(weighting=kind, layer=layer)


def picked(weights: Any, rows: Any = "words") -> Picked:
    return Picked(rule="pointing", layer=0, weighting=weights, rows=rows, runner_up=None, separated=False)


def test_what_weighs_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choice = layer_choice(1, [0.1, 0.3], picked=picked("centred"))
    for kind in ("irs", "uniform"):
        assert weighting(iva(kind), choice) == Weighting(1)
    assert weighting(iva("layer", 7), choice) == Weighting(7)
    assert [weighting(iva("layer", rule), choice, depth=6).layer for rule in ("middle", "last")] == [3, 5]
    assert len({weighting(iva("layer", "random"), choice, depth=6, seed=seed).layer for seed in range(40)}) == 6
    assert weighting(iva("searched"), choice.model_copy(update={"picked": picked("mean")})) == Weighting(0, "words")
    with pytest.raises(DataError, match=r"background.safetensors is missing; `dvc repro search_layer`"):
        weighting(iva("searched"), choice)
    BACKGROUND.parent.mkdir(parents=True)
    backgrounds = {rows: torch.rand(2, 4) for rows in ("all", "words")}
    save_file(backgrounds, BACKGROUND)
    searched = weighting(iva("searched"), choice)
    assert (searched.layer, searched.rows) == (0, "words") and searched.background is not None
    assert torch.equal(searched.background, backgrounds["words"][0])
    assert searched.digest is not None and searched.digest != Weighting(0, "words", backgrounds["all"][0]).digest
    for content in (save({"all": backgrounds["all"]}), save({"words": torch.zeros(0)}), b"noise"):
        BACKGROUND.write_bytes(content)
        with pytest.raises(DataError, match=r"background.safetensors is damaged .*delete it"):
            weighting(iva("searched"), choice)


def test_the_live_teachers_weights_are_those_of_eager_maps() -> None:
    model = tiny.llava("qwen3", 3)
    batch = tiny.batch([(1, 3, 2), (0, 4, 2), (1, 1, 4)])
    background = shares(torch.rand(tiny.NV, generator=torch.Generator().manual_seed(0)))
    weights = {}
    for name, subtracted in (("mean", None), ("centred", background)):
        teacher = FrozenTeacher(VLM(model), 1, False, subtracted)
        with torch.no_grad():
            weights[name] = teacher.plain(batch, teacher.features(batch, None), keep=False, with_attention=True)[2]
        assert int(teacher.equal_weights) == 0
    model.set_attn_implementation("eager")
    inputs = {name: getattr(batch, name) for name in ("input_ids", "pixel_values", "attention_mask")}
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1].mean(1)
    for row in (0, 2):
        mean = maps[row][batch.instruction[row]][:, batch.visual[row]].mean(0)
        torch.testing.assert_close(weights["mean"][row], mean, rtol=1e-4, atol=1e-6)
        expected = torch.tensor(by_loop(mean.tolist(), background.tolist()))
        torch.testing.assert_close(weights["centred"][row], expected, rtol=1e-3, atol=1e-5)
    assert not weights["centred"][1].any(), "no image, no weights"


def test_an_image_without_instruction_is_counted() -> None:
    batch = tiny.batch([(1, 0, 2), (1, 2, 2)])
    teacher = FrozenTeacher(VLM(tiny.llava("qwen2", 3)), 1, False, torch.tensor([0.7, 0.1, 0.1, 0.1]))
    with torch.no_grad():
        for _ in range(2):
            teacher.plain(batch, teacher.features(batch, None), keep=False, with_attention=True)
    assert int(teacher.equal_weights) == 2
