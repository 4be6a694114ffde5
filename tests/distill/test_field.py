"""The field's terms through the whole stage, and the state that one of them keeps in checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.align_ti import terms
from components.align_ti.terms.taid import Interpolation
from components.config.load import load_settings
from components.distill.__main__ import distill
from components.distill.launch import launch
from components.errors import Interrupted
from components.teacher_cache.__main__ import build_signals
from components.teacher_cache.find_evidence import EvidencePass
from components.tracking.journal import Run
from tests.distill.conftest import REPOSITORY, write_params
from tests.distill.test_scale import StopsAt, legible, runtime


def test_the_interpolation_follows_the_published_schedule() -> None:
    losses, steps = [3.0, 2.5, 2.6, 1.0, 0.9, 0.2], 50
    interpolation = Interpolation(0.2, 0.05)
    t, momentum, previous = 0.2, 0.0, None
    for s, loss in enumerate(losses):
        interpolation.stepped(torch.tensor(loss), s / steps)
        if previous is not None:
            momentum = 0.99 * momentum + 0.01 * (previous - loss) / previous
            t = min(1.0, max(0.2 + 0.8 * s / steps, t + 0.05 / (1 + math.exp(-momentum)) * (1 - t)))
        previous = loss
        assert float(interpolation.t) == pytest.approx(t, rel=1e-6)
    interpolation.stepped(torch.tensor(0.1), 0.9)
    assert float(interpolation.t) == pytest.approx(0.92)


def test_the_interpolation_leaves_the_student_whose_divergence_from_itself_is_zero() -> None:
    interpolation = Interpolation(0.0, 5e-4)
    for s in range(3):
        interpolation.stepped(torch.tensor(0.0), s / 10)
    assert float(interpolation.t) == pytest.approx(0.2)


FOLDER = Path("artifacts/students/all")


@pytest.fixture
def every(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace with an arm of all terms but the paper's."""
    weights = {"sft": 1.0} | {name: 0.1 for name in terms.names() if name not in terms.CORE}
    arm = {"weights": weights, "va_kd": {"cached": True}, "student": "student", "seed": 1}
    write_params(workplace, "study", {"arms": {"all": arm}})
    write_params(workplace, "evaluate", {"baselines": ["all"]})
    evidence = {"kinds": ["gradient", "blurred"], "share": 0.25}
    write_params(
        workplace,
        "distill",
        {"teacher_signals": {"source": "live", "kind": "top_k", "top_k": 4, "draws": 50, "evidence": evidence}},
    )
    monkeypatch.setenv("ALIGNTI_DEVICE", "cpu")
    monkeypatch.setattr(EvidencePass, "_right", lambda self, samples: [True] * len(samples))  # this teacher has not learnt
    build_signals(load_settings())
    return workplace


def trained(run: Run) -> tuple[bytes, list[dict[str, float]]]:
    settings = load_settings()
    distill("all", settings.arm("all"), settings, run)
    return (FOLDER / "model/model.safetensors").read_bytes(), losses()


def losses() -> list[dict[str, float]]:
    return [json.loads(line) for line in (FOLDER / "losses.jsonl").read_text().splitlines()]


def test_every_term_trains_through_the_stage_and_resumes_to_the_same_bytes(every: Path) -> None:
    expected = trained(Run(None))
    assert all(expected[1][-1][name] > 0 for name in load_settings().arm("all").weights)
    shutil.rmtree(FOLDER)
    with pytest.raises(Interrupted):
        trained(StopsAt(2))
    (checkpoint,) = Path(".runs/distill").rglob("step-*")
    assert load_file(checkpoint / "model.safetensors")["method.term_modules.taid.t"] > 0.4
    assert trained(Run(None)) == expected


def test_two_processes_that_checkpoint_and_accumulate_train_as_one(
    every: Path, own_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP2."""
    legible(every)
    _, expected = trained(Run(None))
    shutil.rmtree(FOLDER)
    write_params(every, "distill", {"gradient_checkpointing": True, "flex_attention": False, "micro_batch_size": 1})
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    launch(runtime(devices=2, accelerate="fsdp2"), "cpu", ["--arm", "all"], module="tests.distill.fsdp2_on_cpu")
    for one_process, two_processes in zip(expected, losses(), strict=True):
        assert two_processes == pytest.approx(one_process, rel=1e-4, abs=1e-7)  # 1 - cos is rounded at 1


def test_through_adapters(every: Path) -> None:
    _, exact = trained(Run(None))
    shutil.rmtree(FOLDER)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    write_params(every, "distill", {"trainable": load_settings().distill.trainable.model_dump() | {"lora": lora}})
    _, adapted = trained(Run(None))
    assert adapted[0]["total"] == pytest.approx(exact[0]["total"]) and adapted[0]["grad_norm"] < exact[0]["grad_norm"]
    assert adapted[-1]["total"] < adapted[0]["total"]
