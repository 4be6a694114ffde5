"""The distill stage as it is run: its outputs, determinism, accumulation, and what happens when it is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file

from components.config.load import load_settings
from components.dataset.shards import ImageRow, Turn
from components.distill.__main__ import distill
from components.errors import DataError, InputError, Interrupted, ModelError, SettingsError, TryAgainError
from components.models.checkpoint_folder import record
from components.models.template import Template
from components.records.dataset import Manifest
from components.records.distill import Cost
from components.records.models import ModelIndex
from components.records.paths import DATASET, IRS, MODELS, STUDENTS, TEACHER
from components.records.record import Absent
from components.records.teacher import TeacherChoice
from components.teacher_answers import __main__ as answers
from components.teacher_cache import __main__ as evidence
from components.teacher_cache.find_evidence import EvidencePass
from components.tracking.journal import Run
from tests.distill.conftest import REPOSITORY, STEPS, write_params
from tests.families import toy
from tests.families.test_several_images import conversation
from tests.shards import write_split
from tests.tried import keep_all


def run(arm: str = "align_ti") -> Path:
    settings = load_settings()
    distill(arm, settings.arm(arm), settings, Run(None))
    return STUDENTS / arm


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def command(arm: str) -> list[str]:
    return [sys.executable, "-m", "components.distill", "--arm", arm]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_an_arm_may_have_its_own_number_of_steps(workplace: Path) -> None:
    settings = load_settings()
    arm = settings.arm("kd").model_copy(update={"steps": 1})
    distill("kd", arm, settings, Run(None))
    assert Cost.read(STUDENTS / "kd/cost.json").steps == 1
    assert len((STUDENTS / "kd/losses.jsonl").read_text().splitlines()) == 1


def test_outputs_and_what_was_trained(workplace: Path) -> None:
    folder = run()
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == list(range(1, STEPS + 1))
    assert all(line[term] > 0 for line in losses for term in ("sft", "kd", "iva", "tpa"))
    assert losses[0]["total"] == pytest.approx(sum(losses[0][term] for term in ("sft", "kd", "iva", "tpa")))
    cost = Cost.read(folder / "cost.json")
    assert cost.steps == STEPS and cost.step_seconds is not None and cost.peak_memory_mib > 50
    assert 0 < cost.step_seconds < cost.train_seconds
    initial, trained = (
        load_file(path / "model.safetensors") for path in (Path("artifacts/models/students/student"), folder / "model")
    )
    changed = {name for name in initial if not torch.equal(initial[name], trained[name])}
    assert changed and not any("vision_tower" in name for name in changed)  # frozen, as params/distill.yaml says
    assert any("multi_modal_projector" in name for name in changed) and any("language_model" in name for name in changed)
    assert "1.0" in (folder / "model/README.md").read_text()
    assert not list(Path(".runs/distill").rglob("step-*")), "checkpoints of a finished arm are of no further use"


def test_the_student_loads_with_stock_transformers_and_answers(workplace: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = run("sft") / "model"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text="what digit is at a1 ?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what digit?"}]}]
    trained = Template.from_settings(load_settings().models.template).render(
        (Turn("<image>what digit?", ""),), ["<image>"], answer=False
    )
    assert processor.apply_chat_template(messages, tokenize=False) == trained.text  # what servers and kits will send it


def test_same_seed_same_bytes_and_another_seed_others(workplace: Path) -> None:
    first = weights(run())
    set_seed(12345)  # whatever the process did before must not matter
    assert weights(run()) == first
    study = json.loads(load_settings().study.model_dump_json())
    study["arms"]["align_ti"]["seed"] = 2
    write_params(workplace, "study", study)
    assert weights(run()) != first


@pytest.mark.parametrize("arm", ["kd", "align_ti"])
def test_accumulation_gives_the_same_training(workplace: Path, arm: str) -> None:
    full = {n: w.double() for n, w in load_file(run(arm) / "model/model.safetensors").items()}
    write_params(workplace, "distill", {"micro_batch_size": 1})
    split = load_file(run(arm) / "model/model.safetensors")
    start = load_file("artifacts/models/students/student/model.safetensors")
    for name in full:
        moved = (full[name] - start[name].double()).norm()
        assert (split[name].double() - full[name]).norm() <= 1e-3 * moved + 1e-6, name


FIELD: dict[str, dict[str, Any]] = {
    "taid": {"weights": {"sft": 1.0, "taid": 1.0}},
    "gkd": {
        "weights": {"kd": 1.0},
        "rollouts": {"share": 0.5, "temperature": 1.0, "top_p": None, "max_new_tokens": 6, "reuse": 2},
    },
    "seqkd": {"weights": {"sft": 1.0}, "answers": "teacher"},
    "mcd": {"weights": {"sft": 1.0, "kd": 1.0, "mcd": 1.0}},
    "va_kd": {"weights": {"sft": 1.0, "va_kd": 1.0}, "va_kd": {"cached": True}},
}
CACHED: dict[str, Any] = {
    "teacher_answers": {"samples": 2, "temperature": 1.0, "top_p": None, "max_new_tokens": 40},
    "teacher_signals": {
        "source": "live",
        "kind": "top_k",
        "top_k": 4,
        "draws": 50,
        "evidence": {"kinds": ["gradient", "blurred"], "share": 0.25},
    },
}


def assert_kill_9_changes_nothing(root: Path, arm: str, distill: dict[str, Any], seconds: int = 90) -> None:
    write_params(root, "distill", distill)
    expected = weights(run(arm))
    losses = (STUDENTS / arm / "losses.jsonl").read_text()
    write_params(root, "distill", distill | {"checkpoint_every": 3})
    killed = subprocess.Popen(command(arm), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(lambda: list(Path(f".runs/distill/{arm}").glob("*/step-*")), killed, seconds)
    killed.kill()
    killed.wait()
    left = list(Path(f".runs/distill/{arm}").glob("*/step-*"))
    assert left, "it was killed after a checkpoint and before the end"
    finished = subprocess.run(command(arm), env=environment(), capture_output=True, text=True, check=True)
    assert "resumed at step" in finished.stdout
    assert weights(STUDENTS / arm) == expected
    assert (STUDENTS / arm / "losses.jsonl").read_text() == losses


@pytest.mark.parametrize("arm", ["align_ti", *(pytest.param(name, marks=pytest.mark.live) for name in FIELD)])
def test_kill_9_in_mid_training_and_resume_gives_the_same_bytes(
    workplace: Path, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = {"steps": 40}
    if arm in FIELD:
        distill |= CACHED
        write_params(workplace, "study", {"arms": {arm: FIELD[arm] | {"student": "student", "seed": 1}}})
        write_params(workplace, "evaluate", {"baselines": [arm]})
        write_params(workplace, "distill", distill)
        monkeypatch.setattr(EvidencePass, "_right", lambda self, samples: [True] * len(samples))  # this teacher has not learnt
        evidence.build_signals(load_settings())
        answers.generate(load_settings())
    assert_kill_9_changes_nothing(workplace, arm, distill, seconds=600 if arm in FIELD else 90)


def show_several_images(root: Path, family: str) -> None:
    """A toy pair of the family, and rows of none to four images, in place of the workplace's own."""
    write_params(root, "models", {"max_length": 512})
    samples = [conversation(*counts) for counts in [(0,), (1,), (1, 1), (2, 1), (0, 2, 2)]]
    rows = [
        ImageRow(sample.image_id, sample.image, ((sample.id, sample.kind, sample.turns),), sample.more) for sample in samples
    ]
    shutil.rmtree(DATASET), shutil.rmtree(MODELS)
    train = write_split(DATASET / "train", rows, images_per_shard=9)
    Manifest(
        source="digits", rows_in=5, rows_out=5, quarantined=0, splits={"train": train}, digest=train.shards[0].sha256
    ).write(DATASET / "manifest.json")
    keep_all()
    teacher = Path(shutil.copytree(toy.folder(family, 1, 3), MODELS / "teachers/base"))
    student = Path(shutil.copytree(toy.folder(family, 2, 2), MODELS / "students/student"))
    index = ModelIndex(
        teachers={"base": record(teacher, "teacher", "toy", None, None)},
        students={"student": record(student, "student", "toy", None, None)},
    )
    index.write(MODELS / "index.json")
    TeacherChoice(name="base", path=str(teacher), sha256=index.teachers["base"].sha256).write(TEACHER / "choice.json")


@pytest.mark.live
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_kill_9_on_rows_of_none_to_four_images_and_resume_gives_the_same_bytes(workplace: Path, family: str) -> None:
    show_several_images(workplace, family)
    assert_kill_9_changes_nothing(workplace, "align_ti", {"steps": 40}, seconds=600)


@pytest.mark.parametrize("loaders", [0, 1])
def test_sigterm_to_the_whole_group_saves_and_leaves_with_143(workplace: Path, loaders: int) -> None:
    write_params(workplace, "distill", {"steps": 100_000, "checkpoint_every": 100_000})
    running = subprocess.Popen(
        command("align_ti"),
        env=environment() | {"ALIGNTI_LOADERS": str(loaders)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for(lambda: list(Path(".runs/journal").glob("*.jsonl")) and '"loss/sft"' in _journal(), running)
    os.killpg(running.pid, signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == Interrupted.exit_code == 143
    assert "saved; run the same command to go on" in errors
    (checkpoint,) = Path(".runs/distill/align_ti").glob("*/step-*")
    assert json.loads((checkpoint / "progress.json").read_text())["step"] == int(checkpoint.name.removeprefix("step-"))


def test_without_a_layer_an_arm_that_weighs_no_visual_tokens_is_trained_and_another_refused(workplace: Path) -> None:
    Absent(none="no image has two instructions").write(IRS / "layer.json")
    assert (run("kd") / "model").is_dir()
    with pytest.raises(DataError, match="holds no LayerChoice: no image has two instructions"):
        run("align_ti")


def test_a_checkpoint_of_other_settings_is_not_resumed(workplace: Path) -> None:
    write_params(workplace, "distill", {"steps": STEPS + 1})
    other = weights(run())
    write_params(workplace, "distill", {"steps": STEPS})
    assert weights(run()) != other


def test_a_half_written_checkpoint_is_ignored(workplace: Path) -> None:
    from components.distill.checkpoint import Checkpoints

    with Checkpoints.of("kd", "abc") as checkpoints:
        (checkpoints.folder / ".step-00000004.tmp").mkdir()
        assert checkpoints.latest() is None
        (checkpoints.folder / "step-00000009").mkdir()
        (checkpoints.folder / "step-00000010").mkdir()
        assert checkpoints.latest() == checkpoints.folder / "step-00000010"
        with pytest.raises(TryAgainError, match="another process is training this arm"), Checkpoints.of("kd", "abc"):
            pass


@pytest.mark.parametrize("progress", ['{"step": 4', '{"step": 4, "layout": "whole weights"}', "[]"])
def test_a_damaged_checkpoint_is_named_with_what_to_delete(progress: str, tmp_path: Path) -> None:
    from components.distill.checkpoint import Checkpoints

    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004/progress.json").write_text(progress)
    for name in ("model.safetensors", "random_states_0.pkl"):
        (tmp_path / "step-00000004" / name).touch()  # as a power cut leaves files
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=f"step-00000004 is damaged, so delete {tmp_path} to begin anew: "):
        Checkpoints.restore(accelerator, tmp_path / "step-00000004")


def test_a_checkpoint_without_its_random_state_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.distill.checkpoint import Checkpoints, layout

    accelerator, folder = Accelerator(cpu=True), tmp_path / "step-00000004"
    accelerator.prepare(torch.nn.Linear(1, 1))
    accelerator.save_state(str(folder))
    (folder / "progress.json").write_text(json.dumps({"step": 4, "layout": layout(accelerator)}))
    assert Checkpoints.restore(accelerator, folder) == {"step": 4}
    with monkeypatch.context() as patched, pytest.raises(OSError, match="too many"):
        too_many = OSError(errno.EMFILE, "too many open files")
        patched.setattr(accelerator, "load_state", Mock(side_effect=too_many))  # the machine's fault: nothing to delete
        Checkpoints.restore(accelerator, folder)
    (folder / "random_states_0.pkl").write_bytes((folder / "random_states_0.pkl").read_bytes()[:-100])
    with pytest.raises(InputError, match="is missing or cut off"):
        Checkpoints.restore(accelerator, folder)
    (folder / "random_states_0.pkl").unlink()
    with pytest.raises(InputError, match=r"is damaged, so delete .*/random_states_0\.pkl"):
        Checkpoints.restore(accelerator, folder)


def test_errors_name_what_to_change(workplace: Path) -> None:
    with pytest.raises(SettingsError, match="no arm 'alignti'; it has sft"):
        load_settings().arm("alignti")
    study = json.loads(load_settings().study.model_dump_json())
    study["arms"]["align_ti"]["iva"] = {"weighting": "layer", "layer": 2}
    write_params(workplace, "study", study)
    with pytest.raises(InputError, match=r"iva.layer is 2, but teacher .* has layers 0..1"):
        run()
    index = ModelIndex.read(MODELS / "index.json")
    index.model_copy(update={"students": {"old": index.students["student"]}}).write(MODELS / "index.json")
    with pytest.raises(ModelError, match=r"index.json has no student 'student'; `dvc repro obtain_models` makes it"):
        run()


def test_a_loss_that_is_not_finite_stops_with_the_samples(workplace: Path) -> None:
    from safetensors.torch import save_file

    path = Path("artifacts/models/students/student/model.safetensors")
    broken = load_file(path)
    name = next(n for n in broken if "norm.weight" in n and "vision" not in n)
    broken[name] = broken[name] * float("nan")
    save_file(broken, path, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"step 1: .*sft.* is not finite.*\d-(digit|list)"):
        run("sft")


def _journal() -> str:
    return "".join(path.read_text() for path in Path(".runs/journal").glob("*.jsonl"))


def _wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)
