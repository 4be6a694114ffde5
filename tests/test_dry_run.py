"""Every recipe at toy size over the stages' own code: data, models of its architecture, teacher, layer, two steps of an arm.

`shrunk` changes sizes, paths and numbers of steps alone, so that values of a recipe that do not go together go red.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from components.config import recipes
from components.config.load import load_settings
from components.config.models import Checkpoint
from components.config.settings import FILES, Settings
from components.dataset.prepare import prepare
from components.distill.__main__ import distill
from components.errors import ModelError
from components.irs.__main__ import main as search_layer
from components.models.__main__ import main as obtain_models
from components.records.paths import DATASET, IRS, MODELS, STUDENTS, TEACHER
from components.rows.__main__ import main as check_rows
from components.teacher.__main__ import main as select_teacher
from components.tracking.journal import Run
from tests.families import toy
from tests.families.parts import qwen_folder, siglip_folder

ROOT = Path(__file__).parents[1]
HUB: dict[str, Callable[[Path], Path]] = {
    "google/siglip-so400m-patch14-384": siglip_folder,
    "Qwen/Qwen2.5-7B": partial(qwen_folder, hidden=48),
    "Qwen/Qwen2.5-0.5B": partial(qwen_folder, tied=True),
    "Qwen/Qwen2.5-1.5B": partial(qwen_folder, tied=True),
    "Qwen/Qwen3-8B": partial(qwen_folder, kind="qwen3", chat=True, hidden=48),
    "Qwen/Qwen3-0.6B": partial(qwen_folder, kind="qwen3", chat=True, tied=True),
    "Qwen/Qwen3-1.7B": partial(qwen_folder, kind="qwen3", chat=True, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": partial(toy.save, "qwen2_5_vl", seed=1, layers=3),
    "Qwen/Qwen2.5-VL-3B-Instruct": partial(toy.save, "qwen2_5_vl", seed=2),
    "Qwen/Qwen3-VL-8B-Instruct": partial(toy.save, "qwen3_vl", seed=1, layers=3),
    "Qwen/Qwen3-VL-2B-Instruct": partial(toy.save, "qwen3_vl", seed=2),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": partial(toy.save, "smolvlm", seed=1, layers=3, px=24),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": partial(toy.save, "smolvlm", seed=2),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": partial(toy.save, "llava_onevision", seed=1, layers=3),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": partial(toy.save, "llava_onevision", seed=2),
}
LARGE = [name for name in recipes.names(ROOT) if recipes.about(name, ROOT).seconds is None]
SAME_TOY = {"paper-qwen2.5-1.5b", "paper-qwen3-1.7b"}  # as the smaller student's recipe but for the checkpoint and its path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all, as phases go on from one another's students; with a LLaVA folder of 16 images, two questions each."""
    root = tmp_path_factory.mktemp("dry-run")
    (root / "data/images").mkdir(parents=True)
    rows = []
    for i in range(16):
        (root / f"data/images/{i}.png").write_bytes(toy.png(40 - 12 * (i % 3), 16 + 12 * (i % 3), i))
        for question in ("what digit is at a1 ?", "is b2 green ?"):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "two red"}]
            rows.append({"id": str(len(rows)), "image": f"{i}.png", "conversations": turns})
    (root / "data/rows.json").write_text(json.dumps(rows))
    shutil.copytree(ROOT / "params", root / "params")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)  # of the whole process
        yield root


@pytest.fixture(autouse=True)
def precision_of_its_own() -> Iterator[None]:
    """accelerate keeps its first precision for the whole process, and other tests have another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def folder_of(source: str) -> str:
    """A hub id's toy folder, built on first use; the result of an earlier run stays where that left it."""
    if source.startswith("artifacts/"):
        return source
    folder = Path("hub") / source.replace("/", "--")
    return str(folder if folder.exists() else HUB[source](folder))


def shrunk(settings: Settings) -> dict[str, Any]:
    """`settings` with other sizes, paths and numbers of steps; everything else as it is."""
    raw = settings.model_dump(mode="json")
    mixture = raw["data"]["mixture"]
    mixture.update(val=0.2, test=0.2)
    for source in mixture["sources"].values():
        source.update(files="data/rows.json", images="data/images")
    for members in raw["models"]["pretrained"].values():
        for member in members.values():
            for checkpoint in (member, member.get("tower"), member.get("language_model")):
                if checkpoint is not None and "source" in checkpoint:
                    checkpoint.update(source=folder_of(checkpoint["source"]), revision=None)
    raw["data"]["images_per_shard"] = 8
    raw["teacher"]["samples"] = 2
    raw["irs"].update(images=2, overlays=1)
    raw["distill"].update(steps=2, batch_size=4, micro_batch_size=2, log_every=1)
    raw["evaluate"]["max_new_tokens"] = 2
    raw["runtime"].update(devices=1, accelerate=None, loaders=0, device="cpu", tracking_uri="journal")
    return raw


def dry_run(name: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> list[dict[str, float]]:
    """The losses of both steps."""
    raw = shrunk(recipes.settings_with(name, ROOT))
    change(raw)
    for file in FILES:
        Path(f"params/{file}.yaml").write_text(yaml.safe_dump(raw[file], sort_keys=False))
    settings = load_settings()
    for stale in (MODELS, TEACHER, IRS):
        shutil.rmtree(stale, ignore_errors=True)
    cached = Path("prepared") / "-".join(raw["data"]["mixture"]["sources"])
    if not cached.exists():
        prepare(settings.data, workers=1)
        shutil.copytree(DATASET, cached)
    shutil.rmtree(DATASET, ignore_errors=True)
    shutil.copytree(cached, DATASET)
    obtain_models()
    check_rows()
    select_teacher()
    search_layer()
    arm = list(settings.study.arms)[-1]
    shutil.rmtree(STUDENTS / arm, ignore_errors=True)
    distill(arm, settings.arm(arm), settings, Run(None))
    return [json.loads(line) for line in (STUDENTS / arm / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", sorted({name.partition("/")[0] for name in LARGE} - SAME_TOY))
def test_a_recipe_runs_at_toy_size(family: str, workplace: Path) -> None:
    """Its phases first, in their order; those of a teacher that another recipe has trained already are not trained again."""
    for name in [*(f"{family}/{phase}" for phase in recipes.phases(family, ROOT)), family]:
        settings = recipes.settings_with(name, ROOT)
        arm = list(settings.study.arms)[-1]
        if name != family and (STUDENTS / arm / "model").exists():
            continue
        losses = dry_run(name)
        terms = set(settings.study.arms[arm].weights)
        assert len(losses) == 2 and terms == ({"sft"} if "/" in name else {"sft", "kd", "iva", "tpa"})
        assert all(line[term] > 0 for line in losses for term in terms)


@pytest.mark.parametrize("family", sorted({name.partition("/")[0] for name in LARGE}))
def test_a_recipe_goes_on_from_models_that_its_phases_leave(family: str) -> None:
    left: set[str] = set()
    for name in [*(f"{family}/{phase}" for phase in recipes.phases(family, ROOT)), family]:
        settings = recipes.settings_with(name, ROOT)
        assert settings.models.pretrained is not None
        members = [*settings.models.pretrained.teachers.values(), *settings.models.pretrained.students.values()]
        used = {m.source for m in members if isinstance(m, Checkpoint) and m.source.startswith("artifacts/")}
        assert used <= left, f"{name} starts from {sorted(used - left)}, which no phase before it leaves"
        left |= {(STUDENTS / arm / "model").as_posix() for arm in settings.study.arms}


def test_values_that_do_not_go_together_go_red(workplace: Path) -> None:
    with pytest.raises(ModelError, match="visual tokens per image"):
        dry_run("smolvlm2-2.2b-to-500m", lambda raw: raw["models"].update(image_splitting=True))
