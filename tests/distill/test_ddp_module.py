"""Whatever a batch holds, a rank of several has a gradient for every parameter: the others wait for it."""

from __future__ import annotations

import pytest

from components.align_ti.step import AlignTI, Method
from components.align_ti.terms import CORE
from components.distill.ddp_module import Replica
from components.distill.teacher import FrozenTeacher
from components.models.vlm import VLM
from tests import tiny


@pytest.mark.parametrize("samples", [[(0, 2, 2)], [(1, 2, 2)]], ids=["no image", "an image"])
@pytest.mark.parametrize("term", CORE)
def test_every_parameter_has_a_gradient(term: str, samples: list[tuple[int, int, int]]) -> None:
    student, teacher = VLM(tiny.llava("qwen2", 1)), VLM(tiny.llava("qwen2", 2))
    weights = dict.fromkeys(CORE, 0.0) | {term: 1.0}
    method = Method(weights=weights, eos=tiny.EOS, shared_vocabulary=tiny.VOCABULARY)
    replica = Replica(AlignTI(student, FrozenTeacher(teacher, 1, False), method), ranks=2)
    sums, counts, _ = replica(tiny.batch(samples), keys=[7])
    sums.sum().backward()
    trained = {name: p.grad for name, p in student.model.named_parameters() if p.requires_grad}
    language = {name: g for name, g in trained.items() if "vision_tower" not in name}
    assert all(g is not None for g in language.values()), [name for name, g in language.items() if g is None]
    counted = bool(counts[CORE.index(term)])
    assert counted == (term != "iva" or samples[0][0] == 1)
    assert any(bool(g.any()) for g in language.values()) == counted


def test_a_batch_without_images_has_a_backward_pass_where_the_projector_alone_is_trained() -> None:
    """In one process, too: nothing that is trained took part."""
    student = VLM(tiny.llava("qwen2", 1)).requires_grad_(False)
    projector = student.model.model.multi_modal_projector.requires_grad_(True)
    replica = Replica(AlignTI(student, None, Method(weights={"sft": 1.0}, eos=tiny.EOS)), ranks=1)
    sums, counts, _ = replica(tiny.batch([(0, 2, 2)]), keys=[7])
    sums.sum().backward()
    assert counts[0] == 2 and all(p.grad is not None and not p.grad.any() for p in projector.parameters())
