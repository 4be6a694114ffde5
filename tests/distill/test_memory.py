"""Out of memory at a step: the allocators' own errors, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.config.load import load_settings
from components.distill.memory import OutOfMemory, estimate, knobs, memory_errors
from components.errors import InputError
from components.models.vlm import VLM
from tests import tiny
from tests.align_ti.test_step import batch, pair, step
from tests.distill.conftest import REPOSITORY, write_params
from tests.distill.test_stage import run

SETTINGS = load_settings(REPOSITORY).distill


def too_much(*_: object, **__: object) -> None:
    torch.empty(2**60, dtype=torch.uint8)  # no machine has it: the allocator refuses at once


def raising(error: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [too_much, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.27 GiB.")), raising(MemoryError())],
    ids=["cpu", "cuda", "python"],
)
def test_the_stage_names_the_part_and_the_knob(workplace: Path, monkeypatch: pytest.MonkeyPatch, fail) -> None:
    monkeypatch.setattr(VLM, "plain", fail)
    with pytest.raises(OutOfMemory, match=r"the largest part is [a-z' ]+; .*params/.*Estimated from the shapes, MiB") as caught:
        run()
    assert caught.value.exit_code == InputError.exit_code == 2


def test_the_knob_is_one_that_has_an_effect() -> None:
    def activations(**distill: object) -> str:
        return knobs(SETTINGS.model_copy(update=distill))["the student's activations"]

    assert activations() == "lower micro_batch_size, or set gradient_checkpointing: true, in params/distill.yaml"
    set_already = activations(micro_batch_tokens=4096, gradient_checkpointing=True)
    assert set_already == "lower micro_batch_tokens in params/distill.yaml"


def test_another_error_passes_as_it_is() -> None:
    student, teacher = pair("qwen2")
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"), memory_errors(step(student, teacher), [], SETTINGS):
        raise RuntimeError("shapes do not match")


def parts(samples: list[tuple[int, int, int]] | None = None, distill=SETTINGS, vocabulary: int = tiny.VOCABULARY, **options):
    student, teacher = (VLM(tiny.llava("qwen2", seed, vocabulary=vocabulary)) for seed in (1, 2))
    module = step(student, teacher, **options)
    return module, estimate(module, batch(torch.float32, samples or [(1, 3, 3)]), distill)


def test_estimates_follow_the_shapes() -> None:
    module, small = parts()
    weights = sum(p.nbytes for p in module.student.parameters())
    assert small["gradients and optimiser state"] == 3 * weights == 3 * small["the student's weights"]
    assert small["the teacher"] > weights  # and its cache
    assert set(small) == set(knobs(SETTINGS))
    _, longer = parts([(1, 3, 3), (1, 30, 30)])
    for part in ("the student's activations", "the ribbon's activations"):
        assert longer[part] > 3 * small[part]
    _, fewer = parts(draws=2)
    assert fewer["the ribbon's activations"] * 2 == small["the ribbon's activations"]
    _, checkpointed = parts(distill=SETTINGS.model_copy(update={"gradient_checkpointing": True}))
    assert checkpointed["the student's activations"] < small["the student's activations"]


def test_a_large_vocabulary_makes_logits_the_largest_part_until_their_chunk_is_lowered() -> None:
    student, teacher = (VLM(tiny.llava("qwen2", seed, hidden=16)) for seed in (1, 2))
    for vlm in (student, teacher):
        vlm.model.config.get_text_config().vocab_size = 2_000_000
    b = batch(torch.float32, [(1, 20, 20)] * 4)
    large, small = (estimate(step(student, teacher, chunk_mib=mib), b, SETTINGS) for mib in (1000.0, 0.01))
    assert max(large, key=large.get) == "logits" and small["logits"] < large["logits"] / 10


def test_the_cli_leaves_with_2(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from components.distill.__main__ import main
    from components.process import exit_from

    write_params(workplace, "distill", {"steps": 1})
    monkeypatch.setattr(VLM, "plain", too_much)
    monkeypatch.setattr("sys.argv", ["distill", "--arm", "kd"])
    with pytest.raises(SystemExit) as left:
        exit_from(main)
    assert left.value.code == 2
    assert "OutOfMemory: out of memory on cpu" in capsys.readouterr().err
