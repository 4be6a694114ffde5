"""A teacher on another grid: the identity on equal grids, and its own forward's text rows on others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.align_ti.step import AlignTI, Method, total
from components.align_ti.terms import CORE
from components.digits.tokenizer import build_processor
from components.distill.resample_visual_tokens import ResampledTeacher, bilinear
from components.distill.teacher import FrozenTeacher
from components.errors import ModelError
from components.models.collate import Collator
from components.models.load import Loaded, check_pair, grids, load
from components.models.template import Template
from components.models.vlm import VLM
from tests.families import toy
from tests.models.conftest import WORDS, sample, saved

KEYS = [1, 2, 3]
SAMPLES = [
    sample(("what digit is at a1 ?", "one"), ("is a2 red ?", "yes , red"), name="a"),
    sample(("what ?", "no"), image=False, name="b"),
    sample(("list the grid .", "red one , green two"), name="c"),
]


def processor(patch_px: int):
    return build_processor([" ".join(WORDS)], Template(""), 16, patch_px)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("coarse") / "model", processor(8), hidden=16)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("fine") / "model", processor(4))


def module(student: Loaded, teacher: Loaded, sides: tuple[int, int] | None, route: str) -> AlignTI:
    frozen = FrozenTeacher(VLM(teacher.model), 1, shares_tower=False)
    method = Method(dict.fromkeys(CORE, 1.0), eos=student.processor.tokenizer.eos_token_id, draws=3, route=route)
    return AlignTI(VLM(student.model), frozen if sides is None else ResampledTeacher(frozen, *sides), method)


def collated(student: Loaded, teacher: Loaded | None):
    other = None if teacher is None else teacher.processor
    return Collator(student.processor, Template(""), 100, train=True, teacher=other)(SAMPLES)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 27])
def test_equal_grids_map_by_the_identity(side: int) -> None:
    assert torch.equal(bilinear(side, side), torch.eye(side * side))


@pytest.mark.parametrize(("teacher_side", "student_side"), [(4, 2), (2, 4), (27, 14), (3, 1)])
def test_weights_sum_to_one_and_keep_an_even_slope(teacher_side: int, student_side: int) -> None:
    weights = bilinear(teacher_side, student_side)
    torch.testing.assert_close(weights.sum(1), torch.ones(student_side * student_side))
    centres = (torch.arange(teacher_side) + 0.5) / teacher_side
    slope = (weights @ centres.repeat(teacher_side)).view(student_side, student_side)
    # Outside of the outermost centres there is nothing to go by.
    inside = slice(1, -1) if student_side > teacher_side else slice(None)
    torch.testing.assert_close(slope[0][inside], ((torch.arange(student_side) + 0.5) / student_side)[inside])


@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_on_equal_grids_nothing_changes(coarse: Path, route: str) -> None:
    student, teacher = load(coarse, "cpu"), load(coarse, "cpu")
    for parameter in teacher.model.parameters():
        parameter.data.mul_(1.3)
    assert grids(teacher, student) is None
    terms = module(student, teacher, (2, 2), route)(collated(student, teacher), KEYS)
    expected = module(student, teacher, None, route)(collated(student, None), KEYS)
    torch.testing.assert_close(terms.sums, expected.sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(terms.counts, expected.counts)


@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_text_rows_are_the_teachers_own_and_the_loss_falls(coarse: Path, fine: Path, route: str) -> None:
    student, teacher = load(coarse, "cpu"), load(fine, "cpu")
    sides = grids(teacher, student)
    assert sides == (4, 2)
    assert check_pair(teacher, student, own_images=True) == student.vocabulary
    step, batch = module(student, teacher, sides, route), collated(student, teacher)
    teacher_batch = batch.teacher
    assert (
        teacher_batch is not None
        and teacher_batch.visual.sum(1).tolist() == [16, 0, 16]
        and batch.visual.sum(1).tolist() == [4, 0, 4]
    )
    with torch.no_grad():
        of_teacher, of_student = (
            m.model(input_ids=b.input_ids, pixel_values=b.pixel_values).logits[:, :-1][b.response[:, 1:]].log_softmax(-1)
            for m, b in ((teacher, teacher_batch), (student, batch))
        )
    terms = step(batch, KEYS)
    kd = (of_teacher.exp() * (of_teacher - of_student)).sum()
    torch.testing.assert_close(terms.sums[CORE.index("kd")], kd, rtol=1e-4, atol=1e-5)
    assert (terms.sums > 0).all() and (terms.counts > 0).all()
    optimiser = torch.optim.AdamW(step.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        terms = step(batch, KEYS)
        loss = total(terms.sums, terms.counts, torch.ones(4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_both_routes_agree_about_alternatives(coarse: Path, fine: Path) -> None:
    student, teacher = load(coarse, "cpu"), load(fine, "cpu")
    batch = collated(student, teacher)
    continued, expanded = (module(student, teacher, (4, 2), route)(batch, KEYS) for route in ("continuation", "expanded"))
    torch.testing.assert_close(continued.sums, expanded.sums, rtol=1e-5, atol=1e-5)


def test_grids_that_go_by_shape_are_refused(coarse: Path) -> None:
    with pytest.raises(ModelError, match=r"goes by its shape and 4 visual tokens; rows of one have"):
        grids(toy.loaded("qwen2_vl"), load(coarse, "cpu"))


def test_other_words_beside_the_visual_tokens_are_refused(coarse: Path) -> None:
    with pytest.raises(ModelError, match="read different tokens"):
        collated(load(coarse, "cpu"), toy.loaded("gemma3"))
