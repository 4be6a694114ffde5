"""The pictures of the layer search: what they show of the attention, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from components.digits.tokenizer import build_processor
from components.errors import DataError
from components.irs.__main__ import _overlays
from components.irs.overlays import AttentionExample, curve, overlay, peaks
from components.irs.regions import Tiling, preprocessed_image
from components.irs.search import AttentionMaps
from components.models.template import Template
from components.records.irs import Region, View
from components.report.figures import DARK, LIGHT, draw
from tests.families import toy
from tests.layers import layer_choice

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def gaze(
    question: str, answer: str, mean: np.ndarray, centred: np.ndarray | None = None, region: np.ndarray | None = None
) -> AttentionExample:
    return AttentionExample(question, answer, mean, mean if centred is None else centred, region)


def panels(gazes: list[AttentionExample]) -> list[list[Axes]]:
    """Rows of (image, mean, centred)."""
    axes = overlay(PICTURE, gazes, peaks(gazes), "layer 2", LIGHT).axes
    return [axes[3 * row : 3 * row + 3] for row in range(len(gazes))]


def spike(token: int, height: float) -> np.ndarray:
    weights = np.full(16, 0.01, np.float32)
    weights[token] = height
    return weights


def test_heat_lies_where_the_attention_goes_on_one_scale_per_column() -> None:
    rows = panels([gaze("Where?", "here", spike(5, 0.6), spike(7, 0.9)), gaze("What?", "that", spike(11, 0.3), spike(12, 0.2))])
    heats = [[axes.images[-1] for axes in row[1:]] for row in rows]
    assert [[int(np.argmax(heat.get_array())) for heat in row] for row in heats] == [[5, 7], [11, 12]]
    for column, highest in enumerate((spike(5, 0.6), spike(7, 0.9))):
        limits = [row[column].get_clim() for row in heats]
        assert limits[0] == limits[1] == (0, pytest.approx(highest.max() / highest.mean(), rel=1e-5))
    assert heats[0][0].get_array().mean() == pytest.approx(1)
    assert heats[0][0].get_extent() == [-0.5, 31.5, 31.5, -0.5], "the grid covers the image, first row on top"


def test_the_asked_region_is_outlined_where_it_is_known() -> None:
    region = np.zeros((32, 32))
    region[:16, 16:] = 1  # at the picture's corner
    rows = panels([gaze("What is at b1?", "one", spike(5, 0.6), region=region), gaze("How many?", "two", spike(5, 0.6))])
    for axes in rows[0]:
        outline = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
        assert outline.min(0).tolist() == [15.5, -0.5] and outline.max(0).tolist() == [31.5, 15.5]
    assert not any(axes.collections for axes in rows[1])


def test_questions_stand_over_their_picture_and_dollars_are_no_formula() -> None:
    even = np.full(16, 1 / 16, np.float32)
    rows = panels([gaze("Is it $5 or $6?", "$5", even), gaze("What?", "that", even, np.zeros(16, np.float32))])
    assert rows[0][0].get_title() == "Is it $5 or $6?"
    assert "that" in rows[1][0].get_xlabel()
    assert rows[1][2].images[-1].get_array().tolist() == [[1.0] * 4] * 4, "nothing left: equal weights"
    assert draw(lambda theme: overlay(PICTURE, [gaze(r"\frac{$", "$^$", even)] * 2, (1, 1), "", theme)).startswith(b"\x89PNG")


def test_visual_tokens_that_are_no_square_are_refused() -> None:
    with pytest.raises(DataError, match="12 visual tokens are no square grid"):
        overlay(PICTURE, [gaze("Where?", "here", np.ones(12, np.float32))], (1, 1), "", LIGHT)


def test_image_is_shown_as_the_model_sees_it() -> None:
    processor = build_processor(["what"], Template(""), 32, 8)
    wide = Image.fromarray(np.hstack([np.zeros((20, 40, 3), np.uint8), np.full((20, 40, 3), 255, np.uint8)]))
    pixels = preprocessed_image(processor, wide)
    assert pixels.shape == (32, 32, 3)
    assert pixels[:, :12].max() < 20
    assert pixels[:, 20:].min() > 235


def test_curve_marks_the_winner_and_shows_every_layer() -> None:
    choice = layer_choice(1, [0.1, 0.3, 0.2])
    (axes,) = curve(choice, LIGHT).axes
    np.testing.assert_allclose(axes.containers[0].lines[0].get_ydata(orig=False), choice.irs)
    assert axes.texts[0].get_text() == "layer 1: 0.300"


def test_curve_shows_where_weights_point_beside_equal_ones() -> None:
    shares = {("mean", "all"): [0.1, 0.12], ("centred", "words"): [0.5, 0.4]}
    views = [
        View(
            weighting=weighting,
            rows=rows,
            irs=[0.1, 0.2],
            irs_standard_error=[0.01] * 2,
            pointing=values,
            pointing_ci95=[(value - 0.02, value + 0.02) for value in values],
            equal=[0, 0],
        )
        for (weighting, rows), values in shares.items()
    ]
    region = Region(images=9, questions=12, equal=0.0625, equal_ci95=(0.06, 0.065))
    irs, points = curve(layer_choice(1, [0.1, 0.3], views=views, region=region), LIGHT).axes
    assert irs.get_ylabel() == "IRS"
    for container, expected in zip(points.containers, shares.values(), strict=True):
        np.testing.assert_allclose(container.lines[0].get_ydata(orig=False), expected)
        assert container.has_yerr
    assert any(line.get_ydata()[0] == 0.0625 for line in points.lines if line.get_label() == "equal weights")


def test_same_picture_same_bytes_and_themes_differ() -> None:
    choice = layer_choice(0, [0.1])
    assert draw(curve, choice) == draw(curve, choice) != draw(curve, choice, theme=DARK)


def test_without_a_grid_that_all_images_share_there_are_no_overlays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    maps = AttentionMaps(samples=[], attention={"all": torch.zeros(1, 0, 2, 8)}, tokens=torch.zeros(0))
    tiling = Tiling.of(toy.loaded("qwen2_vl").processor)
    assert _overlays(tiling, maps, {}, layer_choice(0, [0.1]).picked, count=2) == []
    assert "no overlays, for the teacher's visual tokens are no square grid" in capsys.readouterr().out
