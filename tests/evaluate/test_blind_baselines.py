"""What answers are worth without the image, and twins of test images in the training data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.config.load import load_settings
from components.dataset.perceptual_hash import NEAR
from components.dataset.shards import ImageRow, Samples, Turn
from components.evaluate import blind_baselines
from components.evaluate.blind_baselines import blurred, edited_images, majority, markdown, measure, other_images
from components.evaluate.contamination import contamination
from components.evaluate.kits.vlmeval_worker import blank
from components.records.dataset import Manifest
from components.records.paths import DATASET, MODELS, REPORTS
from tests.shards import write_split


def picture(seed: int, px: int = 48) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((px, px), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def row(name: str, image: bytes | None, *questions: str) -> ImageRow:
    samples = tuple((f"{name}-{i}", "kind", (Turn(f"<image>\n{q}" if image else q, "yes"),)) for i, q in enumerate(questions))
    return ImageRow(name, image, samples)


def split_of(root: Path, test: list[ImageRow], train: list[ImageRow]) -> tuple[Samples, Samples]:
    splits = {name: write_split(root / name, rows, 10) for name, rows in (("test", test), ("train", train))}
    Manifest(source="tests", rows_in=0, rows_out=0, quarantined=0, splits=splits, digest="0" * 64).write(root / "manifest.json")
    return Samples(root, "test"), Samples(root, "train")


def test_twins_are_found_by_pixels_and_by_look(tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(4)]
    train = [row(f"train{i}", encoded(image), "What is it?", f"only {i}?") for i, image in enumerate(images)]
    test = [
        row("recoded", encoded(images[0], "BMP"), "What is it?", "Is it new?"),  # other bytes, the same pixels
        row("smaller", encoded(images[1].resize((32, 32)), "JPEG"), "only 1?"),
        row("new", encoded(picture(99)), "What is it?"),
        row("text", None, "What is it?"),
    ]
    report = contamination(*split_of(tmp_path, test, train), "test")
    assert (report.images, report.train_images, report.questions) == (3, 4, 5)
    assert (report.exact, report.near) == (1, 1)
    assert [(pair.test, pair.train, pair.exact) for pair in report.pairs] == [
        ("recoded", "train0", True),
        ("smaller", "train1", False),
    ]
    assert report.pairs[0].bits == 0 and report.pairs[1].bits <= NEAR
    assert report.verbatim == 2  # "What is it?" of recoded, "only 1?" of smaller
    assert report.questions_in_training == 4  # all but "Is it new?"


def test_twins_of_later_images_rows_and_turns_are_counted(tmp_path: Path) -> None:
    first, second, third = (encoded(picture(seed)) for seed in range(3))
    conversation = (Turn("<image>\nWhat is it?", "a dog"), Turn("Is it old?", "yes"), Turn("<image>\nAnd this?", "a cat"))
    train = [
        ImageRow("talk", first, (("t0", "kind", conversation),), (second,)),
        row("again", encoded(picture(0), "BMP"), "Where is it?"),  # the same pixels as a row of its own
    ]
    both = (Turn("<image>\n<image>\nAnd this?", "a cat"),)
    test = [
        ImageRow("pair", third, (("e0", "kind", both),), (second,)),  # the second image is the twin
        row("later", first, "Is it old?", "Where is it?", "And this?"),
        ImageRow("twice", first, (("e4", "kind", both),), (second,)),
        row("early", second, "Is it old?"),  # trained on before the second image was shown
    ]
    report = contamination(*split_of(tmp_path, test, train), "test")
    assert (report.exact, report.near, report.questions) == (5, 0, 6)
    assert sorted((pair.test, pair.questions) for pair in report.pairs) == [
        ("early", 0),
        ("later", 3),
        ("pair", 1),
        ("twice", 1),
        ("twice", 1),
    ]
    assert report.verbatim == 5 and report.questions_in_training == 6


@pytest.mark.parametrize(("edit", "colours"), [(blank, 1), (blurred, 9)])
def test_edited_images_have_the_size_of_those_that_they_replace(
    samples: Samples, edit: Callable[[bytes], bytes], colours: int
) -> None:
    edited = edited_images(samples, edit)
    assert len(edited) == len(samples)
    for original, edit_of in zip(samples, (edited[i] for i in range(len(edited))), strict=True):
        assert (edit_of.id, edit_of.kind, edit_of.turns) == (original.id, original.kind, original.turns)
        assert original.image is not None and edit_of.image is not None
        with Image.open(io.BytesIO(edit_of.image)) as edited_image, Image.open(io.BytesIO(original.image)) as original_image:
            assert edited_image.size == original_image.size and len(set(edited_image.getdata())) == colours


def test_another_image_is_never_the_question_s_own(samples: Samples) -> None:
    other = other_images(samples)
    assert len(other) == len(samples)
    for original, exchanged in zip(samples, (other[i] for i in range(len(other))), strict=True):
        assert (exchanged.id, exchanged.turns) == (original.id, original.turns)
        assert exchanged.image_id != original.image_id and exchanged.image != original.image


def test_majority_says_the_most_frequent_reference_of_the_kind(tmp_path: Path) -> None:
    turns = [("a", "x"), ("a", "y"), ("a", "Y."), ("b", "no"), ("b", "yes")]
    rows = [ImageRow(f"i{i}", None, ((f"s{i}", kind, (Turn("q", reference),)),)) for i, (kind, reference) in enumerate(turns)]
    test, _ = split_of(tmp_path, rows, rows)
    assert majority(test, range(5)) == ["y", "y", "y", "no", "no"]


def test_a_model_that_looks_loses_without_its_image(workplace: Path) -> None:
    """The references are what `base` answers to each image: blind, it must fall below its seeing self."""
    manifest = json.loads((DATASET / "manifest.json").read_text())
    manifest["splits"]["train"] = manifest["splits"]["val"]
    (DATASET / "manifest.json").write_text(json.dumps(manifest))
    (DATASET / "val").rename(DATASET / "train")
    report = measure([("base", MODELS / "teachers/base")], load_settings())
    figures = report.models["base"]
    assert figures.seeing > 0.9 and figures.blank < figures.seeing and figures.other < figures.seeing
    assert set(figures.blank_per_kind) == set(report.majority_per_kind) == {"digit_at", "exist", "exist_at", "list"}
    assert figures.need_per_kind.keys() == report.majority_per_kind.keys()
    assert max(figures.need_per_kind.values()) > 0.1, "some kinds are not answered from a blurred image"
    assert report.contamination.exact == 0
    text = markdown(report)
    assert (
        f"{100 * figures.seeing:.1f} / {100 * figures.blank:.1f} / {100 * figures.other:.1f}" in text
        and "Is the test in the training data?" in text
    )
    assert [path.name for path in blind_baselines.write(report)] == ["controls.json", "controls.md", "controls.html"]
    html = (REPORTS / "controls.html").read_text()
    assert all(
        f"<td>{cell}</td>" in html
        for table_of in (blind_baselines.score_table, blind_baselines.need_table)
        for row in table_of(report)[1]
        for cell in row[1:]
    )


@pytest.mark.parametrize("name", ["nobody"])
def test_an_unknown_arm_is_named(name: str, workplace: Path) -> None:
    from typer.testing import CliRunner

    from components.cli import app

    result = CliRunner().invoke(app, ["controls", "--arm", name])
    assert result.exit_code != 0 and f"no arm {name!r}" in str(result.exception)
