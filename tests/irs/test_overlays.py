"""The pictures of the layer search: what they show of the attention, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from components.artifacts import LayerChoice
from components.errors import DataError
from components.figures import DARK, LIGHT, draw
from components.irs.__main__ import _overlays
from components.irs.overlays import Gaze, curve, overlay, seen_by
from components.irs.search import Seen
from components.models.template import Template
from components.models.tokenizer import build_processor
from tests.families import toy

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def panels(gazes: list[Gaze]) -> tuple[Figure, list[Axes]]:
    figure = overlay(PICTURE, gazes, 2, LIGHT)
    return figure, figure.axes[: 1 + len(gazes)]


def test_heat_lies_where_the_attention_goes_on_one_scale() -> None:
    first, second = np.full(16, 0.01, np.float32), np.full(16, 0.01, np.float32)
    first[5], second[11] = 0.6, 0.3
    _, (_, left, right) = panels([Gaze("Where?", "here", first), Gaze("What?", "that", second)])
    heats = [axes.images[-1] for axes in (left, right)]
    assert [int(np.argmax(heat.get_array())) for heat in heats] == [5, 11]
    assert heats[0].get_clim() == heats[1].get_clim() == (0, pytest.approx(0.6 / first.mean(), rel=1e-5))
    assert heats[0].get_array().mean() == pytest.approx(1)
    assert heats[0].get_extent() == [-0.5, 31.5, 31.5, -0.5], "the grid covers the image, first row on top"


def test_questions_stand_over_their_picture_and_dollars_are_no_formula() -> None:
    even = np.full(16, 1 / 16, np.float32)
    figure, (_, left, right) = panels([Gaze("Is it $5 or $6?", "$5", even), Gaze("What?", "that", even)])
    assert left.get_title() == "Is it $5 or $6?"
    assert "that" in right.get_xlabel()
    assert draw(lambda theme: overlay(PICTURE, [Gaze(r"\frac{$", "$^$", even)] * 2, 0, theme)).startswith(b"\x89PNG")
    assert len(figure.axes) == 4


def test_visual_tokens_that_are_no_square_are_refused() -> None:
    with pytest.raises(DataError, match="12 visual tokens are no square grid"):
        overlay(PICTURE, [Gaze("Where?", "here", np.ones(12, np.float32))], 0, LIGHT)


def test_image_is_shown_as_the_model_sees_it() -> None:
    processor = build_processor(["what"], Template(""), 32, 8)
    wide = Image.fromarray(np.hstack([np.zeros((20, 40, 3), np.uint8), np.full((20, 40, 3), 255, np.uint8)]))
    seen = seen_by(processor, wide)
    assert seen.shape == (32, 32, 3)
    assert seen[:, :12].max() < 20
    assert seen[:, 20:].min() > 235


def test_curve_marks_the_winner_and_shows_every_layer() -> None:
    choice = LayerChoice(
        layer=1, irs=[0.1, 0.3, 0.2], standard_error=[0.01] * 3, separated=True, runner_up=2, images=9, pairs=27
    )
    (axes,) = curve(choice, LIGHT).axes
    np.testing.assert_allclose(axes.containers[0].lines[0].get_ydata(orig=False), choice.irs)
    assert axes.texts[0].get_text() == "layer 1: 0.300"


def test_same_picture_same_bytes_and_themes_differ() -> None:
    choice = LayerChoice(layer=0, irs=[0.1], standard_error=[0.01], separated=False, runner_up=0, images=9, pairs=27)
    assert draw(curve, choice) == draw(curve, choice) != draw(curve, choice, theme=DARK)


def test_without_a_grid_that_all_images_share_there_are_no_overlays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = Seen(samples=[], attention=torch.zeros(1, 0, 2, 8))
    assert _overlays(toy.loaded("qwen2_vl"), seen, layer=0, count=2) == []
    assert "no overlays, for the teacher's visual tokens are no square grid" in capsys.readouterr().out
