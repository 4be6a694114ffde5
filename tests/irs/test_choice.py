"""What the rule picks, and the scores that it picks by: against plain loops; refused in words where it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from components.config.irs import IrsSettings
from components.dataset.shards import Box, Sample, Turn
from components.errors import DataError, ModelError
from components.irs.choice import backgrounds, choose, grids_of, leave_one_out_background, regions, scored
from components.irs.regions import Tiling
from components.irs.score import pointing
from components.irs.search import AttentionMaps
from components.models.image_processor import decode_first_image
from tests.families import toy
from tests.irs.test_regions import PX, TILING
from tests.irs.test_search import SETTINGS
from tests.models.conftest import png

L, X, I, NV = 2, 5, 3, 16  # noqa: E741
CELL = {0: (0.0, 0.0, 0.25, 0.25), 3: (0.75, 0.0, 1.0, 0.25), 12: (0.0, 0.75, 0.25, 1.0)}  # token -> its patch
REGION_TOKENS = (0, 3, 12)


def settings(**changes: Any) -> IrsSettings:
    return IrsSettings.model_validate(SETTINGS.model_dump() | changes)


def samples(boxes: bool = True) -> list[list[Sample]]:
    def sample(x: int, i: int) -> Sample:
        region: tuple[Box, ...] = (CELL[REGION_TOKENS[i]],) if boxes and (x, i) != (0, 0) else ()
        return Sample(f"{x}-{i}", f"{x}", "digit_at", png(x, PX), (Turn(f"<image>\nwhat is at {i}?", "one", region),))

    return [[sample(x, i) for i in range(I)] for x in range(X)]


def planted_maps(boxes: bool = True) -> AttentionMaps:
    """A sink at token 5 in all; over the words of layer 0, some attention on the region of the question."""
    random = torch.Generator().manual_seed(0)
    attention = {rows: 0.01 * torch.rand(L, X, I, NV, generator=random) for rows in ("all", "words")}
    for rows_attention in attention.values():
        rows_attention[..., 5] += 0.5
    for i, token in enumerate(REGION_TOKENS):
        attention["words"][0, :, i, token] += 0.1
    return AttentionMaps(samples(boxes), attention, torch.full((X,), NV))  # type: ignore[arg-type]


def test_pointing_is_the_mean_share_on_the_region_over_questions_that_have_one() -> None:
    weights = torch.rand(L, X, I, NV, dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    region = torch.rand(X, I, NV, dtype=torch.float64)
    region[1, 2] = 0
    region[3] = 0
    result = pointing(weights, region)
    for layer in range(L):
        expected = []
        for x in (0, 1, 2, 4):
            shares = [
                sum(float(weights[layer, x, i, t] * region[x, i, t]) for t in range(NV)) for i in range(I) if (x, i) != (1, 2)
            ]
            expected.append(sum(shares) / len(shares))
        assert result[layer].tolist() == pytest.approx(expected)


def test_backgrounds_are_the_mean_shares_and_the_others_leave_the_instruction_itself_out() -> None:
    attention = planted_maps().attention["all"]
    shares = attention / attention.sum(-1, keepdim=True)
    torch.testing.assert_close(backgrounds(planted_maps())["all"], shares.flatten(1, 2).mean(1))
    background = leave_one_out_background(attention)
    torch.testing.assert_close(background[1, 2, 0], (shares[1, 2, 1] + shares[1, 2, 2]) / 2)


def test_the_pointing_rule_finds_the_layer_weighting_and_rows_that_look_at_what_is_asked() -> None:
    choice, saved = choose(planted_maps(), TILING, settings(rule="pointing", weighting=None, instruction_rows=None))
    picked = choice.picked
    assert (picked.rule, picked.layer, picked.weighting, picked.rows) == ("pointing", 0, "centred", "words")
    assert picked.separated and picked.runner_up is not None
    assert choice.grids == ["16 tokens"] and set(saved) == {"all", "words"}
    views = {(view.weighting, view.rows): view for view in choice.views}
    best = views["centred", "words"]
    assert best.pointing[0] > 0.8 > 0.3 > views["mean", "words"].pointing[0] > views["mean", "all"].pointing[0]
    assert all(low < mean < high for mean, (low, high) in zip(best.pointing, best.pointing_ci95, strict=True))
    assert choice.region is not None
    assert (choice.region.images, choice.region.questions) == (X, X * I - 1)
    assert choice.region.equal == pytest.approx(1 / NV)
    (over_all, _) = choice.backgrounds
    assert over_all.sinks == [[5], [5]] and over_all.most == pytest.approx(over_all.on_sinks)
    assert all(share > 0.7 for share in over_all.most)


def test_other_rules_take_what_was_asked_for() -> None:
    paper, _ = choose(planted_maps(), TILING, settings())
    assert (paper.picked.layer, paper.picked.weighting, paper.picked.rows) == (paper.layer, "mean", "all")
    words, _ = choose(planted_maps(), TILING, settings(instruction_rows="words"))
    view = next(view for view in words.views if (view.weighting, view.rows) == ("mean", "words"))
    assert words.picked.layer == view.irs.index(max(view.irs)) == 0
    assert words.layer == paper.layer and words.irs == paper.irs, "the paper's figures stay"
    given, _ = choose(planted_maps(), TILING, settings(rule="given", layer=1, weighting="centred", instruction_rows="words"))
    assert (given.picked.layer, given.picked.weighting, given.picked.rows) == (1, "centred", "words")
    with pytest.raises(ModelError, match=r"params/irs.yaml: layer is 2, but the teacher has layers 0..1"):
        choose(planted_maps(), TILING, settings(rule="given", layer=2))


def test_pointing_without_regions_is_refused() -> None:
    with pytest.raises(DataError, match=r"rule is pointing, and the region .* fewer than two of the images .*set rule: irs"):
        choose(planted_maps(boxes=False), TILING, settings(rule="pointing"))
    choice, _ = choose(planted_maps(boxes=False), TILING, settings())
    assert choice.region is None and not any(view.pointing for view in choice.views)


def varied() -> tuple[AttentionMaps, Tiling]:
    """Images of two grids, on a model whose tokens go by the image's shape."""
    tiling = Tiling.of(toy.loaded("qwen2_vl").processor)
    pictures = [toy.SAMPLES[0].image, png(0, PX)]
    some = [[replace(sample, image=pictures[x % 2]) for sample in image] for x, image in enumerate(samples(boxes=False))]
    grids = [tiling.grid(decode_first_image(image[0])) for image in some]
    tokens = torch.tensor([rows * columns for rows, columns in grids if rows])  # type: ignore[misc]
    attention = torch.rand(L, X, I, int(tokens.max())) * (torch.arange(int(tokens.max())) < tokens[:, None])[:, None]
    return AttentionMaps(some, {"all": attention, "words": attention}, tokens), tiling


def test_images_of_several_grids_have_no_background_and_centred_weights_are_refused_for_training() -> None:
    maps, tiling = varied()
    grids = grids_of(maps, tiling)
    assert len(grids) == 2 and all(" x " in grid for grid in grids)
    choice, saved = choose(maps, tiling, settings())
    assert saved == {} and choice.backgrounds == [] and choice.grids == grids
    assert {view.weighting for view in choice.views} == {"mean", "centred"}, "IRS is still told, over each image's others"
    with pytest.raises(DataError, match=rf"weighting is centred.*{grids[0]}, {grids[1]}; set weighting: mean"):
        choose(maps, tiling, settings(weighting="centred"))


def test_nothing_left_counts_and_gives_no_nan() -> None:
    """Two instructions that look alike leave nothing above each other."""
    attention = torch.rand(L, X, 1, NV).expand(L, X, 2, NV)
    maps = AttentionMaps([image[:2] for image in samples()], {"all": attention, "words": attention}, torch.full((X,), NV))
    region = regions(maps, TILING)
    views = [score.view for score in scored(maps, {}, region)]
    for view in views:
        assert view.equal == ([2 * X] * L if view.weighting == "centred" else [0] * L)
        assert view.irs == pytest.approx([0] * L, abs=1e-6)
        if view.weighting == "centred":
            assert view.pointing == pytest.approx([1 / NV] * L)
