"""Several processes give what one gives: the same loss, the same weights, the same exit codes, resumable either way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, DynamoBackend
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.api import SignalException

from components.align_ti.terms import CORE
from components.config.load import load_settings
from components.config.runtime import RuntimeSettings
from components.dataset.shards import ImageRow, Turn
from components.distill.__main__ import distill
from components.distill.assemble import _accelerator as accelerator_of
from components.distill.launch import CONFIGS, check_world, launch, needs_launch
from components.errors import InputError, Interrupted
from components.records.dataset import Manifest
from components.records.paths import DATASET, ROWS, RUNS, STUDENTS
from components.tracking.journal import Run
from tests.distill.conftest import REPOSITORY, WORDS, _row, write_params
from tests.distill.test_stage import _journal, _wait_for, command, environment
from tests.shards import write_split
from tests.tried import keep_all, rewrite

ARM = "align_ti"


@pytest.fixture
def uneven(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workplace whose samples differ in length, and some of which have no image, so that ranks differ in every count; the
    projector has a learning rate of its own."""
    words = [
        ImageRow(f"text-{i}", None, ((f"t-{i}", "list", (Turn("list the red .", " ".join(WORDS[: 1 + i])),)),))
        for i in range(5)
    ]
    train = write_split(DATASET / "train", [*(_row(i) for i in range(8)), *words], images_per_shard=4)
    Manifest(
        source="digits", rows_in=13, rows_out=13, quarantined=0, splits={"train": train}, digest=train.shards[0].sha256
    ).write(DATASET / "manifest.json")
    keep_all()
    legible(workplace)
    rates = {"vision_tower": None, "projector": 1e-3, "language_model": None}
    write_params(workplace, "distill", {"learning_rates": rates})
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("ALIGNTI_DEVICE", "cpu")
    return workplace


def legible(workplace: Path) -> None:
    """Small steps, and a teacher who is sure of itself: what float32 sums differ by in their last digit stays in it.

    A divergence of 0.01 between two near-uniform distributions is the difference of numbers a hundred times as large.
    """
    optimiser = load_settings().distill.optimiser.model_dump(mode="json")
    write_params(workplace, "distill", {"optimiser": optimiser | {"learning_rate": 1e-4}})
    path = Path("artifacts/models/teachers/base/model.safetensors")
    weights = load_file(path)
    (head,) = (name for name in weights if "lm_head" in name)
    save_file(weights | {head: weights[head] * 50}, path, metadata={"format": "pt"})


def runtime(**values: Any) -> RuntimeSettings:
    return load_settings().runtime.model_copy(update={"device": "cpu", **values})


def alone(run: Run | None = None) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    settings = load_settings()
    distill(ARM, settings.arm(ARM), settings, run or Run(None))
    return results()


def results() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    folder = STUDENTS / ARM
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return losses, load_file(folder / "model/model.safetensors")


def assert_same_training(expected: tuple[list, dict], actual: tuple[list, dict]) -> None:
    for expected_line, actual_line in zip(expected[0], actual[0], strict=True):
        assert all(expected_line[term] > 0 for term in CORE), "each of the four terms is there to be compared"
        for name in (*CORE, "total"):
            assert actual_line[name] == pytest.approx(expected_line[name], rel=1e-6), (expected_line["step"], name)
        assert actual_line["grad_norm"] == pytest.approx(expected_line["grad_norm"], rel=1e-5)
    start = load_file("artifacts/models/students/student/model.safetensors")
    assert expected[1].keys() == actual[1].keys()
    for name, weight in expected[1].items():
        moved = (weight - start[name]).double().norm()
        assert (actual[1][name] - weight).double().norm() <= 1e-3 * moved + 1e-6, name


class StopsAt(Run):
    """A run that is told to stop once it has logged a step."""

    def __init__(self, step: int) -> None:
        super().__init__(None)
        self.step = step

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_checkpoint_of_rows_that_were_cut_otherwise_is_not_resumed(workplace: Path) -> None:
    with pytest.raises(Interrupted):
        alone(StopsAt(3))
    verdicts = np.load(ROWS / "train.npy")
    verdicts["turns"][:12] = 0
    rewrite("train", verdicts)
    found, _ = alone()
    shutil.rmtree(RUNS)
    assert found == alone()[0]


def test_one_process_then_two_then_one_train_as_one_and_sigterm_stops_two(uneven: Path) -> None:
    steps = 60
    write_params(uneven, "distill", {"steps": steps, "checkpoint_every": 1000})
    expected = alone()
    with pytest.raises(Interrupted, match="stopped at step 2"):
        alone(StopsAt(1))
    running = subprocess.Popen(
        command(ARM),
        env={**environment(), "ALIGNTI_DEVICES": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: '"step": 4' in _journal(), running, seconds=280)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=280)
    assert running.returncode == 143 and "run the same command to go on" in errors, errors
    assert '"status": "KILLED"' in _journal(), "it had time to end in order"
    two = [json.loads(line)["step"] for line in _journal().splitlines() if "loss/sft" in line and "final/" not in line]
    (checkpoint,) = Path(".runs/distill").rglob("step-*")
    assert two == list(range(3, 1 + json.loads((checkpoint / "progress.json").read_text())["step"])), (
        "resumed at 2, saved at the last"
    )
    assert two[-1] < steps
    assert_same_training(expected, alone())


def test_fsdp2_trains_as_one_process_with_its_teacher_sharded_too(uneven: Path, own_environment: None) -> None:
    write_params(uneven, "distill", {"checkpoint_every": 2})
    expected = alone()
    os.environ["ALIGNTI_TEACHER_SHARDED"] = "true"
    launch(runtime(devices=2, accelerate="fsdp2"), "cpu", ["--arm", ARM], module="tests.distill.fsdp2_on_cpu")
    assert_same_training(expected, results())


def test_the_first_failing_process_gives_its_exit_code(
    workplace: Path, own_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("fails.py").write_text("import os, sys, time\nsys.exit(75) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    with pytest.raises(SystemExit) as left:
        launch(runtime(devices=2), "cpu", [], module="fails")
    assert left.value.code == 75


def test_processes_that_did_not_come_up_as_asked_are_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    check_world(accelerator, runtime())
    with pytest.raises(InputError, match="2 processes were asked for, and 1 came up"):
        check_world(accelerator, runtime(devices=2))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP was asked for, and NO came up on cpu"):
        check_world(accelerator, runtime())


def test_processes_that_nobody_started_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2 .* unset it"):
        needs_launch(runtime())


def test_what_another_job_left_in_the_environment_changes_no_gradient(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = accelerator_of(load_settings().study.arms[ARM], load_settings())
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO


def test_a_configuration_that_is_not_there_is_refused_with_those_that_are(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"'fsdp' is none of .*ddp, ddp-cpu, deepspeed_zero2, deepspeed_zero3, fsdp2"):
        launch(runtime(devices=2, accelerate="fsdp"), "cpu", [])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("ddp-cpu", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
        ("deepspeed_zero3", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_the_shipped_configurations(name: str, kind: DistributedType) -> None:
    """It refuses keys that it does not know. What DeepSpeed makes of its own keys no test here covers."""
    config = load_config_from_file(str(REPOSITORY / CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "no"
    if kind == DistributedType.DEEPSPEED:
        supported = {field.name for field in fields(DeepSpeedPlugin)}
        plugin = DeepSpeedPlugin(**{key: value for key, value in config.deepspeed_config.items() if key in supported})
        assert plugin.zero_stage == int(name[-1]) and plugin.gradient_accumulation_steps == 1


def test_deepspeed_that_is_not_installed_is_refused(workplace: Path, own_environment: None) -> None:
    if find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed here")
    with pytest.raises(InputError, match="DeepSpeed is not installed"):
        launch(runtime(devices=2, accelerate="deepspeed_zero2"), "cuda", [])


@pytest.mark.parametrize("hidden", [False, True], ids=["as raised", "behind elastic's timer"])
def test_a_signal_is_an_interruption_wherever_it_comes(
    workplace: Path, own_environment: None, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    def stopped(_: Any) -> None:
        try:
            raise SignalException("Process got signal", signal.SIGTERM)
        finally:
            if hidden:  # as torch.distributed.elastic.metrics does
                raise UnboundLocalError("cannot access local variable 'start'")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", stopped)
    with pytest.raises(Interrupted, match="2 processes stopped by SIGTERM"):
        launch(runtime(devices=2), "cpu", [])


def test_a_checkpoint_of_another_layout_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        alone(StopsAt(1))
    (checkpoint,) = Path(".runs/distill").rglob("step-*")
    progress = json.loads((checkpoint / "progress.json").read_text())
    (checkpoint / "progress.json").write_text(json.dumps(progress | {"layout": "FSDP"}))
    with pytest.raises(InputError, match="saved under FSDP, and this is whole weights: go on as it began"):
        alone()
