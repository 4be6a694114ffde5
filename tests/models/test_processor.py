"""Processors without their video part, which a checkpoint keeps all the same."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from components.models.processor import VIDEO_FILE, load_processor
from tests.families import toy

VIDEO = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2}


@pytest.mark.parametrize(
    ("file", "added"),
    [
        ("processor_config.json", {"video_processor": VIDEO}),
        (VIDEO_FILE, VIDEO),
        ("preprocessor_config.json", VIDEO),
        (None, {}),
    ],
)
def test_what_a_checkpoint_says_of_videos_is_saved_as_it_was(tmp_path: Path, file: str | None, added: dict[str, Any]) -> None:
    """However old the release is; and where it says nothing, nothing is made up."""
    toy.save("qwen2_vl", tmp_path / "theirs", seed=1)
    if file is not None:
        path = tmp_path / "theirs" / file
        config = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(config | added))
    load_processor(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    saved = tmp_path / "ours" / VIDEO_FILE
    assert (json.loads(saved.read_text()) if saved.exists() else None) == (None if file is None else VIDEO)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_loader_process_collates_as_this_one_does(family: str) -> None:
    """Processes that load ahead are given the collator pickled, processors without their video part among them."""
    direct = toy.collator(family)(toy.SAMPLES)
    pickled = pickle.loads(pickle.dumps(toy.collator(family)))(toy.SAMPLES)  # noqa: S301
    assert torch.equal(direct.input_ids, pickled.input_ids)
    assert direct.pixel_values is not None and pickled.pixel_values is not None
    assert torch.equal(direct.pixel_values, pickled.pixel_values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_is_saved_as_it_was(side: str, tmp_path: Path) -> None:
    """Many released checkpoints pad on the left, so that whoever generates in batches need not set it."""
    toy.save("llava", tmp_path / "theirs", seed=1)
    file = tmp_path / "theirs/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
    load_processor(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/tokenizer_config.json").read_text())["padding_side"] == side
