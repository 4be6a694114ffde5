"""`alignti export`: the folder comes back as it was, rounded; whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, GenerationConfig

from components.config.settings import Settings
from components.distill.export import save
from components.errors import AlignTIError, DataError, InputError, ModelError, TryAgainError
from components.models.load import load
from components.records.paths import DATASET, STUDENTS
from components.release import export as module
from components.release.export import DTYPES, TOLERANCE, export
from tests.families import toy

MODEL = STUDENTS / "align_ti/model"
OUT = Path("out/mine")


def left_behind() -> list[str]:
    return sorted(str(path) for path in Path("out").rglob("*")) if Path("out").exists() else []


@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_transformers_reads_the_weights_rounded(dtype: str, project: Path, settings: Settings) -> None:
    report = export("align_ti", OUT, settings, dtype, "5GB", force=False)
    assert (report.dtype, report.samples, report.missing != []) == (dtype, 2, True) and report.kl <= TOLERANCE[dtype]
    if dtype == "fp32":
        assert (report.kl, report.same_answers) == (0, 2)
    else:
        assert report.kl > 0
    model = AutoModelForImageTextToText.from_pretrained(OUT)
    assert model.dtype == DTYPES[dtype]
    source = load(MODEL, "cpu").model.state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, source[key].to(DTYPES[dtype])), key
    assert left_behind()[0] == str(OUT) and not list(OUT.parent.glob(".*")), "no draft is left"
    assert str(OUT) in str(report) and f"in {dtype}" in str(report)


def test_without_a_dtype_it_stays_as_stored_and_shards_are_no_larger_than_asked(project: Path, settings: Settings) -> None:
    source = load(MODEL, "cpu", torch.bfloat16)
    save(Path("half"), source, module.Template("", style="processor").of(source.processor), "# It")
    assert module.stored_dtype(Path("half")) == "bf16" and module.stored_dtype(MODEL) == "fp32"
    report = export("half", OUT, settings, None, "40KB", force=False)
    shards = sorted(OUT.glob("*.safetensors"))
    assert report.dtype == "bf16" and len(shards) > 1 and (OUT / "model.safetensors.index.json").is_file()
    assert (OUT / "README.md").read_text() == "# It", "another's card goes along as it is"
    assert len({file.stat().st_mode for file in OUT.iterdir()}) == 1, "a server of another user reads them all, by the umask"


@pytest.mark.parametrize("style", ["vicuna", "processor"])
def test_it_is_compared_under_the_settings_system_text(style: str, project: Path, settings: Settings) -> None:
    """Which the project's template has built in, and a checkpoint's own is given."""
    template = settings.models.template.model_copy(update={"style": style, "system": "be brief ."})
    settings = settings.model_copy(update={"models": settings.models.model_copy(update={"template": template})})
    assert export("align_ti", OUT, settings, None, "5GB", force=False).kl == 0


@pytest.mark.parametrize("ends", [None, 7, [7, 8]])
def test_stock_generation_stops_where_answers_end(ends: int | list[int] | None, tmp_path: Path) -> None:
    source = load(toy.folder("llava_onevision"), "cpu")
    source.model.generation_config.eos_token_id = ends
    save(tmp_path, source, module.Template("").of(source.processor), "# It")
    end = source.processor.tokenizer.eos_token_id
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [end, *([7] if ends == 7 else ends or [])]
    source.model.generation_config.eos_token_id = [7, end]
    save(tmp_path, source, module.Template("").of(source.processor), "# It")
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [7, end], "as it was"


def test_flags_that_stock_generation_ignores_stay_as_they_were(tmp_path: Path) -> None:
    """transformers reads a temperature without do_sample, and refuses to write it once another key is changed."""
    theirs = shutil.copytree(toy.folder("llava_onevision"), tmp_path / "theirs")
    (theirs / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7}))
    source = load(theirs, "cpu")
    save(tmp_path / "ours", source, module.Template("").of(source.processor), "# It")
    end = source.processor.tokenizer.eos_token_id
    written = json.loads((tmp_path / "ours/generation_config.json").read_text())
    assert written.items() >= {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [end, 7]}.items()


def test_what_is_there_stays_unless_forced(project: Path, settings: Settings) -> None:
    OUT.mkdir(parents=True)
    (OUT / "precious").write_text("mine")
    with pytest.raises(InputError, match=r"out/mine is there already; .*--force"):
        export("align_ti", OUT, settings, None, "5GB", force=False)
    with pytest.raises(InputError, match=r"out/mine holds no model, and --force replaces nothing else"):
        export("align_ti", OUT, settings, None, "5GB", force=True)
    assert left_behind() == ["out/mine", "out/mine/precious"]
    (OUT / "config.json").write_text("{}")
    export("align_ti", OUT, settings, None, "5GB", force=True)
    assert "out/mine/precious" not in left_behind() and (OUT / "model.safetensors").is_file()
    with pytest.raises(InputError, match=r"cat.png holds no model"):
        export("align_ti", Path("cat.png"), settings, None, "5GB", force=True)


def test_a_model_does_not_replace_itself(project: Path, settings: Settings) -> None:
    original = sorted((path, path.read_bytes()) for path in MODEL.iterdir())
    with pytest.raises(InputError, match="is the folder of align_ti itself"):
        export("align_ti", MODEL, settings, "bf16", "5GB", force=True)
    adapters = Path("adapters")
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(MODEL)}))
    with pytest.raises(InputError, match=r"is the folder of \./adapters itself, or of its base"):
        export("./adapters", MODEL, settings, "bf16", "5GB", force=True)
    assert sorted((path, path.read_bytes()) for path in MODEL.iterdir()) == original


FULL = {
    "Python": OSError(28, "No space left on device", "x"),
    "Rust": SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull }) (os error 28)"),
}


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_asks_to_try_again_and_leaves_nothing(
    error: str, exists: bool, project: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exists:
        OUT.mkdir(parents=True)
        (OUT / "config.json").write_text("mine")

    def full(folder: Path, *_: Any, **__: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise FULL[error]

    monkeypatch.setattr(module, "save", full)
    with pytest.raises(TryAgainError, match=r"out/mine was not written: the disk is full .*; free space") as refusal:
        export("align_ti", OUT, settings, None, "5GB", force=exists)
    assert refusal.value.exit_code == 75
    assert [path for path in left_behind() if path != "out/mine"] == (["out/mine/config.json"] if exists else [])


def test_weights_that_do_not_come_back_are_not_handed_on(
    project: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reopened = module.reload_exported

    def flipped(folder: Path) -> Any:
        loaded = reopened(folder)
        with torch.no_grad():
            next(loaded.model.parameters()).view(-1)[0] += 1
        return loaded

    monkeypatch.setattr(module, "reload_exported", flipped)
    with pytest.raises(ModelError, match="does not come back as it was saved"):
        export("align_ti", OUT, settings, None, "5GB", force=False)
    assert not left_behind()


def test_rounding_that_changes_answers_is_refused(project: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TOLERANCE, "bf16", 1e-9)
    with pytest.raises(ModelError, match=r"align_ti in bf16 answers differently: KL .* more than 1e-09; .* was not written"):
        export("align_ti", OUT, settings, "bf16", "5GB", force=False)
    assert not left_behind()


@pytest.mark.parametrize(
    ("name", "shard", "message", "kind"),
    [
        ("kd", "5GB", "artifacts/students/kd/model: no such folder", ModelError),
        ("align_ti", "5", "--max-shard-size 5: a number with KB, MB, GB or TB, such as 5GB", InputError),
        ("align_ti", "5GB", r"manifest.json is missing; `dvc repro` makes it", DataError),
    ],
)
def test_what_cannot_be_exported_is_refused(
    name: str, shard: str, message: str, kind: type[AlignTIError], project: Path, settings: Settings
) -> None:
    if kind is DataError:
        (DATASET / "manifest.json").unlink()
    with pytest.raises(kind, match=message):
        export(name, OUT, settings, None, shard, force=False)
    assert not left_behind()
