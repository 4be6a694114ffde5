"""Each image as one tile, where a family splits images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from components.errors import ModelError
from components.irs.regions import preprocessed_image
from components.models.image_processor import visual_tokens
from components.models.image_splitting import disable_image_splitting
from components.models.processor import load_processor
from tests.families import toy


@pytest.mark.parametrize("layout", ["processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_an_image_is_one_tile_whatever_its_shape(family: str, layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy.folder(family), folder)
    assert visual_tokens(load_processor(folder)) is None
    original = (folder / "processor_config.json").read_text()
    if layout == "preprocessor_config.json":  # as released repositories have it
        load_processor(folder).image_processor.save_pretrained(folder)
        rest = {key: value for key, value in json.loads(original).items() if key != "image_processor"}
        (folder / "processor_config.json").write_text(json.dumps(rest))
    (folder / "linked").hardlink_to(folder / layout)
    disable_image_splitting(folder)
    processor = load_processor(folder)
    assert visual_tokens(processor) == 4
    assert preprocessed_image(processor, toy.image(40, 20)).shape == (16, 16, 3)
    assert layout != "processor_config.json" or (folder / "linked").read_text() == original  # the hub's own copy


def test_a_family_that_has_no_such_switch_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy.folder("llava"), folder)
    with pytest.raises(ModelError, match="has no do_image_splitting to turn off; set image_splitting: true"):
        disable_image_splitting(folder)
