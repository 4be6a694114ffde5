"""What `alignti plan` says of a full-size recipe on a machine that has nothing of it."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.config import recipes
from components.config.data import LlavaFolder
from components.config.models import Checkpoint, Cut
from components.config.settings import Settings
from components.config.study import Arm, Rollouts, StudySettings
from components.cost import downloads, shapes, step
from components.cost import estimate as costs
from components.errors import InputError
from flows import cost_report
from tests.families import toy

ROOT = Path(__file__).parents[2]
NAME = "paper-qwen2.5-0.5b"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone without data, with an empty cache of the hub."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def rendered(name: str, root: Path) -> str:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    cost_report.show(name, recipes.settings_with(name, root), root, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_all_runs_and_all_that_is_missing_are_told(root: Path) -> None:
    text = rendered(NAME, root)
    for run in ("teacher-align", "teacher ", "align ", " (these params)"):
        assert f"{NAME}/{run}" in text or f"{NAME}{run}" in text
    for source in ("Qwen/Qwen2.5-7B@d1497293", "Qwen/Qwen2.5-0.5B@060db649", "siglip-so400m-patch14-384@9fdffc58"):
        assert text.count(source) == 1
    assert "MobileVLM_V2_FT_Mix2M.json, 2,428,000 rows" in text and "data/llava/pretrain (images)" in text
    assert "15.2" in text and "of unknown size" in text and "not gated" in text
    assert "an assumed share" in text
    assert "artifacts/students" not in text


def test_answers_that_a_student_writes_in_training_cost_their_time_once(root: Path) -> None:
    settings, about = recipes.settings_with(NAME, root), recipes.about(NAME, root)
    name, arm = next(iter(settings.study.arms.items()))
    hours = []
    for share in (None, 0.5, 1.0):
        rollouts = share and Rollouts(share=share, temperature=1.0, top_p=None, max_new_tokens=32, reuse=1)
        study = settings.study.model_copy(update={"arms": {name: arm.model_copy(update={"rollouts": rollouts})}})
        cost = costs.estimate(NAME, settings.model_copy(update={"study": study}), root)
        assert cost is not None
        hours.append(cost.hours[f"distill@{name}"])
    assert about.device and about.sample and settings.models.pretrained
    student = costs._model(settings.models.pretrained.students[arm.student], NAME, settings, root)
    distill = settings.distill
    answers, batch = distill.steps * distill.batch_size, distill.batch_size // settings.runtime.devices
    prompt, device = student.visual + about.sample.text, step.DEVICES[about.device]
    writing = step.generation_hours(student, answers, batch, prompt, min(32, about.sample.response), device)
    assert [h - hours[0] for h in hours] == pytest.approx([0, writing / 2, writing])
    runtime = settings.runtime.model_copy(update={"devices": distill.batch_size + 1})  # some have no sample
    cost = costs.estimate(NAME, settings.model_copy(update={"study": study, "runtime": runtime}), root)
    assert cost is not None and cost.hours[f"distill@{name}"] > hours[2]


def test_an_arm_costs_what_its_own_alternatives_do_and_no_teacher_where_it_reads_the_cache(root: Path) -> None:
    settings = recipes.settings_with(NAME, root)
    signals = settings.distill.teacher_signals.model_copy(update={"source": "cache"})
    cached = settings.model_copy(update={"distill": settings.distill.model_copy(update={"teacher_signals": signals})})
    live, cheaper = costs.estimate(NAME, settings, root), costs.estimate(NAME, cached, root)
    assert live is not None and cheaper is not None and "cache_teacher" not in live.hours
    less = {arm: live.hours[f"distill@{arm}"] - cheaper.hours[f"distill@{arm}"] for arm in settings.study.arms}
    assert less["sft"] == less["align_ti"] == 0, "no teacher, and one that no cache serves"
    assert less["kd"] == pytest.approx(cheaper.hours["cache_teacher"], rel=0.2), "the pass that is made once"
    arms = {name: arm for name, arm in settings.study.arms.items() if name == "kd"}
    alone = costs.estimate(NAME, cached.model_copy(update={"study": settings.study.model_copy(update={"arms": arms})}), root)
    assert alone is not None and alone.memory["teacher"] == 0 < live.memory["teacher"]
    gold, one, drawn = {"tpa": {"source": "gold"}}, {"tpa": {"draws": 1}}, {"iva": {"rows": 64}}
    hours = [_hours_of(settings, own, root) for own in (gold, one, {}, drawn, drawn | {"kd": {"pooled": True}})]
    assert hours[0] < hours[1] < hours[2] == hours[4] and hours[3] < 0.95 * hours[2]


def _hours_of(settings: Settings, own: dict[str, Any], root: Path) -> float:
    """Of `align_ti` with other values in its blocks."""
    arm = settings.arm("align_ti")
    blocks = {name: getattr(arm, name).model_dump() | own.get(name, {}) for name in ("iva", "tpa", "divergence")}
    study = StudySettings(arms={"align_ti": Arm(**arm.model_dump() | {k: v for k, v in own.items() if k == "kd"} | blocks)})
    cost = costs.estimate(NAME, settings.model_copy(update={"study": study}), root)
    assert cost is not None
    return cost.hours["distill@align_ti"]


def test_the_evaluated_share_is_that_of_the_source_that_is_read(root: Path) -> None:
    settings = recipes.settings_with(NAME, root)
    own = LlavaFolder(annotations="rows.json", images="images", val=0.1, test=0.1)
    data = settings.data.model_copy(update={"source": "llava", "llava": own})
    assert settings.data.mixture is not None and settings.evaluate.split == "test"
    assert costs._share(settings.model_copy(update={"data": data})) == pytest.approx(0.1 / 0.8)


def test_data_that_a_pattern_names_is_found_wherever_it_lies(root: Path) -> None:
    (root / "rows-1.json").touch()
    for folder in (f"{root}/", ""):
        assert downloads._exists(f"{folder}rows-*.json", root) and downloads._exists(f"{folder}rows-[0-9].json", root)
        assert not downloads._exists(f"{folder}rows-*.parquet", root)


def test_what_is_here_is_not_missing(root: Path) -> None:
    settings = recipes.settings_with(f"{NAME}/align", root)
    before = {item.name for item in downloads.missing(settings, root)}
    snapshot = root / "hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32faf8b98477b0a26969ef7d8b9987"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    halfway = {item.name for item in downloads.missing(settings, root)}
    (snapshot / "model.safetensors").touch()
    (root / "data/sharegpt4v").mkdir(parents=True)
    (root / "data/sharegpt4v/one.jpg").touch()
    after = {item.name for item in downloads.missing(settings, root)}
    assert halfway == before and before - after == {"Qwen/Qwen2.5-0.5B@060db649", "data/sharegpt4v (images)"}


def test_a_student_that_a_run_will_make_has_the_shape_of_its_parts(root: Path) -> None:
    cost = costs.estimate(NAME, recipes.settings_with(NAME, root), root)
    align = costs.estimate(f"{NAME}/align", recipes.settings_with(f"{NAME}/align", root), root)
    assert cost is not None and align is not None
    assert cost.disk["students"] == 3 * align.disk["students"]
    assert cost.hours["distill@sft"] < cost.hours["distill@kd"] < cost.hours["distill@align_ti"]
    assert cost.seconds["distill@kd"] == pytest.approx(3600 * cost.hours["distill@kd"] / 8)


def test_a_config_that_is_here_comes_before_what_is_known(root: Path) -> None:
    settings = recipes.settings_with("qwen3-vl-8b-to-2b", root)
    plain = costs.estimate("qwen3-vl-8b-to-2b", settings, root)
    assert settings.models.pretrained is not None and plain is not None
    student = settings.models.pretrained.students["student"]
    assert isinstance(student, Checkpoint) and student.revision is not None
    shutil.copytree(toy.folder("qwen3_vl"), root / "hub/models--Qwen--Qwen3-VL-2B-Instruct/snapshots" / student.revision)
    toy_sized = costs.estimate("qwen3-vl-8b-to-2b", settings, root)
    assert toy_sized is not None and toy_sized.disk["students"] < plain.disk["students"] / 1000


def test_a_cut_student_is_smaller_and_an_unknown_model_is_named(root: Path) -> None:
    settings = recipes.settings_with("qwen3-vl-8b-to-2b", root)
    cut = costs._model(Cut(teacher="teacher", every=2, mlp=4096), "qwen3-vl-8b-to-2b", settings, root)
    teacher = shapes.MODELS["Qwen/Qwen3-VL-8B-Instruct"]
    assert cut.language.layers == 18 and cut.language.mlp == 4096 and cut.tower == teacher.tower
    with pytest.raises(InputError, match="the shape of me/mine is not known"):
        costs._model(Checkpoint(source="me/mine", revision="0" * 40), "qwen3-vl-8b-to-2b", settings, root)


def test_a_model_of_unknown_shape_costs_the_figures_and_not_the_list_of_what_is_missing(root: Path) -> None:
    path = root / "params/recipes/qwen3-vl-8b-to-2b.yaml"
    path.write_text(path.read_text().replace("Qwen/Qwen3-VL-2B-Instruct", "me/mine"))
    text = rendered("qwen3-vl-8b-to-2b", root)
    assert "Costs are not counted: the shape of me/mine is not known" in text and "`dvc repro obtain_models` brings it" in text
    assert "Not on this machine yet" in text and "me/mine@" in text and "GPU hours" not in text


def test_every_recipe_states_what_is_estimated_for_it_and_the_page_repeats_it() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    listed = set()
    for name in recipes.names(ROOT):
        about = recipes.about(name, ROOT)
        cost = costs.estimate(name, recipes.settings_with(name, ROOT), ROOT)
        if cost is not None:
            hours, gib = (float(re.match(r"about ([\d.]+) G", text)[1]) for text in (about.time, about.memory or ""))
            assert (hours, gib) == (pytest.approx(cost.device_hours, rel=0.05), pytest.approx(cost.gib, rel=0.05)), name
        same_run = repr(recipes.overlay(name, ROOT))  # a teacher's serves both students: the page has it once
        if same_run not in listed:
            row = (f"`{name}`", about.hardware, about.time, about.memory or "", about.result)
            assert f"| {' | '.join(cell.replace(' (docs/recipes.md)', '') for cell in row)} |" in page
        listed.add(same_run)


def test_published_targets_are_those_of_the_table() -> None:
    with (ROOT / "components/evaluate/published.csv").open(encoding="utf-8") as file:
        averages = {row["backbone"]: row["average"] for row in csv.DictReader(file) if row["method"] == "Align-TI"}
    targets = {}
    for name in recipes.names(ROOT):
        if stated := re.match(
            r"published: ([\d.]+) on average of six benchmarks \(Align-TI, ([\w.-]+) in", recipes.about(name, ROOT).result
        ):
            targets[stated[2]] = stated[1]
            assert stated[2].lower() in name
    assert targets == {backbone: averages[backbone] for backbone in targets} and len(targets) == 4
