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
    ("file", "holds"),
    [
        ("processor_config.json", {"video_processor": VIDEO}),
        (VIDEO_FILE, VIDEO),
        ("preprocessor_config.json", VIDEO),
        (None, {}),
    ],
)
def test_what_a_checkpoint_says_of_videos_is_saved_as_it_was(tmp_path: Path, file: str | None, holds: dict[str, Any]) -> None:
    """However old the release is; and where it says nothing, nothing is made up."""
    toy.save("qwen2_vl", tmp_path / "theirs", seed=1)
    if file is not None:
        path = tmp_path / "theirs" / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | holds))
    load_processor(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    kept = tmp_path / "ours" / VIDEO_FILE
    assert (json.loads(kept.read_text()) if kept.exists() else None) == (None if file is None else VIDEO)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_loader_process_collates_as_this_one_does(family: str) -> None:
    """Processes that load ahead are given the collator pickled, processors without their video part among them."""
    here = toy.collator(family)(toy.SAMPLES)
    there = pickle.loads(pickle.dumps(toy.collator(family)))(toy.SAMPLES)  # noqa: S301
    assert torch.equal(here.input_ids, there.input_ids)
    assert here.pixel_values is not None and there.pixel_values is not None
    assert torch.equal(here.pixel_values, there.pixel_values)
