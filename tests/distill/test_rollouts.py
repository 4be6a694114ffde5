"""Answers that the student writes in training: equal to a plain loop, keyed, resumable, and refused where they cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from components.align_ti.batch import predicting
from components.config.load import load_settings
from components.distill.__main__ import distill
from components.distill.assemble import Job, assemble
from components.distill.launch import launch
from components.distill.loader import Steps
from components.errors import InputError, Interrupted, ModelError, SettingsError
from components.models.families import prompt
from components.models.writing import Writer
from components.tracking.journal import Run
from tests.distill.conftest import REPOSITORY, write_params
from tests.distill.test_scale import StopsAt, legible, runtime

ROLLOUTS = {"share": 0.5, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 6, "reuse": 1}
FOLDER = Path("artifacts/students/gkd")


def arm(**changes: Any) -> dict[str, Any]:
    """Of the field's GKD, with its `rollouts` changed, or other blocks."""
    jsd = {"divergence": {"kind": "jsd", "mix": 0.5, "temperature": 1.0}}
    rollouts = ROLLOUTS | {key: changes.pop(key) for key in ROLLOUTS.keys() & changes.keys()}
    return {"weights": {"kd": 1.0}, "student": "student", "seed": 1, "kd": jsd, "rollouts": rollouts} | changes


def put(root: Path, **changes: Any) -> None:
    write_params(root, "study", {"arms": {"gkd": arm(**changes)}})


@pytest.fixture
def gkd(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 samples in 4 to a step: an epoch and a half in six steps."""
    put(workplace)
    write_params(workplace, "evaluate", {"baselines": ["gkd"]})
    monkeypatch.setenv("ALIGNTI_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return workplace


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens alone may be drawn, so that most answers end and conversations go on."""
    original = Writer.__init__

    def few(self: Writer, *arguments: Any) -> None:
        original(self, *arguments)
        self.barred[:] = True
        self.barred[[self.eos_id, 20, 21]] = False

    monkeypatch.setattr(Writer, "__init__", few)


def job() -> Job:
    settings = load_settings()
    return assemble("gkd", settings.arm("gkd"), settings)


def answers(of: Job, step: int, rank: int = 0, ranks: int = 1, gold: bool = False) -> dict[str, list[int]]:
    """Tokens trained on, by sample; of the data, if `gold`."""
    micro_batches = Steps(of.samples, of.collator, of.order, of.distill, rank, ranks, None if gold else of.rollouts)[step]
    assert isinstance(micro_batches, list)
    return {
        name: batch.input_ids[i][batch.response[i]].tolist() for batch, _ in micro_batches for i, name in enumerate(batch.ids)
    }


def trained(run: Run) -> tuple[bytes, str]:
    settings = load_settings()
    distill("gkd", settings.arm("gkd"), settings, run)
    return (FOLDER / "model/model.safetensors").read_bytes(), (FOLDER / "losses.jsonl").read_text()


@pytest.mark.parametrize("turns", [1, 2])
def test_greedy_answers_and_their_loss_are_those_of_a_plain_loop(
    gkd: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    put(gkd, share=1.0, temperature=0.0)
    setup = job()
    assert setup.rollouts is not None
    if turns == 2:  # nothing but the end may be drawn
        setup.rollouts.writer.barred[:] = True
        setup.rollouts.writer.barred[setup.collator.eos_id] = False
    model, teacher, tokenizer = setup.student.model, setup.module.teacher.vlm.model, setup.student.processor.tokenizer
    barred, eos = setup.rollouts.writer.barred, setup.collator.eos_id
    ((batch, keys),) = Steps(setup.samples, setup.collator, setup.order, setup.distill, 0, 1, setup.rollouts)[0]
    losses, turn_counts = [], []
    for row, (_, index) in enumerate(setup.order.batch(0)):
        sample = setup.samples[index]
        answers: list[list[int]] = []
        while len(answers) < len(sample.turns) and all(answer[-1] == eos for answer in answers):
            given = prompt(model, setup.collator.of_prompts([sample], [answers]))
            tokens, prompt_length = given.pop("input_ids"), given["attention_mask"].shape[1]
            while tokens.shape[1] < prompt_length + 6 and (tokens.shape[1] == prompt_length or tokens[0, -1] != eos):
                with torch.no_grad():
                    logits = model(**given | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).logits[:, -1]
                tokens = torch.cat([tokens, logits.masked_fill(barred, float("-inf")).argmax(-1, keepdim=True)], dim=1)
            answers.append(tokens[0, prompt_length:].tolist())
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == tokens[0].tolist()
        turn_counts.append(len(answers))
        rows = predicting(batch.response)[row][batch.attention_mask[row].bool()]
        inputs = given | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            p, q = (each(**inputs).logits[0, rows, : len(tokenizer)].double().softmax(-1) for each in (teacher, model))
        middle = ((p + q) / 2).log()
        losses.append((F.kl_div(middle, p, reduction="none") + F.kl_div(middle, q, reduction="none")).sum(-1) / 2)
    assert max(turn_counts) == turns
    assert predicting(batch.response).sum() == sum(map(len, losses))
    with torch.no_grad():
        sums = setup.module(batch, keys)
    assert float(sums.sums[1] / sums.counts[1]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_draws_depend_on_seed_epoch_and_sample_alone(gkd: Path) -> None:
    full = answers(job(), 1)
    write_params(gkd, "distill", {"micro_batch_size": 1})
    split = job()
    assert answers(split, 1) == full
    shares = [answers(split, 1, rank, ranks=2) for rank in range(2)]
    assert shares[0] | shares[1] == full
    gold = answers(split, 1, gold=True)
    assert 0 < sum(full[name] != gold[name] for name in full) < len(full), "some are the student's, and some the data's"


def test_an_answer_serves_as_many_epochs_as_asked(gkd: Path, ending: None) -> None:
    put(gkd, share=1.0, reuse=2)
    setup = job()
    assert setup.rollouts is not None
    epochs = [{}, {}, {}]
    for step in range(12):
        epochs[step // 4] |= answers(setup, step)
    assert epochs[0] == epochs[1] != epochs[2] and epochs[0].keys() == epochs[2].keys()
    assert max(len(answers) for _, answers in setup.rollouts.cached_answers.values()) == 2


@pytest.mark.parametrize("reuse", [1, 2])
def test_stopped_and_resumed_gives_the_same_bytes(gkd: Path, reuse: int, ending: None) -> None:
    put(gkd, reuse=reuse)
    logged = Logs()
    expected = trained(logged)
    assert {"rollout/answers", "rollout/cut_off", "rollout/tokens"} <= logged.values.keys()
    assert "50% had an answer that the student wrote" in (FOLDER / "model/README.md").read_text()
    shutil.rmtree(FOLDER)
    with pytest.raises(Interrupted):
        trained(StopsAt(3))
    assert trained(Run(None)) == expected


class Logs(Run):
    """A run that records the metrics logged to it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.values: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.values |= values


def test_two_processes_that_accumulate_train_as_one(gkd: Path, own_environment: None) -> None:
    put(gkd, reuse=2)
    legible(gkd)
    _, expected = trained(Run(None))
    shutil.rmtree(FOLDER)
    write_params(gkd, "distill", {"micro_batch_size": 1})
    launch(runtime(devices=2), "cpu", ["--arm", "gkd"])
    losses = (FOLDER / "losses.jsonl").read_text()
    for one_process, two_processes in zip(expected.splitlines(), losses.splitlines(), strict=True):
        assert json.loads(two_processes) == pytest.approx(json.loads(one_process), rel=1e-4)


LORA = {"rank": 4, "alpha": 8, "dropout": 0.5, "targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("arms", "distills"),
    [
        ({}, {"gradient_checkpointing": True}),
        ({}, {"precision": "bf16"}),
        ({}, {"trainable": {"vision_tower": False, "projector": True, "language_model": True, "lora": LORA}}),
        ({"weights": {"kd": 1.0, "iva": 1.0, "tpa": 1.0, "va_kd": 1.0}}, {}),
    ],
    ids=["checkpointing", "bf16", "lora", "terms"],
)
def test_beside_other_options(
    gkd: Path, request: pytest.FixtureRequest, arms: dict[str, Any], distills: dict[str, Any]
) -> None:
    for when in (lambda reset: reset(), request.addfinalizer):  # a process has one precision
        when(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    put(gkd, **arms)
    write_params(gkd, "distill", distills)
    lines = [json.loads(line) for line in trained(Run(None))[1].splitlines()]
    assert all(line[name] > 0 for line in lines for name in load_settings().arm("gkd").weights)


@pytest.mark.parametrize(
    ("arms", "distills", "message"),
    [
        ({"weights": {"sft": 1.0, "kd": 1.0}}, {}, "sft take the data's answers"),
        ({"weights": {"hybrid": 1.0, "dkd": 1.0}}, {}, "dkd, hybrid take"),
        ({"weights": {"tpa": 1.0}, "tpa": {"source": "gold"}}, {}, "tpa take"),
        (
            {"kd": {}},
            {"teacher_signals": {"source": "cache", "kind": "top_k", "top_k": 4, "draws": 50, "evidence": None}},
            "the cache holds the teacher at the data's answers",
        ),
        ({}, {"micro_batch_tokens": 64}, "micro_batch_tokens to null"),
        ({"weights": {"tpa": 1.0}}, {"gradient_checkpointing": True}, "set flex_attention to false"),
        ({"share": 0.0}, {}, "greater than 0"),
    ],
)
def test_what_cannot_be_combined_is_refused(gkd: Path, arms: dict[str, Any], distills: dict[str, Any], message: str) -> None:
    options = {"tpa": load_settings().distill.tpa.model_dump() | arms["tpa"]} if "tpa" in arms else {}
    put(gkd, **arms | options)
    write_params(gkd, "distill", distills)
    with pytest.raises(SettingsError, match=f"arms.gkd.rollouts.*{message}"):
        load_settings()


def test_divided_weights_and_another_end_of_turn_are_refused(gkd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gkd / "artifacts/models/teachers/base/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "one"}))
    with pytest.raises(ModelError, match="eos_token_id is"):
        job()
    file.write_text((gkd / "artifacts/models/students/student/tokenizer_config.json").read_text())
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match="rollouts are written with a student whose weights are whole"):
        job()


def test_an_arm_without_them_is_written_as_before(gkd: Path) -> None:
    assert "rollouts" not in load_settings().arm("gkd").model_copy(update={"rollouts": None}).model_dump_json()
