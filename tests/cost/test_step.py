"""Counted operations and memory of a step, and how near they are to the step benchmark's results (docs/recipes.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from benchmarks.shapes import SIZES, batch
from benchmarks.step import Bench
from benchmarks.table import load
from components.align_ti.batch import Batch, Edits
from components.align_ti.ribbon import plan
from components.align_ti.step import AlignTI, Method, total
from components.align_ti.terms import CORE, needs_of
from components.cost import shapes
from components.cost import step as cost
from components.cost.shapes import llava
from components.cost.step import BatchShape, MemoryPlan, StepPlan
from components.distill import footprint

STUDENT = shapes.llava(shapes.SIGLIP, shapes.LANGUAGE_MODELS["Qwen/Qwen2.5-0.5B"])
TEACHER = shapes.llava(shapes.SIGLIP, shapes.LANGUAGE_MODELS["Qwen/Qwen2.5-7B"])
SFT, ALL = needs_of(["sft"]), needs_of(CORE)
WORK = BatchShape(lengths=(909.0,) * 4, response=480, visual=4 * 729, images=4, instruction=240, ribbon=600)


def test_a_step_is_the_familiar_six_operations_per_weight_and_token() -> None:
    short = replace(WORK, lengths=(1.0,) * 4, response=4, visual=0, images=0, ribbon=0)
    language = STUDENT.language
    done = cost.operations(STUDENT, None, short, StepPlan(SFT))
    assert done.all == pytest.approx(6 * 4 * language.weights, rel=1e-3)  # tied: the head is the embedding


def test_the_teacher_costs_a_third_of_what_training_it_would() -> None:
    kd = needs_of(["kd"])
    with_teacher, without = (cost.operations(STUDENT, teacher, WORK, StepPlan(kd)) for teacher in (TEACHER, None))
    trained = cost.operations(TEACHER, None, WORK, StepPlan(kd))
    tower = cost.tower(STUDENT, WORK.images)
    assert with_teacher.all - without.all == pytest.approx((trained.all - tower) / 3)


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
    plain, other = (
        cost.operations(STUDENT, TEACHER, WORK, StepPlan(**({"terms": ALL} | changed))).all for changed in ({}, way)
    )
    assert other > plain if more else other < plain


@given(st.integers(2, 8))
def test_splitting_a_batch_over_passes_costs_the_same(passes: int) -> None:
    single = BatchShape(lengths=(900.0,), response=100, visual=729, images=1, instruction=71, ribbon=120)
    batched = BatchShape(
        lengths=(900.0,) * passes,
        response=100 * passes,
        visual=729 * passes,
        images=passes,
        instruction=71 * passes,
        ribbon=120 * passes,
    )
    apart, together = (cost.operations(STUDENT, TEACHER, work, StepPlan(ALL)) for work in (single, batched))
    assert passes * apart.all == pytest.approx(together.all, rel=1e-6)


def test_memory_is_shared_out_and_saved_as_the_settings_say() -> None:
    held, way = MemoryPlan(trained=5e8, wide=2, teacher_bytes=2), StepPlan(ALL, chunk_rows=69)
    plain = cost.memory(STUDENT, TEACHER, WORK, way, held)
    assert plain["student's weights"] == 4 * STUDENT.weights + 2 * 5e8 and plain["gradients and optimiser state"] == 12 * 5e8

    def with_(**changed: object) -> dict[str, float]:
        return cost.memory(STUDENT, TEACHER, WORK, way, replace(held, **changed))

    checkpointed = cost.memory(STUDENT, TEACHER, WORK, replace(way, checkpointed=True), held)
    assert checkpointed["activations"] < plain["activations"] / 5
    assert with_(teacher_bytes=0.5)["teacher"] < plain["teacher"] / 2.5
    sharded = with_(devices=8, sharded=frozenset({"student", "teacher"}))
    assert sharded["gradients and optimiser state"] == plain["gradients and optimiser state"] / 8
    assert sharded["teacher"] < plain["teacher"] / 3 and sharded["activations"] == plain["activations"]
    assert cost.memory(STUDENT, TEACHER, WORK, StepPlan(SFT), held)["teacher"] == 0
    by_gradient = cost.memory(STUDENT, TEACHER, WORK, replace(way, gradient=True), held)
    shape = TEACHER.language
    layer = footprint.activations_per_token(shape.hidden, shape.mlp, 1, False) * held.wide * sum(WORK.lengths)
    assert by_gradient["teacher"] - plain["teacher"] == pytest.approx((shape.layers - 1) * layer)


STEPS = {r["size"]: r for r in load() if r["benchmark"] == "step" and r["size"] in ("tiny", "small")}
COMPARED = {"align_ti_vs_kd": ("align_ti", "kd"), "align_ti_vs_kd_worst": ("align_ti_worst", "kd")}


@pytest.mark.parametrize("size", STEPS)
def test_ratios_of_time_are_within_a_fifth_of_those_measured(size: str) -> None:
    result = STEPS[size]
    shape = batch(SIZES[size], torch.device("cpu"))

    def counted(arm: str) -> float:
        return flops.step(SIZES[size], shape, arm, rows(result, arm))

    for name, (arm, other) in COMPARED.items():
        assert counted(arm) / counted(other) == pytest.approx(result["ratios"][name], rel=0.2), name


def test_memory_is_within_a_quarter_of_that_measured() -> None:
    size, result = SIZES["small"], STEPS["small"]
    student, teacher = (llava(size.tower, language) for language in (size.student, size.teacher))
    held = MemoryPlan(trained=student.projector + student.language.weights, wide=4, teacher_bytes=4)
    chunk_rows = 40 * 2**20 / (4 * size.student.vocabulary)
    for arm in ("kd", "align_ti", "align_ti_worst"):
        shape = flops.batch_shape(batch(size, torch.device("cpu")), rows(result, arm))
        way = StepPlan(flops.TERMS.get(arm, ALL), chunk_rows=chunk_rows)
        counted = sum(cost.memory(student, teacher, shape, way, held).values()) / 2**20
        assert counted == pytest.approx(result["arms"][arm]["peak_mib"], rel=0.25), arm


def rows(result: dict, arm: str) -> int:
    return round(result["arms"][arm]["ribbon_rows_per_step"] * result["response_tokens"])


@pytest.mark.parametrize(
    ("extra", "gradient"),
    [
        *((["kd"], False), (["va_kd"], False), (["kd", "mcd"], False)),
        *((["kd", "iva"], False), (["iva"], True), (["kd", "iva", "tpa"], False)),
    ],
)
def test_the_count_is_what_torch_measures(extra: list[str], gradient: bool) -> None:
    """On the benchmark's tiny models. Torch counts all of a causal map, and padding, of which a ribbon has much."""
    bench = Bench(SIZES["tiny"], torch.device("cpu"))
    bench.teacher.gradient = gradient
    weights = dict.fromkeys(["sft", *extra], 1.0)
    module = AlignTI(bench.student, bench.teacher, Method(weights, shared_vocabulary=bench.size.student.vocabulary))
    ribbon = plan(module.draw(bench.batch, bench.keys), bench.batch.input_ids, bench.batch.response, eos=0).tokens.numel()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as measured:
        outputs = module(edited(bench.batch), bench.keys)
        total(outputs.sums, outputs.counts, module.method.weight_vector()).backward()
    student, teacher = (llava(bench.size.tower, language) for language in (bench.size.student, bench.size.teacher))
    way = StepPlan(needs_of(weights), gradient=gradient, edited=1.0)
    counted = cost.operations(student, teacher, flops.batch_shape(bench.batch, ribbon), way).all
    assert counted == pytest.approx(measured.get_total_flops(), rel=0.15)


def edited(batch: Batch) -> Batch:
    """With an edit of each sample, as L_mcd asks for: half of its image's tokens those of another image."""
    mask = ~(batch.visual & (torch.arange(batch.visual.shape[1]) % 2 == 0))
    places, effect = torch.arange(len(mask)), torch.arange(len(mask)) % 2 == 0
    N = int(batch.response.sum())
    full, without = torch.linspace(0, 1, 10 * N).view(2, N, 5).softmax(-1)
    other = replace(batch, pixel_values=None if batch.pixel_values is None else -batch.pixel_values)
    edits = Edits(batch, other, mask.float(), places, effect, torch.arange(4).expand(N, 4), full, without)
    return replace(batch, edits=edits)


def test_the_count_of_written_answers_is_what_torch_measures() -> None:
    """Rollouts: each token is read once, and has logits once, as in a pass over prompt and answer."""
    bench, R = Bench(SIZES["tiny"], torch.device("cpu")), 32
    ids = bench.batch.input_ids[:, : bench.size.prompt]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as measured, torch.no_grad():
        bench.student.model.generate(
            input_ids=ids, pixel_values=bench.batch.pixel_values, min_new_tokens=R, max_new_tokens=R, do_sample=False
        )
    images = len(ids)
    work = BatchShape((bench.size.prompt + R,) * images, images * R, int(bench.batch.visual.sum()), images)
    student = llava(bench.size.tower, bench.size.student)
    with_answers, without = (cost.operations(student, None, work, StepPlan(SFT, written=share)).all for share in (1.0, 0.0))
    assert with_answers - without == pytest.approx(measured.get_total_flops(), rel=0.15)
