"""The benchmark compares equals: the reference is the engine's loss, and every arm does what its name says."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import divergence, flops, measure, reference, step, table
from benchmarks.shapes import DRAWS, EOS, FIRST_WORD, SIZES, TRAINED, Size, batch, script
from components.cost.shapes import Language, Tower, llava
from components.cost.step import body, head, tower
from components.evaluate.memory import peak_bytes
from tests.graph_of_code import ROOT

CPU = torch.device("cpu")
SMALLEST = Size(
    name="test",
    about="for tests",
    tower=Tower(hidden=16, layers=2, heads=2, mlp=32, image_px=16, patch_px=8),
    student=Language(hidden=16, layers=2, heads=2, kv_heads=1, mlp=32, vocabulary=40),
    teacher=Language(hidden=32, layers=2, heads=4, kv_heads=2, mlp=64, vocabulary=44, tied=False),
    batch=3,
    instruction=3,
    response=5,
    repeats=2,
)
PAPER_SHRUNK = replace(SMALLEST, bf16=True)


@pytest.fixture(scope="module")
def bench() -> step.Bench:
    return step.Bench(SMALLEST, CPU)


@pytest.mark.parametrize("arm", ["align_ti", "align_ti_start", "align_ti_worst"])
def test_reference_equals_engine_on_values_and_gradients(bench: step.Bench, arm: str) -> None:
    distinct = step.ENGINE[arm][1]
    assert distinct is not None
    loss, gradients = bench.gradients(bench.engine(arm))
    plain_loss, plain_gradients = bench.gradients(bench.reference(distinct))
    assert loss == pytest.approx(plain_loss, rel=1e-5) and loss > 1
    assert any(g.abs().max() > 1e-3 for g in plain_gradients)
    for actual, expected in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arm", ["align_ti_expanded", "align_ti_flex"])
@pytest.mark.usefixtures("flex_on_a_cpu")
def test_the_arms_of_a_gpu_equal_the_engines(bench: step.Bench, arm: str) -> None:
    loss, gradients = bench.gradients(bench.appended(arm))
    engine_loss, engine_gradients = bench.gradients(bench.engine("align_ti"))
    assert loss == pytest.approx(engine_loss, rel=1e-5) and bench.ribbon_rows[arm] == bench.ribbon_rows["align_ti"]
    for actual, expected in zip(gradients, engine_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert bench.student.model.config.get_text_config()._attn_implementation == "sdpa"


def test_each_term_of_the_reference_is_the_engines(bench: step.Bench) -> None:
    module = step.Scripted(bench.student, bench.teacher, bench.method(step.ALL))
    module.script = bench.script(1.29)
    terms = module(bench.batch, bench.keys)
    eager = [reference.twin(model, "eager") for model in (bench.student.model, bench.teacher.vlm.model)]
    plain = reference.terms(*eager, bench.batch, module.script, 1, EOS)
    torch.testing.assert_close(terms.sums / terms.counts, plain, rtol=1e-4, atol=1e-6)
    assert bool((plain[:3] > 0).all())


def test_a_difference_stops_the_benchmark(bench: step.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "reference", lambda: bench.engine("kd"))
    with pytest.raises(AssertionError, match="engine and reference differ"):
        step.equality(bench)


@pytest.mark.parametrize("distinct", [0.0, TRAINED, 1.29, 4.0])
def test_script_has_the_entropy_that_it_says(distinct: float) -> None:
    inputs = batch(SIZES["tiny"], CPU)
    draws, gold = script(inputs, distinct, 128), inputs.input_ids[inputs.response]
    assert draws.shape == (len(gold), DRAWS)
    others = [set(row) - {token} for row, token in zip(draws.tolist(), gold.tolist(), strict=True)]
    assert sum(map(len, others)) == int(len(gold) * distinct)
    assert all(token >= FIRST_WORD for row in others for token in row)


def test_the_engine_is_given_the_scripts_rows(bench: step.Bench) -> None:
    """Also what a renamed `AlignTI._draw_from` would break."""
    responses = int(bench.batch.response.sum())
    for arm, (_, distinct) in step.ENGINE.items():
        bench.engine(arm)()
        assert bench.ribbon_rows[arm] == int(responses * (distinct or 0))


def test_a_twin_is_the_same_model(bench: step.Bench) -> None:
    other = reference.twin(bench.student.model, "eager")
    assert all(a is b for a, b in zip(bench.student.model.parameters(), other.parameters(), strict=True))
    assert bench.student.model.config.get_text_config()._attn_implementation == "sdpa"


def test_the_interleaved_layout() -> None:
    inputs = batch(SMALLEST, CPU)
    draws = torch.arange(int(inputs.response.sum()) * 2).view(-1, 2) + 100
    ids, positions, alternative, gold_at = reference.interleave(inputs, draws)
    assert torch.equal(ids.gather(1, gold_at), inputs.input_ids)
    assert torch.equal(positions.gather(1, gold_at), torch.arange(inputs.input_ids.shape[1]).expand_as(gold_at))
    assert ids[alternative].tolist() == draws.flatten().tolist()
    first = SMALLEST.prompt
    assert positions[0, first : first + 3].tolist() == [first] * 3  # c_11, c_12, y_1


@pytest.fixture(scope="module")
def result() -> dict:
    """Of the size `paper`, shrunk: teacher in bf16 with a wider and untied head, student under autocast."""
    precision = torch.get_float32_matmul_precision()
    try:
        return step.run(PAPER_SHRUNK, CPU, repeats=2)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_result_has_its_fields(result: dict) -> None:
    result = json.loads(json.dumps(result))
    assert {"machine", "date", "torch", "clock", "precision", "tokens", "arms", "parts", "not_measured"} <= result.keys()
    ratios = {"align_ti_vs_kd", "align_ti_vs_kd_worst", "memory_align_ti_vs_kd", "align_ti_vs_reference"}
    assert ratios <= result["ratios"].keys()
    assert all(isinstance(value, float) and value > 0 for value in result["ratios"].values())
    assert ("kd_vs_trl" in result["ratios"]) != ("trl" in result["not_measured"])  # measured, or said why not
    assert result["arms"].keys() >= {*step.ENGINE, "reference"}
    assert all(arm["seconds"] > 0 and arm["peak_mib"] > 0 and arm["tflop"] > 0 for arm in result["arms"].values())
    for parts in result["parts"].values():
        assert sum(parts.values()) == pytest.approx(1) and {"student plain", "teacher plain", "backward"} <= parts.keys()
    assert "ribbon" in result["parts"]["align_ti"] and "ribbon" not in result["parts"]["kd"]
    assert all(name in table.report(result) for name in result["ratios"])


def test_flops_of_a_matrix_are_those_that_torch_counts() -> None:
    """The student's passes of the KD-only arm, against torch's own counter on the stock model."""
    from torch.utils.flop_counter import FlopCounterMode

    bench = step.Bench(replace(SMALLEST, batch=1), CPU)
    b = bench.batch
    model = reference.twin(bench.student.model, "eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=b.input_ids, pixel_values=b.pixel_values)
    T = b.input_ids.shape[1]
    shape, model, work = SMALLEST.student, llava(SMALLEST.tower, SMALLEST.student), flops.batch_shape(b, 0)
    counted = body(model, work, 0) + head(shape, T) + tower(model, 1)
    causal = shape.layers * 4 * shape.hidden * (T * T - T * (T + 1) / 2)  # which eager attention computes and masks
    assert counted + causal == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_peak_memory_is_the_allocators() -> None:
    def work() -> None:
        first = torch.zeros(1000, 1000)
        del first
        second = torch.zeros(1000, 1000)
        (second + 1).sum()

    assert peak_bytes(work, CPU) == pytest.approx(8e6, rel=0.01)


def test_arms_take_turns() -> None:
    order: list[str] = []
    arms = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = measure.interleaved(arms, 2, CPU, "turns")
    assert "".join(order) == "abc" + "bca"
    assert {name: len(took) for name, took in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_divergence_of_few_rows() -> None:
    measured = divergence.run(CPU, rows=40, vocabulary=1000)
    assert measured["ratios"].keys() >= {"memory_divergence_vs_full_logits"}
    assert "engine, head frozen" in table.report(measured)


def test_the_gpu_sizes_need_torch_and_transformers_alone() -> None:
    """Read from the source: what loads with `benchmarks.step` and `benchmarks.search`, themselves and all of ours."""
    ours, others = ["benchmarks.step", "benchmarks.search"], set()
    for name in ours:
        for statement in ast.parse(_source(name)).body:
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom):
                assert statement.module
                names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            else:
                continue
            for imported in names:
                top = imported.split(".")[0]
                if top not in ("benchmarks", "components"):
                    others.add(top)
                    continue
                module = imported if _source(imported) else imported.rpartition(".")[0]
                if module not in ours:
                    ours.append(module)
    assert "components.align_ti.step" in ours and "components.models.vlm" in ours
    assert others - set(sys.stdlib_module_names) <= {"torch", "transformers", "tqdm"}


def _source(module: str) -> str:
    """Empty for what is no module file of ours: a package, or a name inside a module."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path.read_text() if path.is_file() else ""
