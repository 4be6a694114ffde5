"""The cost model: what it counts, and that it stays as near to the step benchmark's results as docs/recipes.md says."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import costs as comparison
from benchmarks.table import load
from components import cost, shapes
from components.align_ti.terms import CORE, needs_of
from components.cost import Holding, Way, Work

STUDENT = shapes.llava(shapes.SIGLIP, shapes.LANGUAGE_MODELS["Qwen/Qwen2.5-0.5B"])
TEACHER = shapes.llava(shapes.SIGLIP, shapes.LANGUAGE_MODELS["Qwen/Qwen2.5-7B"])
SFT, ALL = needs_of(["sft"]), needs_of(CORE)
WORK = Work(lengths=(909.0,) * 4, response=480, visual=4 * 729, images=4, instruction=240, ribbon=600)


def test_a_step_is_the_familiar_six_operations_per_weight_and_token() -> None:
    short = dataclasses.replace(WORK, lengths=(1.0,) * 4, response=4, visual=0, images=0, ribbon=0)
    language = STUDENT.language
    done = cost.step(STUDENT, None, short, Way(SFT))
    assert done.all == pytest.approx(6 * 4 * language.weights, rel=1e-3)  # tied: the head is the embedding


def test_the_teacher_costs_a_third_of_what_training_it_would() -> None:
    kd = needs_of(["kd"])
    with_teacher, without = (cost.step(STUDENT, teacher, WORK, Way(kd)) for teacher in (TEACHER, None))
    its_own = cost.step(TEACHER, None, WORK, Way(kd))
    tower = cost.tower(STUDENT, WORK.images)
    assert with_teacher.all - without.all == pytest.approx((its_own.all - tower) / 3)


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ({"draws_first": True}, True),
        ({"checkpointed": True}, True),
        ({"chunk_rows": 69.0}, True),
        ({"towers": 2}, True),
        ({"trained": 0.0}, False),
        ({"terms": needs_of(["sft", "kd"])}, False),
    ],
)
def test_what_makes_a_step_dearer_or_cheaper(way: dict, more: bool) -> None:
    plain, other = (cost.step(STUDENT, TEACHER, WORK, Way(**({"terms": ALL} | changed))).all for changed in ({}, way))
    assert other > plain if more else other < plain


@given(st.integers(2, 8))
def test_splitting_a_batch_over_passes_costs_the_same(passes: int) -> None:
    one = Work(lengths=(900.0,), response=100, visual=729, images=1, instruction=71, ribbon=120)
    many = Work(
        lengths=(900.0,) * passes,
        response=100 * passes,
        visual=729 * passes,
        images=passes,
        instruction=71 * passes,
        ribbon=120 * passes,
    )
    apart, together = (cost.step(STUDENT, TEACHER, work, Way(ALL)) for work in (one, many))
    assert passes * apart.all == pytest.approx(together.all, rel=1e-6)


def test_memory_is_shared_out_and_saved_as_the_settings_say() -> None:
    held = Holding(trained=5e8, wide=2, teacher_bytes=2, checkpointed=False, chunk_rows=69, continues=True)
    plain = cost.memory(STUDENT, TEACHER, WORK, Way(ALL), held)
    assert plain["student's weights"] == 4 * STUDENT.weights + 2 * 5e8 and plain["gradients and optimiser state"] == 12 * 5e8

    def with_(**changed: object) -> dict[str, float]:
        return cost.memory(STUDENT, TEACHER, WORK, Way(ALL), dataclasses.replace(held, **changed))

    assert with_(checkpointed=True)["activations"] < plain["activations"] / 5
    assert with_(teacher_bytes=0.5)["teacher"] < plain["teacher"] / 2.5
    sharded = with_(devices=8, sharded=frozenset({"student", "teacher"}))
    assert sharded["gradients and optimiser state"] == plain["gradients and optimiser state"] / 8
    assert sharded["teacher"] < plain["teacher"] / 3 and sharded["activations"] == plain["activations"]
    assert cost.memory(STUDENT, TEACHER, WORK, Way(SFT), held)["teacher"] == 0


def test_it_is_as_near_to_the_step_benchmark_as_the_page_says() -> None:
    for name, (counted, measured) in comparison.measured_ratios().items():
        assert counted == pytest.approx(measured, rel=0.2), name
    small = next(result for result in load() if result["size"] == "small" and result["benchmark"] == "step")
    for arm in comparison.ARMS:
        assert comparison.peak_mib(small, arm) == pytest.approx(small["arms"][arm]["peak_mib"], rel=0.25), arm


def test_the_page_says_what_the_results_say() -> None:
    page = comparison.PAGE.read_text(encoding="utf-8")
    assert page == comparison.refresh(page, comparison.render())
