import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.errors import ModelError
from components.io import sha256
from components.models.__main__ import main
from components.process import exit_from
from components.records.models import ModelIndex
from components.records.paths import MODELS
from tests.families.parts import qwen_folder, siglip_folder
from tests.models.conftest import NV, family, saved, word_processor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the shipped params and the tiny data set."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    shutil.copytree(dataset, tmp_path / "artifacts" / "dataset")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNTI_TRACKING_URI", "journal")
    monkeypatch.setenv("ALIGNTI_THREADS", "1")
    return tmp_path


def set_models(root: Path, **settings: object) -> None:
    (root / "params" / "models.yaml").write_text(yaml.safe_dump({**json.loads(family(2).model_dump_json()), **settings}))


def test_embedded_family_is_indexed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_models(root)
    (root / MODELS / "teachers" / "stale").mkdir(parents=True)
    main()
    index = ModelIndex.read(MODELS / "index.json")
    assert sorted(index.teachers) == ["base", "small"] and sorted(index.students) == ["student"]
    assert sorted(p.name for p in (MODELS / "teachers").iterdir()) == ["base", "small"]
    base = index.teachers["base"]
    assert (base.role, base.origin, base.revision, base.visual_tokens) == ("teacher", "embedded", None, NV)
    assert base.path == "artifacts/models/teachers/base" and base.sha256 == sha256([Path(base.path)])
    assert base.parameters > index.teachers["small"].parameters == index.students["student"].parameters
    last = capsys.readouterr().out.splitlines()[-1]
    sizes = r"teachers base 0.\d\dM, small 0.\d\dM; students student 0.\d\dM"
    assert re.fullmatch(rf"obtain_models: {sizes} parameters; in .* s -> artifacts/models/index.json", last)


def test_pretrained_family_is_indexed(root: Path) -> None:
    folder = saved(root / "theirs", word_processor())
    checkpoint = {"source": str(folder), "revision": None}
    pretrained = {"teachers": {"theirs": checkpoint}, "students": {"student": checkpoint}}
    set_models(root, family="pretrained", embedded=None, pretrained=pretrained)
    main()
    entry = ModelIndex.read(MODELS / "index.json").teachers["theirs"]
    assert (entry.origin, entry.revision, entry.visual_tokens) == (str(folder), None, NV)


def test_models_made_of_parts_and_cut_from_a_teacher_are_indexed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, words = siglip_folder(root / "siglip"), qwen_folder(root / "qwen", "qwen3")
    parts = {"tower": str(tower), "language_model": str(words)}
    spec = {name: {"source": source, "revision": None} for name, source in parts.items()} | {"feature_layer": -2, "seed": 1}
    students = {"student": spec, "cut": {"teacher": "made", "every": 2, "mlp": 16}}
    set_models(root, family="pretrained", embedded=None, pretrained={"teachers": {"made": spec}, "students": students})
    main()
    index = ModelIndex.read(MODELS / "index.json")
    teacher, student, less = index.teachers["made"], index.students["student"], index.students["cut"]
    assert (teacher.origin, teacher.visual_tokens) == (f"{tower} + {words}", 4)
    assert sha256([Path(teacher.path)]) == sha256([Path(student.path)])
    assert less.origin == "teacher made, layers 0, 16 neurons of each MLP"
    hidden, layer = 32, 2 * 32 * (32 + 16) + 2 * 8 + 2 * 32  # q, o, k, v, their two norms, the layer's two
    assert teacher.parameters - less.parameters == layer + 3 * hidden * (48 + 48 - 16)


def test_a_refusal_is_one_sentence_and_leaves_no_index(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained = {role: {"student": {"source": "nowhere", "revision": None}} for role in ("teachers", "students")}
    set_models(root, family="pretrained", embedded=None, pretrained=pretrained)
    with pytest.raises(SystemExit) as end:
        exit_from(main)
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("ModelError: nowhere: no such folder")
    assert not (MODELS / "index.json").exists()


def test_a_template_that_cannot_serve_is_refused_before_any_model_is_obtained(root: Path) -> None:
    good, bad = (saved(root / name, word_processor()) for name in ("good", "bad"))
    (bad / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    pretrained = {
        role: {name: {"source": str(folder), "revision": None}}
        for role, name, folder in (("teachers", "good", good), ("students", "student", bad))
    }
    set_models(root, family="pretrained", embedded=None, pretrained=pretrained, template={"style": "processor", "system": ""})
    with pytest.raises(ModelError, match=r"bad: .*set template\.style: vicuna"):
        main()
    assert not MODELS.exists()


def test_room_imports_without_the_pipelines_packages() -> None:
    """A GPU box need not have them."""
    modules = [f"components.models.{path.stem}" for path in sorted((ROOT / "components" / "models").glob("*.py"))]
    packages = ["dvc", "prefect", "mlflow", "matplotlib", "typer", "ruamel"]
    code = f"import sys, {', '.join(modules)}\nprint([name for name in {packages} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
