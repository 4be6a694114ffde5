"""A user's own data: what is kept, what is refused and why, and that nothing is lost."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from components.config.data import DataLimits, DataSettings, LlavaFolder
from components.dataset.mixture import assign
from components.dataset.prepare import prepare
from components.dataset.row import understand
from components.dataset.shards import Samples, Turn, open_shard, schema
from components.dataset.source import Provenance
from components.errors import DataError, Refusal
from components.records.dataset import Manifest
from components.records.paths import SPLITS
from tests.dataset.conftest import HERE, quarantine, stored, write_only

LIMITS = DataLimits(max_pixels=1_000_000, max_image_mib=1, max_text_chars=1000, max_bad_ratio=1)


def settings_for(annotations: Path, images: Path, **changes: Any) -> DataSettings:
    folder = LlavaFolder(annotations=annotations, images=images, val=0.25, test=0.25)
    data = DataSettings(source="llava", seed=1, images_per_shard=4, limits=LIMITS, digits=None, llava=folder, mixture=None)
    return data.model_copy(update=changes)


# --- a good set -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("llava") / "dataset"
    return folder, prepare(settings_for(HERE / "llava" / "annotations.json", HERE / "llava" / "images"), target=folder)


def test_every_row_of_a_good_set_is_stored(good: tuple[Path, Manifest]) -> None:
    folder, manifest = good
    rows = json.loads((HERE / "llava" / "annotations.json").read_text())
    assert (manifest.rows_in, manifest.rows_out, manifest.quarantined) == (len(rows), len(rows), 0)
    by_id = {sample.id: sample for sample in stored(folder)}
    assert set(by_id) == {str(row["id"]) for row in rows}
    for row in rows:
        sample = by_id[str(row["id"])]
        texts = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
        assert [text for turn in sample.turns for text in (turn.question.removeprefix("<image>\n"), turn.answer)] == texts
        if row.get("image"):
            assert sample.image == (HERE / "llava" / "images" / row["image"]).read_bytes()
            assert sample.image_id == row["image"]
            assert sample.kind == row.get("kind", "instruction")
            assert sample.turns[0].question.startswith("<image>\n")
        else:
            assert sample.image is None
            assert sample.kind == "text"


def test_rows_about_one_image_are_stored_once_with_it(good: tuple[Path, Manifest]) -> None:
    folder, manifest = good
    assert sum(split.images for split in manifest.splits.values()) == 12 + 2  # pictures, and text-only rows
    for split in SPLITS:
        samples = Samples(folder, split)
        for row in range(samples.images):
            about = [samples[i] for i in samples.of_image(row)]
            assert len({sample.image_id for sample in about}) == 1
            assert len(about) == (1 if about[0].image is None else 2)


def test_the_card_tells_the_counts_and_shows_examples(good: tuple[Path, Manifest]) -> None:
    folder, manifest = good
    card = (folder / "card.md").read_text()
    assert manifest.digest in card
    assert "contact_sheet.png" in card
    assert "What colour is it?" in card
    assert Image.open(folder / "contact_sheet.png").size > (800, 400)


# --- rows that cannot be used -----------------------------------------------------------------------------------------


def row(
    id_: str = "r", image: Any = "a.png", question: str = "<image>\nWhat?", answer: str = "That.", **more: Any
) -> dict[str, Any]:
    return {"id": id_, "image": image, "conversations": [turn("human", question), turn("gpt", answer)], **more}


def turn(role: Any, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


BAD_ROWS: dict[str, tuple[str, Any]] = {
    "not an object": ("wrong_type", ["a", "list"]),
    "id of a wrong type": ("wrong_type", row(id_=1.5)),
    "id true": ("wrong_type", row(id_=True)),
    "no conversations": ("missing_key", {"id": "r", "image": "a.png"}),
    "conversations of a wrong type": ("wrong_type", row() | {"conversations": "What?"}),
    "a turn of a wrong type": ("wrong_type", row() | {"conversations": ["What?", "That."]}),
    "a turn without from": ("missing_key", row() | {"conversations": [{"value": "What?"}, turn("gpt", "That.")]}),
    "a turn without value": ("missing_key", row() | {"conversations": [turn("human", "<image>"), {"from": "gpt"}]}),
    "a value of a wrong type": ("wrong_type", row(answer={"text": "That."})),
    "a value of null": ("missing_key", row(answer=None)),
    "a value of NaN": ("missing_key", row(answer=float("nan"))),
    "no turns": ("missing_key", row() | {"conversations": []}),
    "no question with an answer": ("turns", row() | {"conversations": [turn("human", "<image>\nAnd?")]}),
    "a question twice": ("turns", row() | {"conversations": [turn("human", "Well?"), *row()["conversations"]]}),
    "roles the wrong way round": ("turns", row() | {"conversations": row()["conversations"][::-1]}),
    "an unknown role": ("turns", row() | {"conversations": [turn("tool", "Be brief."), *row()["conversations"]]}),
    "empty answer": ("empty_answer", row(answer=" \n")),
    "empty question": ("empty_question", row(question="<image>\n ")),
    "two marks for one image": ("image_marks", row(question="<image><image>\nWhat?")),
    "a mark without image": ("image_marks", row(image=None)),
    "a mark in an answer": ("image_marks", row(answer="<image>")),
    "overlong": ("too_long", row(answer="x" * 1001)),
    "two images for one mark": ("image_marks", row(image=["a.png", "a.png"])),
    "image of a wrong type": ("wrong_type", row(image=3)),
    "image without a name": ("image_marks", row(image="")),
    "image above the folder": ("image_path", row(image="../secret.png")),
    "image above the folder by a detour": ("image_path", row(image="x/../../secret.png")),
    "image by absolute path": ("image_path", row(image="/etc/passwd")),
    "kind of a wrong type": ("wrong_type", row(kind=3)),
    "half a surrogate pair": ("wrong_type", row(answer="\ud800")),
    "missing file": ("missing_file", row(image="nowhere.png")),
    "a NUL in the path": ("missing_file", row(image="a\0.png")),
    "zero-byte file": ("zero_bytes", row(image="zero.png")),
    "truncated file": ("damaged", row(image="truncated.png")),
    "decompression bomb": ("too_large", row(image="bomb.png")),
    "no image": ("not_an_image", row(image="text.png")),
    "the same row again": ("duplicate_id", row(id_="good-0", image="0.png")),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(24):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    Image.fromarray(noise).save(folder / "a.png")
    (folder / "zero.png").touch()
    (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:150])
    (folder / "text.png").write_text("this is no image")
    Image.new("1", (5000, 5000)).save(folder / "bomb.png")
    (folder.parent / "secret.png").write_bytes((folder / "a.png").read_bytes())
    return folder


GOOD_ROWS = [row(f"good-{number}", f"{number}.png") for number in range(24)]


@pytest.mark.parametrize(("reason", "bad"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_quarantined_with_its_reason_and_the_rest_goes_on(
    images: Path, tmp_path: Path, reason: str, bad: Any
) -> None:
    annotations = tmp_path / "rows.jsonl"
    annotations.write_text("".join(json.dumps(r) + "\n" for r in [*GOOD_ROWS[:20], bad, *GOOD_ROWS[20:]]))
    manifest = write_only(settings_for(annotations, images), tmp_path / "dataset")
    (refused,) = quarantine(tmp_path / "dataset")
    assert (refused.row, refused.reason) == (21, reason)
    assert refused.detail
    assert "\n" not in refused.detail
    assert (manifest.rows_in, manifest.rows_out, manifest.quarantined) == (25, 24, 1)
    assert {sample.id for sample in stored(tmp_path / "dataset")} == {good["id"] for good in GOOD_ROWS}


@pytest.mark.parametrize("line", [b"{", b"nonsense", b'{"id": "\xff"}', b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"])
def test_a_line_that_is_no_json_is_quarantined(images: Path, tmp_path: Path, line: bytes) -> None:
    annotations = tmp_path / "rows.jsonl"
    lines = [json.dumps(good).encode() for good in GOOD_ROWS]
    annotations.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines, b"", line]) + b"\n")
    manifest = write_only(settings_for(annotations, images), tmp_path / "dataset")
    (refused,) = quarantine(tmp_path / "dataset")
    assert (refused.row, refused.reason, refused.id) == (26, "malformed_json", "26")
    assert (manifest.rows_in, manifest.rows_out) == (25, 24)


def test_all_rows_about_a_bad_image_are_quarantined_in_their_order(images: Path, tmp_path: Path) -> None:
    annotations = tmp_path / "rows.json"
    bad = [row("bad-0", "zero.png"), row("bad-1", "/etc/passwd"), row("bad-2", "zero.png")]
    annotations.write_text(json.dumps([bad[0], *GOOD_ROWS, *bad[1:]]))
    prepare(settings_for(annotations, images), target=tmp_path / "dataset")
    refusals = [(refused.row, refused.id, refused.reason) for refused in quarantine(tmp_path / "dataset")]
    assert refusals == [(1, "bad-0", "zero_bytes"), (26, "bad-1", "image_path"), (27, "bad-2", "zero_bytes")]


def test_links_that_the_user_put_into_the_folder_are_followed(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "elsewhere").symlink_to(images)
    annotations = tmp_path / "rows.json"
    annotations.write_text(json.dumps([row(good["id"], f"elsewhere/{good['image']}") for good in GOOD_ROWS]))
    assert prepare(settings_for(annotations, folder), target=tmp_path / "dataset").quarantined == 0


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_what_ends_a_line_for_some_ends_no_row(images: Path, tmp_path: Path, end: str) -> None:
    """Texts copied from pages hold them; JSON leaves them as they are."""
    annotations = tmp_path / "rows.json"
    bad = row(f"a{end}b", f"no{end}where.png")
    annotations.write_text(json.dumps([*GOOD_ROWS, row(f"c{end}d", "0.png", answer=f"red{end}green"), bad]))
    manifest = write_only(settings_for(annotations, images), tmp_path / "dataset")
    assert (manifest.rows_out, manifest.quarantined) == (25, 1)
    (refused,) = quarantine(tmp_path / "dataset")
    assert refused.id == bad["id"] and end in refused.detail
    (matching,) = (sample for sample in stored(tmp_path / "dataset") if sample.id == f"c{end}d")
    assert matching.turns[0].answer == f"red{end}green"


# --- too many, or nothing ---------------------------------------------------------------------------------------------


def test_past_the_ratio_the_stage_stops_and_leaves_the_list(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    annotations = tmp_path / "rows.json"
    annotations.write_text(
        json.dumps([*GOOD_ROWS, *(row(f"bad-{i}", "nowhere.png") for i in range(2)), row("bad-2", answer="")])
    )
    limits = LIMITS.model_copy(update={"max_bad_ratio": 0.1})
    with pytest.raises(DataError, match=r"3 of 27 rows are bad.*2 missing_file, 1 empty_answer") as stop:
        prepare(settings_for(annotations, images, limits=limits), target=tmp_path / "artifacts" / "dataset")
    assert stop.value.exit_code == 2
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != annotations]
    assert [path.relative_to(tmp_path) for path in left] == [Path(".runs/prepare/quarantine.jsonl")]
    assert str(Path(".runs/prepare/quarantine.jsonl")) in str(stop.value)
    assert len(left[0].read_text().splitlines()) == 3
    at_the_ratio = LIMITS.model_copy(update={"max_bad_ratio": 3 / 27})
    assert (
        prepare(settings_for(annotations, images, limits=at_the_ratio), target=tmp_path / "artifacts" / "dataset").quarantined
        == 3
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("[]", "holds no row"),
        ("", "holds no row"),
        ("[1, 2", "is no JSON list"),
        (json.dumps(GOOD_ROWS[:1]), "no image fell into"),
    ],
)
def test_annotations_that_are_no_data_set_are_an_error(images: Path, tmp_path: Path, content: str | None, message: str) -> None:
    annotations = tmp_path / "rows.json"
    if content is not None:
        annotations.write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(settings_for(annotations, images), target=tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_an_image_folder_that_is_not_there_is_an_error_not_a_quarantine(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        prepare(settings_for(HERE / "llava" / "annotations.json", tmp_path / "nowhere"), target=tmp_path / "dataset")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_copies_of_a_picture_under_other_names_never_cross_splits(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(24):
        with Image.open(images / f"{number}.png") as image:
            image.save(folder / f"{number}.png")
            image.save(folder / f"copy-{number}.bmp")
            image.save(folder / f"other-{number}.webp", lossless=True)
        rows += [row(f"{name}", name) for name in (f"{number}.png", f"copy-{number}.bmp", f"other-{number}.webp")]
    annotations = tmp_path / "rows.json"
    annotations.write_text(json.dumps(rows))
    manifest = prepare(settings_for(annotations, folder), target=tmp_path / "dataset")
    lines = (tmp_path / "dataset" / "provenance.jsonl").read_text().splitlines()
    origins = [Provenance.model_validate_json(line) for line in lines]
    assert {str(origin.file) for origin in origins} == {path.name for path in folder.iterdir()}
    splits_of: dict[str | None, set[str]] = {}
    for origin in origins:
        splits_of.setdefault(origin.sha256, set()).add(origin.split)
    assert len(splits_of) == 24
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert all(split.images for split in manifest.splits.values())


def test_shares_are_kept_and_the_seed_changes_who_goes_where() -> None:
    folder = LlavaFolder(annotations=Path("a"), images=Path("b"), val=0.1, test=0.2)
    splits = [assign(str(number), 1, folder) for number in range(4000)]
    counts = Counter(splits)
    assert counts["val"] == pytest.approx(400, abs=80)
    assert counts["test"] == pytest.approx(800, abs=110)
    assert splits == [assign(str(number), 1, folder) for number in range(4000)]
    assert splits != [assign(str(number), 2, folder) for number in range(4000)]


# --- nothing is lost --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "from": st.sampled_from(["human", "gpt", "system"]),
            "value": st.sampled_from(["<image>\nWhat?", "That.", "", "<image>"]) | JSON,
        }
    ),
    max_size=4,
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["a", "b", "good-3"]) | st.integers(0, 3) | JSON,
        "image": st.sampled_from(["1.png", "./1.png", "zero.png", "../x", "nowhere.png"]) | JSON,
        "conversations": st.just(row()["conversations"]) | TURNS | JSON,
        "kind": st.sampled_from(["colour"]) | JSON,
    },
)


@given(rows=st.lists(PLAUSIBLE | JSON, max_size=6), as_lines=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_rows_in_are_rows_out_and_quarantined(images: Path, tmp_path: Path, rows: list[Any], as_lines: bool) -> None:
    annotations, target = tmp_path / "rows", tmp_path / "dataset"
    everything = [*GOOD_ROWS, *rows]
    text = "".join(json.dumps(raw) + "\n" for raw in everything) if as_lines else json.dumps(everything)
    annotations.write_text(text)
    manifest = write_only(settings_for(annotations, images), target)
    refused = quarantine(target)
    samples = stored(target)
    assert manifest.rows_in == len(everything) == manifest.rows_out + manifest.quarantined
    assert len(samples) == manifest.rows_out
    assert len(refused) == manifest.quarantined
    assert len({sample.id for sample in samples}) == len(samples)
    ids = {str(raw["id"]) for raw in everything if isinstance(raw, dict) and "id" in raw} | {str(n + 1) for n in range(30)}
    assert {sample.id.partition("#")[0] for sample in samples} <= {id_.partition("#")[0] for id_ in ids}
    for sample in samples:
        assert [t.question.count("<image>") for t in sample.turns] == [int(sample.image is not None)] + [0] * (
            len(sample.turns) - 1
        )
        assert all(t.question.strip() and t.answer.strip() for t in sample.turns)


def test_many_questions_of_one_text_row_are_one_row(images: Path, tmp_path: Path) -> None:
    pairs = [{"user": f"What is number {n}? {'.' * 300}", "assistant": f"It is {n}."} for n in range(9)]
    rows = [{"id": f"t{n}", "texts": [{"user": "Which row?", "assistant": str(n)}, *pairs]} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    manifest = write_only(settings_for(tmp_path / "rows.json", images), tmp_path / "out")
    assert (manifest.rows_in, manifest.quarantined) == (12, 0)
    of_a_row = [sample for sample in stored(tmp_path / "out") if sample.image_id == "text:t3"]
    assert [sample.id for sample in of_a_row] == ["t3", "t3#2", "t3#3"]
    assert [turn.answer for sample in of_a_row for turn in sample.turns] == ["3", *(f"It is {n}." for n in range(9))]


def test_a_good_row_is_understood() -> None:
    parsed = understand(7, row("x", "./sub//a.png", "<image> What?", kind="colour"), LIMITS)
    assert parsed == (7, "x", "colour", ("sub/a.png",), ((Turn("<image>\nWhat?", "That."),),), {}, ())


BOXES = [[0, 0.25, 0.5, 1], [0.1, 0.2, 0.3, 0.4]]


def with_boxes(raw: dict[str, Any], boxes: Any) -> dict[str, Any]:
    human, *rest = raw["conversations"]
    return raw | {"conversations": [human | {"boxes": boxes}, *rest]}


def test_boxes_come_back_with_their_question_and_leave_other_data_sets_alone(images: Path, tmp_path: Path) -> None:
    annotations, target = tmp_path / "rows.json", tmp_path / "dataset"
    annotations.write_text(json.dumps(GOOD_ROWS))
    plain_manifest = write_only(settings_for(annotations, images), target)
    assert {open_shard(path).schema for path in target.glob("*/*.arrow")} == {schema(boxes=False)}
    plain = stored(target)
    first = GOOD_ROWS[0]
    boxed = [with_boxes(raw, BOXES) if raw is first else raw for raw in GOOD_ROWS]
    annotations.write_text(json.dumps(boxed))
    boxed_manifest = write_only(settings_for(annotations, images), target)
    assert boxed_manifest.digest != plain_manifest.digest
    by_id = {sample.id: sample for sample in stored(target)}
    turns = by_id.pop(str(first["id"])).turns
    assert turns[0].boxes == tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in BOXES)
    assert all(by_id[sample.id] == sample for sample in plain if sample.id in by_id)
    annotations.write_text(json.dumps([with_boxes(raw, None) for raw in GOOD_ROWS]))
    assert write_only(settings_for(annotations, images), target).digest == plain_manifest.digest


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("all of it", "a list of"),
        ([[0, 0, 1]], "a list of"),
        ([[0, 0, 1, "1"]], "four numbers"),
        ([[0, 0, 640, 480]], "shares of the image's width and height"),
        ([[0.5, 0, 0.5, 1]], "shares of the image's width and height"),
        ([[0, 0, float("nan"), 1]], "shares of the image's width and height"),
    ],
)
def test_boxes_that_are_none_are_refused(boxes: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        understand(1, with_boxes(row("x", "a.png", "What?\n<image>"), boxes), LIMITS)
    assert refusal.value.reason == "boxes"


def test_boxes_without_an_image_are_refused() -> None:
    with pytest.raises(Refusal, match="regions of one image, and the row has none"):
        understand(1, with_boxes(row("x", None, "What?"), BOXES), LIMITS)


def test_images_are_streamed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a row is handed on, the next image has not been read yet."""
    annotations = tmp_path / "rows.json"
    annotations.write_text(json.dumps(GOOD_ROWS))
    events: list[str] = []
    from components.dataset.readers import Store
    from components.dataset.shard_writer import SplitWriter

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(Store, "image", watched("read", Store.image))
    monkeypatch.setattr(SplitWriter, "add", watched("stored", SplitWriter.add))
    prepare(settings_for(annotations, images), target=tmp_path / "dataset")
    assert events == ["read", "stored"] * len(GOOD_ROWS)
