"""Where the teacher lies: elsewhere, sharded, quantised; and that nothing of it is trained or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from components.distill.placement import bring_head, load_teacher
from components.distill.teacher import FrozenTeacher
from components.errors import InputError, Interrupted
from components.models.collate import Batch
from components.models.vlm import VLM
from components.settings import load_settings
from tests import tiny
from tests.distill.conftest import write_params
from tests.distill.test_scale import StopsAt, alone

TEACHER = Path("artifacts/models/teachers/base")


def test_hidden_states_come_home_from_another_device() -> None:
    """Fake tensors know their device and refuse to be mixed, so that a second device need not be there."""
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        with torch.device("cuda:0"):
            model = tiny.llava(hidden=32)
        home = torch.device("cpu")
        bring_head(model, home)
        teacher = FrozenTeacher(VLM(model), 1, shares_tower=False)
        made = vars(tiny.batch([(1, 3, 3), (1, 5, 2)]))
        batch = Batch(image_ids=[], **made)
        features = teacher.features(batch.pixel_values, None)
        assert features is not None and features.device.type == "cuda"
        hidden, cache, _ = teacher.plain(batch, features, keep=True, look=False)
        B, T = batch.input_ids.shape
        tokens = torch.ones(B, 2, dtype=torch.long)
        after = teacher.continued(cache, tokens, tokens, torch.ones(B, 1, 2, T + 2, dtype=torch.bool))
        assert {hidden.device, after.device, teacher.head(hidden[0]).device} == {home}
        assert cache.layers[0].keys.device.type == "cuda", "what is large stays there"


def test_nothing_of_the_teacher_is_trained_or_saved(workplace: Path) -> None:
    with pytest.raises(Interrupted):
        alone(StopsAt(1))
    (saved,) = Path(".runs/distill").rglob("step-*/model.safetensors")
    student = load_file("artifacts/models/students/student/model.safetensors")
    assert sum(w.numel() for w in load_file(saved).values()) == sum(w.numel() for w in student.values())
    settings = load_settings()
    teacher = load_teacher(TEACHER, torch.device("cpu"), settings)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_teacher_weights_have_their_own_precision(workplace: Path) -> None:
    write_params(workplace, "distill", {"teacher_weights": "bf16"})
    teacher = load_teacher(TEACHER, torch.device("cpu"), load_settings())
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("distill", "runtime", "message"),
    [
        ({"teacher_weights": "int8"}, {}, "teacher_weights int8 needs a CUDA device, and the teacher lies on cpu"),
        ({"teacher_weights": "nf4"}, {"teacher_device": "cpu"}, "teacher_weights nf4 needs a CUDA device"),
        ({}, {"teacher_device": "cuda:9"}, "teacher_device is cuda:9, and there are"),
        ({}, {"teacher_sharded": True}, "teacher_sharded needs `devices` above 1"),
    ],
)
def test_what_cannot_be_is_refused(workplace: Path, distill: dict[str, Any], runtime: dict[str, Any], message: str) -> None:
    write_params(workplace, "distill", distill)
    write_params(workplace, "runtime", runtime)
    with pytest.raises(InputError, match=message):
        load_teacher(TEACHER, torch.device("cpu"), load_settings())
