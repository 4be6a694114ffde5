"""The stage as a whole: a complete data set or the previous one, and the closing line."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from components.config.data import DataSettings, LlavaFolder
from components.config.load import load_settings
from components.dataset import prepare as stage
from components.dataset import shard_jobs
from components.dataset.__main__ import unseen_by_dvc
from components.dataset.card import contact_sheet
from components.dataset.prepare import prepare
from components.dataset.shards import Sample, Samples, Turn
from components.errors import TryAgainError
from components.records.dataset import Manifest
from components.records.paths import SPLITS
from tests.dataset.conftest import REPOSITORY, Prepared


@pytest.fixture(scope="module")
def small(digits_settings: DataSettings) -> DataSettings:
    design = digits_settings.digits
    assert design is not None
    images = design.images.model_copy(update={"train": 6, "val": 4, "test": 4})
    return digits_settings.model_copy(update={"digits": design.model_copy(update={"images": images})})


def test_everything_is_there_and_nothing_else(prepared: Prepared) -> None:
    names = {str(path.relative_to(prepared.folder)) for path in prepared.folder.rglob("*") if path.is_file()}
    shards = {f"{split}/{shard.file}" for split in SPLITS for shard in prepared.manifest.splits[split].shards}
    assert names == shards | {"manifest.json", "card.md", "contact_sheet.png", "quarantine.jsonl", "provenance.jsonl"}
    assert Manifest.read(prepared.folder / "manifest.json") == prepared.manifest
    assert list(prepared.folder.parent.iterdir()) == [prepared.folder]
    assert (prepared.folder / "quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("linked", "images", "message"),
    [
        (None, "data/mine/images", ""),
        ("data/mine/images", "data/mine/images", "data.llava.images: data/mine/images is a link to {away}: DVC neither"),
        ("data/mine", "data/mine/images", "data.llava.images: data/mine is a link to {away}: DVC neither"),
        ("data/mine", "data/mine/*.tar", "data.llava.images: data/mine is a link to {away}: DVC neither"),
        ("data/mine/images/more", "data/mine/images", "data/mine/images/more is a link to {away}: DVC neither"),
        (None, "away", "data.llava.images: away is not under data/: DVC neither"),
    ],
)
def test_images_that_dvc_does_not_see_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: str | None, images: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away/images").mkdir(parents=True)
    (tmp_path / linked if linked else tmp_path / "data/mine/images/more").parent.mkdir(parents=True)
    if linked:
        (tmp_path / linked).symlink_to(tmp_path / "away")
    shipped = load_settings(REPOSITORY)
    llava = LlavaFolder(annotations=Path("data/rows.json"), images=Path(images), val=0.1, test=0.1)
    data = shipped.data.model_copy(update={"source": "llava", "llava": llava})
    warnings = list(unseen_by_dvc(shipped.model_copy(update={"data": data})))
    assert [message.format(away=tmp_path / "away") in line for line in warnings] == [True] * bool(message)


def test_the_card_has_counts_licence_hash_and_examples(prepared: Prepared) -> None:
    card = (prepared.folder / "card.md").read_text()
    for text in (
        prepared.manifest.digest,
        "CC BY 4.0",
        "Alpaydin",
        "contact_sheet.png",
        "| caption | 320 | 0 | 0 |",
        "difference",
    ):
        assert text in card
    with Image.open(prepared.folder / "contact_sheet.png") as sheet:
        assert sheet.width > 1000
        assert len(set(sheet.resize((60, 60)).getdata())) > 100  # pictures are on it


def test_a_full_disk_leaves_the_data_set_before_and_the_parts_to_go_on_from(
    raw_folder: Path, small: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "artifacts" / "dataset"
    first = prepare(small, raw_folder, target)
    other = small.model_copy(update={"seed": 2})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stage, "write_card", fail)
        with pytest.raises(TryAgainError, match=r"cannot grow .* free space and run again"):
            prepare(other, raw_folder, target)
    assert Manifest.read(target / "manifest.json") == first
    assert len(list(Samples(target, "train"))) == first.splits["train"].samples
    monkeypatch.setattr(shard_jobs, "write_part", None)  # it is not called again
    assert prepare(other, raw_folder, target) != first
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_run_left_does_not_matter(raw_folder: Path, small: DataSettings, tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    for name in (".dataset.draft", ".dataset.before"):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "shard-00000.arrow").write_bytes(b"half")
        (tmp_path / name / "stray").touch()
    prepare(small, raw_folder, target)
    assert list(tmp_path.iterdir()) == [target]
    assert not (target / "stray").exists()


def test_a_draft_of_other_handwriting_is_not_gone_on_from(
    raw_folder: Path, small: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(small, raw_folder, tmp_path / "expected")
    other, target = tmp_path / "raw", tmp_path / "dataset"
    shutil.copytree(raw_folder, other)
    head, *digits = (other / "digits.csv").read_text().splitlines(keepends=True)
    (other / "digits.csv").write_text("".join([head, *reversed(digits)]))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(stage, "write_card", None)  # after the last part
        prepare(small, other, target)
    shutil.copy2(raw_folder / "digits.csv", other / "digits.csv")
    assert prepare(small, other, target) == expected


def test_a_row_that_gets_lost_is_noticed(
    raw_folder: Path, small: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.grids.source

    def lossy(*given: object) -> object:
        source = real(*given)  # type: ignore[arg-type]
        rows = list(source.rows(0))
        monkeypatch.setattr(stage.grids.Digits, "rows", lambda self, part: iter(rows[1:]))
        return source

    monkeypatch.setattr(stage.grids, "source", lossy)
    with pytest.raises(AssertionError, match="neither stored nor quarantined"):
        prepare(small, raw_folder, tmp_path / "dataset")


def test_the_sheet_shows_long_texts_odd_shapes_and_rows_without_image() -> None:
    def sample(image: bytes | None, text: str) -> Sample:
        return Sample("id", "a/very/long/" * 9, "kind", image, (Turn(f"<image>\n{text}", text),))

    file = io.BytesIO()
    Image.new("RGB", (3000, 3), "red").save(file, "PNG")
    sheet = contact_sheet([[sample(None, "word " * 200)], [sample(file.getvalue(), "x" * 500)], [sample(None, "数字 é \n\n")]])
    assert sheet.width < 2000
    assert sheet.height < 1000


# --- the command ------------------------------------------------------------------------------------------------------


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "components.dataset"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "ALIGNTI_TRACKING_URI": "journal"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def workspace(tmp_path: Path, small: DataSettings) -> Path:
    shutil.copytree(REPOSITORY / "params", tmp_path / "params")
    content = yaml.safe_dump(small.model_dump(mode="json"))
    (tmp_path / "params" / "data.yaml").write_text(content)
    return tmp_path


def test_the_command_ends_with_one_line_that_says_what_it_made(workspace: Path, raw_folder: Path) -> None:
    shutil.copytree(raw_folder, workspace / "data")
    done = run(workspace)
    assert done.returncode == 0, done.stderr
    # 6 x (2 conversations of 4 questions + 2 captions) + 4 x 4 + 4 x 4
    assert done.stdout == (
        "prepare: 14 images, 56 samples in 3 splits, 0 quarantined -> artifacts/dataset (card.md, contact_sheet.png)\n"
    )
    assert (workspace / "artifacts" / "dataset" / "manifest.json").is_file()


def test_without_raw_data_the_command_says_how_to_get_them_and_exits_2(workspace: Path) -> None:
    done = run(workspace)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "DataError: data/digits.csv is missing; `git checkout data.dvc && make data` brings it"
    )
    assert not (workspace / "artifacts" / "dataset").exists()
