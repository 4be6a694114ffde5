"""Where the teacher lies: elsewhere, sharded, quantised; and that nothing of it is trained or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from components.config.load import load_settings
from components.distill.placement import copy_head_to, load_teacher
from components.distill.teacher import FrozenTeacher, same_tower
from components.errors import InputError, Interrupted
from components.models.vlm import VLM
from tests import tiny
from tests.distill.conftest import write_params
from tests.distill.test_scale import StopsAt, alone

TEACHER = Path("artifacts/models/teachers/base")


class Carries(TorchFunctionMode):
    """Lets tensors come back from the meta device, as zeros: it is this test's second device, and refuses to be mixed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].is_meta and args[1:2] == (torch.device("cpu"),):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_hidden_states_come_home_from_another_device() -> None:
    home = torch.device("cpu")
    model = tiny.llava().to("meta")
    with Carries():
        copy_head_to(model, home)
        teacher = FrozenTeacher(VLM(model), 1, shares_tower=False)
        batch = tiny.batch([(1, 3, 3), (1, 5, 2)])
        features = teacher.features(batch, None)
        hidden, cache, _ = teacher.plain(batch, features, keep=True, with_attention=False)
        assert cache is not None and cache.cache.layers[0].keys.is_meta, "what is large stays there"
        B, T = batch.input_ids.shape
        tokens = torch.ones(B, 2, dtype=torch.long)
        after = teacher.continued(cache, tokens, tokens, torch.ones(B, 1, 2, T + 2, dtype=torch.bool))
        assert {hidden.device, after.device, teacher.head(hidden[0]).device} == {home}
        of_student = torch.zeros_like(features, device=home)
        assert teacher.plain(batch, of_student, keep=True, with_attention=False)[0].device == home, (
            "features that it shares go there"
        )


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


def test_a_teacher_of_another_precision_takes_the_image_features_that_it_shares() -> None:
    student, model = tiny.llava(), tiny.llava().to(torch.bfloat16)
    student.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    assert same_tower(VLM(student), VLM(model))
    teacher, batch = FrozenTeacher(VLM(model), 1, shares_tower=True), tiny.batch([(1, 3, 3)])
    shared = teacher.features(batch, VLM(student).features(batch))
    hidden, _, _ = teacher.plain(batch, shared, keep=False, with_attention=False)
    own, _, _ = teacher.plain(batch, teacher.features(batch, None), keep=False, with_attention=False)
    assert hidden.dtype == own.dtype == torch.bfloat16 and torch.allclose(hidden, own, atol=0.2)


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
