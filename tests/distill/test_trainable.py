"""What is trained: adapters beside frozen weights, folded in at the end; compiled layers; passes by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.align_ti.step import AlignTI, Method
from components.align_ti.terms import CORE
from components.config.distill import DistillSettings
from components.config.load import load_settings
from components.distill import loop
from components.distill.teacher import FrozenTeacher
from components.distill.trainable import choose_trainable, merge_adapters, parameter_groups
from components.errors import InputError, Interrupted, SettingsError
from components.models.load import load
from components.models.vlm import VLM
from components.records.paths import STUDENTS
from tests import tiny
from tests.distill.conftest import write_params
from tests.distill.test_scale import StopsAt, alone, assert_same_training, legible
from tests.families import toy

STUDENT = Path("artifacts/models/students/student")
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}


RATES = dict.fromkeys(("vision_tower", "projector", "language_model"))


def configure(workplace: Path, lora: dict[str, Any] | None = None, **distill: Any) -> DistillSettings:
    """Write it to params/distill.yaml; return the settings."""
    trainable = {"vision_tower": False, "projector": True, "language_model": True, "lora": lora}
    write_params(workplace, "distill", {"trainable": trainable, **distill})
    return load_settings().distill


def test_adapters_alone_are_trained_and_end_in_plain_weights(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText

    configure(workplace, LORA)
    optimised: list[int] = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
            optimised.append(sum(p.numel() for group in groups for p in group["params"]))
            super().__init__(groups, **options)

    monkeypatch.setattr(loop.torch.optim, "AdamW", Spy)
    _, after = alone()
    start = load_file(STUDENT / "model.safetensors")
    assert after.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    targets = {name for name in start if any(f"{target}.weight" in name for target in LORA["targets"]) and "vision" not in name}
    projector = {name for name in start if "multi_modal_projector" in name}
    assert changed == targets | projector
    outputs_and_inputs = [sum(start[name].shape) for name in targets]
    assert optimised == [LORA["rank"] * sum(outputs_and_inputs) + sum(start[name].numel() for name in projector)]
    _, report = AutoModelForImageTextToText.from_pretrained(STUDENTS / "align_ti/model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
def test_each_part_that_is_trained_is_a_group_with_its_own_rate(workplace: Path, lora: dict[str, Any] | None) -> None:
    distill = configure(workplace, lora, learning_rates={**RATES, "projector": 5e-3})
    student = load(STUDENT, "cpu")
    choose_trainable(student, distill)
    groups = {group.pop("name"): group for group in parameter_groups(student.model, distill)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "projector": 5e-3,
        "language_model": distill.optimiser.learning_rate,
    }
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in student.model.parameters() if p.requires_grad)
    projector = student.model.model.multi_modal_projector
    assert {id(p) for p in groups["projector"]["params"]} == {id(p) for p in projector.parameters()}


def test_equal_rates_are_to_the_last_bit_one_group(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(workplace)
    expected = alone()

    class OneGroup(torch.optim.AdamW):
        def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
            (rate,) = {group["lr"] for group in groups}
            super().__init__([p for group in groups for p in group["params"]], lr=rate, **options)

    monkeypatch.setattr(loop.torch.optim, "AdamW", OneGroup)
    losses, weights = alone()
    assert losses == expected[0] and all(torch.equal(weights[name], expected[1][name]) for name in weights)


def test_rates_of_its_own_follow_the_schedule_and_survive_a_resume(workplace: Path) -> None:
    distill = configure(workplace, checkpoint_every=100, learning_rates={**RATES, "projector": 1e-2})
    losses, weights = alone()
    ratio = 1e-2 / distill.optimiser.learning_rate
    assert all(line["lr_projector"] == pytest.approx(ratio * line["lr_language_model"]) for line in losses)
    assert losses[0]["lr_projector"] == 1e-2 and losses[-1]["lr_projector"] > 0, "what the step took, not the next one's"
    with pytest.raises(Interrupted):
        alone(StopsAt(3))
    again, resumed = alone()
    assert again == losses and all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_projector_alone(workplace: Path, checkpointing: bool) -> None:
    trainable = {"vision_tower": False, "projector": True, "language_model": False, "lora": None}
    write_params(workplace, "distill", {"trainable": trainable, "gradient_checkpointing": checkpointing})
    losses, after = alone()
    start = load_file(STUDENT / "model.safetensors")
    assert {name for name in start if not torch.equal(start[name], after[name])} == {
        name for name in start if "multi_modal_projector" in name
    }
    assert all(line["grad_norm"] > 0 for line in losses)


def test_folding_in_changes_no_output(workplace: Path) -> None:
    student = load(STUDENT, "cpu")
    choose_trainable(student, configure(workplace, LORA))
    model = student.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 6, 7, 8]])
    apart = model(input_ids=ids).logits
    merge_adapters(model)
    assert not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(model(input_ids=ids).logits, apart, rtol=1e-5, atol=1e-6)


def test_dropout_in_adapters_is_the_same_after_resuming(workplace: Path) -> None:
    configure(workplace, {**LORA, "dropout": 0.3}, checkpoint_every=100)
    losses, weights = alone()
    with pytest.raises(Interrupted):
        alone(StopsAt(3))
    again, resumed = alone()
    assert again == losses and all(torch.equal(resumed[name], weights[name]) for name in weights)
    configure(workplace, LORA, checkpoint_every=100)
    assert alone()[0] != losses, "dropout does something"


def test_what_lora_cannot_do_is_refused(workplace: Path) -> None:
    for targets in (["query"], ["q_proj", "query"]):  # peft passes over the second's
        with pytest.raises(InputError, match=r"'query'\]: nothing is called query; the language model has .*q_proj"):
            choose_trainable(load(STUDENT, "cpu"), configure(workplace, {**LORA, "targets": targets}))
    with pytest.raises(SettingsError, match="lora trains the language model, and language_model is false"):
        trainable = {"vision_tower": False, "projector": True, "language_model": False, "lora": LORA}
        write_params(workplace, "distill", {"trainable": trainable})
        load_settings()


def test_adapters_on_embeddings_that_are_the_head_too_are_refused(workplace: Path) -> None:
    embeddings = configure(workplace, {**LORA, "targets": ["q_proj", "embed_tokens"]})
    choose_trainable(load(toy.folder("qwen2_5_vl"), "cpu"), embeddings)
    with pytest.raises(InputError, match="embeddings are its output head too"):
        choose_trainable(load(toy.folder("paligemma"), "cpu"), embeddings)


def test_passes_by_length_train_the_same(workplace: Path) -> None:
    legible(workplace)
    expected = alone()
    configure(workplace, micro_batch_tokens=64)
    assert_same_training(expected, alone())
    with pytest.raises(SettingsError, match=r"micro_batch_tokens: 63 is less than one sample may have .*max_length 64"):
        configure(workplace, micro_batch_tokens=63)


def test_compiled_layers_give_the_same_step() -> None:
    """Traced and guarded as `compile` does it, run without a code generator, which is not ours and takes a minute."""
    student, teacher = VLM(tiny.llava(layers=1)), VLM(tiny.llava(seed=2, hidden=48))
    method = Method(weights=dict.fromkeys(CORE, 1.0), eos=tiny.EOS, shared_vocabulary=tiny.VOCABULARY)
    step = AlignTI(student, FrozenTeacher(teacher, 1, False), method)

    def gradients() -> list[torch.Tensor]:
        student.zero_grad()
        terms = step(tiny.batch([(1, 3, 3), (0, 2, 2)]), [1, 2])
        terms.sums.sum().backward()
        return [terms.sums, *(p.grad for p in student.parameters() if p.grad is not None)]

    eager = gradients()
    for layer in student.model.model.language_model.layers:
        layer.compile(dynamic=True, backend="eager")
    torch.testing.assert_close(gradients(), eager, rtol=1e-5, atol=1e-6)
