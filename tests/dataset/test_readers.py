"""The same rows and pictures from wherever they lie; what is cut off or damaged is reported in one sentence."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import errors as hub
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.config.data import DataLimits, DataSettings, Mixture, MixtureSource
from components.dataset import json_rows
from components.dataset.prepare import prepare
from components.dataset.readers import HUB, READERS, matching_files, store
from components.dataset.shards import Samples
from components.errors import DataError, Refusal, TryAgainError
from components.records.dataset import Overlap, Sources
from components.records.paths import SPLITS
from tests.dataset.conftest import HERE, REPOSITORY, quarantine, stored, write_only

LIMITS = DataLimits(max_pixels=100_000, max_image_mib=1, max_text_chars=1000, max_bad_ratio=1)
PICTURES = 24


def picture(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def conversations(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Number {number}."}]


def llava_rows() -> list[dict[str, Any]]:
    return [{"id": str(n), "image": f"in/{n}.png", "conversations": conversations(n)} for n in range(PICTURES)]


def tar_of(path: Path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_folder(root: Path) -> dict[str, Any]:
    (root / "images" / "in").mkdir(parents=True)
    for n in range(PICTURES):
        (root / "images" / "in" / f"{n}.png").write_bytes(picture(n))
    (root / "rows.json").write_text(json.dumps(llava_rows(), indent=1))
    return {"files": str(root / "rows.json"), "images": root / "images"}


def as_tars(root: Path) -> dict[str, Any]:
    for tar in range(2):
        tar_of(root / f"{tar}.tar", {f"./in/{n}.png": picture(n) for n in range(tar, PICTURES, 2)})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in llava_rows()))
    return {"files": str(root / "rows.jsonl"), "images": root / "*.tar"}


def as_webdataset(root: Path) -> dict[str, Any]:
    for tar, numbers in enumerate((range(10), range(10, PICTURES))):
        entries = {}
        for n in numbers:
            entries[f"{n:03d}.json"] = json.dumps({"id": n, "image": "elsewhere", "conversations": conversations(n)}).encode()
            entries[f"{n:03d}.PNG"] = picture(n)
        tar_of(root / f"{tar}.tar", entries)
    return {"files": str(root / "*.tar"), "images": None}


def as_parquet(root: Path) -> dict[str, Any]:
    for file, numbers in enumerate((range(10), range(10, PICTURES))):
        columns = {
            "id": [str(n) for n in numbers],
            "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers],
            "conversations": [conversations(n) for n in numbers],
        }
        pq.write_table(pa.table(columns), root / f"{file}.parquet", row_group_size=4)
    return {"files": str(root / "*.parquet"), "images": None}


def as_cauldron(root: Path) -> dict[str, Any]:
    columns = {
        "images": [[{"bytes": picture(n), "path": None}] for n in range(PICTURES)],
        "texts": [[{"user": "What?", "assistant": f"Number {n}.", "source": "x"}] for n in range(PICTURES)],
    }
    pq.write_table(pa.table(columns), root / "c.parquet", row_group_size=5)
    return {"files": str(root / "c.parquet"), "images": None}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": as_folder,
    "tars": as_tars,
    "webdataset": as_webdataset,
    "parquet": as_parquet,
    "cauldron": as_cauldron,
}


def settings_for(sources: dict[str, dict[str, Any]], **changes: Any) -> DataSettings:
    members = {name: MixtureSource(**{"weight": 1.0, "licence": "CC0", **options}) for name, options in sources.items()}
    mixture = {"val": 0.2, "test": 0.2, "near_duplicates": "report", "evaluation_images": [], "sources": members, **changes}
    return DataSettings(
        source="mixture", seed=1, images_per_shard=7, limits=LIMITS, digits=None, llava=None, mixture=Mixture(**mixture)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_come_from_every_kind_of_store(kind: str, tmp_path: Path) -> None:
    manifest = write_only(settings_for({"mine": KINDS[kind](tmp_path)}), tmp_path / "out")
    assert (manifest.rows_in, manifest.rows_out, manifest.quarantined) == (PICTURES, PICTURES, 0)
    contents = {(s.turns[0].question, s.turns[0].answer, s.image) for s in stored(tmp_path / "out")}
    assert contents == {("<image>\nWhat?", f"Number {n}.", picture(n)) for n in range(PICTURES)}
    assert all(s.id.startswith("mine/") and s.image_id.startswith("mine/") for s in stored(tmp_path / "out"))
    if kind != "cauldron":
        assert {s.id for s in stored(tmp_path / "out")} == {f"mine/{n}" for n in range(PICTURES)}


def test_several_sources_keep_apart_and_say_where_what_is_from(tmp_path: Path) -> None:
    sources = {}
    for name in ("folder", "parquet"):
        (tmp_path / name).mkdir()
        sources[name] = KINDS[name](tmp_path / name) | {"weight": 2.5 if name == "folder" else 0.5, "licence": f"of {name}"}
    (tmp_path / "folder" / "images" / "in" / "5.png").write_bytes(b"")
    manifest = prepare(settings_for(sources), target=tmp_path / "dataset", workers=1)
    assert (manifest.rows_in, manifest.rows_out) == (2 * PICTURES, 2 * PICTURES - 1)
    (refused,) = quarantine(tmp_path / "dataset")
    assert (refused.source, refused.row, refused.id, refused.reason) == ("folder", 6, "5", "zero_bytes")
    recorded = Sources.read(tmp_path / "dataset" / "sources.json").sources
    assert {name: (entry.weight, entry.licence, entry.rows) for name, entry in recorded.items()} == {
        "folder": (2.5, "of folder", PICTURES),
        "parquet": (0.5, "of parquet", PICTURES),
    }
    assert "| parquet | 24 | 0.5 | of parquet |" in (tmp_path / "dataset" / "card.md").read_text()
    by_split = {split: {s.image for s in Samples(tmp_path / "dataset", split)} for split in SPLITS}
    assert not by_split["train"] & by_split["test"] and not by_split["train"] & by_split["val"]  # copies in one split


@pytest.mark.parametrize("file", sorted((REPOSITORY / "params" / "mixtures").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_mixtures_are_valid_and_their_addresses_pinned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture.model_validate(yaml.safe_load(file.read_text()))
    assert mixture.sources
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for entry in mixture.sources.values():
        if entry.files.startswith(HUB):
            with pytest.raises(TryAgainError):  # well-formed, and not here
                store(entry.files, entry.images)


# --- looks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["report", "drop"])
def test_training_images_that_look_like_evaluated_ones(policy: str, tmp_path: Path) -> None:
    """Every picture is there a second time, smaller: of a pair in different splits the one to train on is found."""
    member = as_folder(tmp_path)
    rows = llava_rows()
    for n in range(PICTURES):
        with Image.open(io.BytesIO(picture(n))) as image:
            image.resize((40, 40), Image.Resampling.LANCZOS).save(tmp_path / "images" / f"small-{n}.png")
        rows.append({"id": f"small-{n}", "image": f"small-{n}.png", "conversations": conversations(n)})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    benchmark = tmp_path / "benchmark"
    for folder in (benchmark, tmp_path / "disk"):
        folder.mkdir()
    (tmp_path / "disk" / "x.png").write_bytes(picture(1))
    (benchmark / "linked").symlink_to(tmp_path / "disk")
    (benchmark / "._x.png").write_bytes(b"of an archiver")
    data = settings_for({"mine": member}, near_duplicates=policy, evaluation_images=[benchmark])
    manifest = prepare(data, target=tmp_path / "dataset", workers=1)
    overlap = Overlap.read(tmp_path / "dataset" / "overlap.json")
    of_split = {split: {s.image_id for s in Samples(tmp_path / "dataset", split)} for split in SPLITS}
    held_out = of_split["val"] | of_split["test"]
    twins = {f"mine/in/{n}.png": f"mine/small-{n}.png" for n in range(PICTURES)}
    twins |= {small: large for large, small in twins.items()}
    everywhere = set().union(*of_split.values()) | {pair.train for pair in overlap.pairs}
    expected = {image for image in everywhere - held_out if twins[image] in held_out}
    expected |= {image for image in ("mine/in/1.png", "mine/small-1.png") if image in everywhere - held_out}
    assert expected and {pair.train for pair in overlap.pairs} == expected
    assert overlap.near == len(expected) and overlap.compared["test"] and overlap.compared[str(benchmark)] == 1
    assert sum(pair.verbatim for pair in overlap.pairs) == overlap.verbatim == sum(twins[i] in held_out for i in expected)
    if policy == "drop":
        assert overlap.dropped and not of_split["train"] & expected
        assert {
            f"mine/{'in/' if not bad.id.startswith('small') else ''}{bad.id}.png" for bad in quarantine(tmp_path / "dataset")
        } == expected
        assert {bad.reason for bad in quarantine(tmp_path / "dataset")} == {"near_duplicate"}
        assert manifest.rows_in == manifest.rows_out + len(expected)
        provenance = (tmp_path / "dataset" / "provenance.jsonl").read_text()
        assert len(provenance.splitlines()) == 2 * PICTURES - len(expected)
    else:
        assert not overlap.dropped and expected <= of_split["train"] and not manifest.quarantined


@pytest.mark.parametrize(("name", "message"), [("x.png", r"x\.png is none of JPEG"), ("x.txt", "holds no image")])
def test_an_evaluation_image_that_cannot_be_read_is_told_before_any_part(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / name).write_bytes(b"damaged")
    monkeypatch.setattr("components.dataset.prepare.make", None)  # it is not called
    with pytest.raises(DataError, match=rf"evaluation_images: .*{message}"):
        prepare(
            settings_for({"mine": as_folder(tmp_path)}, evaluation_images=[tmp_path / "benchmark"]), target=tmp_path / "dataset"
        )


def test_rows_that_share_a_picture_are_in_one_split_whatever_it_is_called(tmp_path: Path) -> None:
    """Chains of three pictures: rows show two each, the second by a copy's name; other rows show one."""
    member = as_folder(tmp_path)
    names = [f"in/{n}.png" for n in range(PICTURES)]
    for n in range(PICTURES):
        Image.open(tmp_path / "images" / names[n]).save(tmp_path / "images" / f"copy-{n}.bmp")
    pairs = [(n, n + 1) for n in range(PICTURES - 1) if n % 3 < 2]
    rows = llava_rows()
    for n, other in pairs:
        dialogue = [{"from": "human", "value": "Is <image>\nlike\n<image>?"}, {"from": "gpt", "value": f"{n} and {other}."}]
        rows.append({"id": f"{n}-{other}", "images": [names[n], f"copy-{other}.bmp"], "conversations": dialogue})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data, split_of = settings_for({"mine": member}, val=0.3, test=0.3), {}
    for workers in (1, 2):
        folder = tmp_path / f"out-{workers}"
        manifest = write_only(data, folder, workers)
        assert manifest.rows_out == manifest.rows_in == len(rows)
        by_id = {sample.id: (split, sample) for split in SPLITS for sample in Samples(folder, split)}
        split_of = {name: split for name, (split, _) in by_id.items()}
        for n, other in pairs:
            split, sample = by_id[f"mine/{n}-{other}"]
            assert split == split_of[f"mine/{n}"] == split_of[f"mine/{other}"] and sample.images[0] == picture(n)
            assert (sample.image_id, len(sample.images)) == (f"mine/{names[n]} + copy-{other}.bmp", 2)
            assert sample.turns[0].question == "Is <image>\nlike\n<image>?"
    assert len({split_of[f"mine/{n}"] for n in range(0, PICTURES, 3)}) > 1, "and chains are apart"
    overlap = Overlap.read(tmp_path / "out-1" / "overlap.json")
    assert sum(overlap.compared.values()) == PICTURES + 2 * len(pairs) and overlap.near == 0


def test_a_further_image_that_looks_like_an_evaluated_one_is_found_with_its_row(tmp_path: Path) -> None:
    """Rows show pictures n and n + 12; other rows a smaller copy of n + 12 alone."""
    asked_for, half, rows = as_folder(tmp_path), PICTURES // 2, []
    for n in range(half):
        with Image.open(io.BytesIO(picture(n + half))) as image:
            image.resize((40, 40), Image.Resampling.LANCZOS).save(tmp_path / "images" / f"small-{n}.png")
        turns = [{"from": "human", "value": "Is <image>\nlike\n<image>?"}, {"from": "gpt", "value": f"{n}."}]
        rows.append({"id": f"pair-{n}", "images": [f"in/{n}.png", f"in/{n + half}.png"], "conversations": turns})
        rows.append({"id": f"small-{n}", "image": f"small-{n}.png", "conversations": conversations(n)})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    manifest = prepare(settings_for({"mine": asked_for}, near_duplicates="drop"), target=tmp_path / "dataset", workers=1)
    split_of = {sample.id: split for split in SPLITS for sample in Samples(tmp_path / "dataset", split)}
    dropped = {one.id for one in quarantine(tmp_path / "dataset")}
    assert any(id_.startswith("pair") for id_ in dropped) and manifest.rows_in == len(split_of) + len(dropped)
    for n in range(half):
        splits = [split_of.get(f"mine/{kind}-{n}", "dropped") for kind in ("pair", "small")]
        assert "train" not in splits or splits == ["train", "train"]
        assert "dropped" not in splits or {"val", "test"} & set(splits)


# --- rows that cannot be used -----------------------------------------------------------------------------------------


def test_odd_samples_of_a_webdataset_are_quarantined(tmp_path: Path) -> None:
    good = {}
    for n in range(PICTURES):
        good |= {f"{n}.json": json.dumps({"conversations": conversations(n)}).encode(), f"{n}.png": picture(n)}
    text = json.dumps({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}).encode()
    bad = {"a.png": picture(1), "b.json": b"{", "c.json": b"[]", "d.json": text, "d.png": b"", "d.jpg": b"", "e.json": text}
    tar_of(tmp_path / "x.tar", {**good, **bad})
    write_only(settings_for({"mine": {"files": str(tmp_path / "x.tar"), "images": None}}), tmp_path / "out")
    assert [(refused.row - PICTURES, refused.reason) for refused in quarantine(tmp_path / "out")] == [
        (1, "missing_key"),
        (2, "malformed_json"),
        (3, "wrong_type"),
        (4, "zero_bytes"),
    ]
    assert "mine/x/e" in {sample.id for sample in stored(tmp_path / "out")}  # text alone


def test_odd_rows_of_parquet_are_quarantined(tmp_path: Path) -> None:
    image = {"bytes": picture(1), "path": None}
    columns = {
        "images": [[{"bytes": picture(n), "path": None}] for n in range(PICTURES)]
        + [[image, image], [{"bytes": None, "path": "x"}], [], None],
        "texts": [[{"user": "What?", "assistant": "That."}]] * (PICTURES + 4),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    manifest = write_only(settings_for({"mine": {"files": str(tmp_path / "x.parquet"), "images": None}}), tmp_path / "out")
    assert [(refused.row - PICTURES, refused.reason) for refused in quarantine(tmp_path / "out")] == [
        (2, "missing_file"),
    ]
    assert manifest.rows_out == PICTURES + 3  # two of text alone


def test_a_member_that_no_tar_file_has_is_quarantined(tmp_path: Path) -> None:
    member = as_tars(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"id": "x", "image": "in/x.png", "conversations": conversations(1)}))
    write_only(settings_for({"mine": member}), tmp_path / "out")
    (refused,) = quarantine(tmp_path / "out")
    assert (refused.row, refused.reason) == (PICTURES + 1, "missing_file")


# --- a picture is found by its place ----------------------------------------------------------------------------------


def image_by_answer(folder: Path) -> dict[str, bytes | None]:
    return {sample.turns[0].answer: sample.image for sample in stored(folder)}


def tar_entries(pictures: range, name: str = "{}") -> dict[str, bytes]:
    """WebDataset samples `{n}` of the pictures; the answer says which picture it is."""
    entries = {}
    for key, n in enumerate(pictures):
        entries[f"{name.format(key)}.png"] = picture(n)
        entries[f"{name.format(key)}.json"] = json.dumps({"conversations": conversations(n)}).encode()
    return entries


@pytest.mark.parametrize("with_ids", [True, False])
def test_tars_of_one_name_in_two_folders_keep_their_pictures(with_ids: bool, tmp_path: Path) -> None:
    for folder, numbers in (("a", range(12)), ("b", range(12, 24))):
        (tmp_path / folder).mkdir()
        entries = tar_entries(numbers)
        if with_ids:
            entries |= {
                f"{key}.json": json.dumps({"id": n, "conversations": conversations(n)}).encode()
                for key, n in enumerate(numbers)
            }
        tar_of(tmp_path / folder / "00000.tar", entries)
    manifest = prepare(
        settings_for({"mine": {"files": str(tmp_path / "*/00000.tar"), "images": None}}), target=tmp_path / "dataset", workers=1
    )
    assert (manifest.rows_out, manifest.quarantined) == (24, 0)
    assert image_by_answer(tmp_path / "dataset") == {f"Number {n}.": picture(n) for n in range(24)}
    assert len({sample.image_id for sample in stored(tmp_path / "dataset")}) == 24


def test_a_member_name_in_two_tar_files_is_refused_and_both_are_named(tmp_path: Path) -> None:
    member = as_tars(tmp_path)
    tar_of(tmp_path / "9.tar", {"in/0.png": picture(99)})
    write_only(settings_for({"mine": member}), tmp_path / "out")
    (refused,) = quarantine(tmp_path / "out")
    assert (refused.row, refused.reason) == (1, "ambiguous_name")
    assert "0.tar at byte 512" in refused.detail and "9.tar at byte 512" in refused.detail


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_images_in_the_rows_files_and_in_tar_files_beside_them_keep_apart(kind: str, tmp_path: Path) -> None:
    member = KINDS[kind](tmp_path)
    row = {"id": "named", "image": "k.png", "conversations": conversations(99)}
    if kind == "webdataset":
        tar_of(tmp_path / "9.tar", {"n.json": json.dumps(row).encode()})
    else:
        named = {key: [value] for key, value in row.items()} | {"image": [{"bytes": None, "path": "k.png"}]}
        kinds = pq.read_schema(tmp_path / "0.parquet")
        pq.write_table(pa.table(named, schema=kinds), tmp_path / "9.parquet")
    (tmp_path / "beside").mkdir()
    tar_of(tmp_path / "beside" / "k.tar", {"k.png": picture(99), "l.png": picture(98)})
    write_only(settings_for({"mine": member | {"images": tmp_path / "beside" / "*.tar"}}), tmp_path / "out")
    assert quarantine(tmp_path / "out") == []
    assert image_by_answer(tmp_path / "out") == {f"Number {n}.": picture(n) for n in (*range(PICTURES), 99)}


@pytest.mark.parametrize("images", [5, True, 0.5, {"a": 1}, "other.png", ["a.png"], []])
def test_whatever_a_row_says_of_images_its_picture_is_the_one_beside_it(images: Any, tmp_path: Path) -> None:
    entries = tar_entries(range(20))
    entries["3.json"] = json.dumps({"images": images, "conversations": conversations(3)}).encode()
    tar_of(tmp_path / "x.tar", entries)
    prepare(settings_for({"mine": {"files": str(tmp_path / "x.tar"), "images": None}}), target=tmp_path / "dataset", workers=1)
    assert image_by_answer(tmp_path / "dataset")["Number 3."] == picture(3)


def test_images_beside_a_row_stand_as_it_names_them(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>Compare."}, {"from": "gpt", "value": "That."}]
    entries = tar_entries(range(20))
    for key, name, listed in (("a", "images", ["in/a.r.png", "a.l.png"]), ("b", "image", ["b.r.png", "b.l.png"])):
        entries |= {f"{key}.l.PNG": picture(30), f"{key}.r.PNG": picture(31)}
        entries[f"{key}.json"] = json.dumps({name: listed, "conversations": turns}).encode()
    for key, name in (("c", "images"), ("d", "image")):  # one of the two is not there
        entries |= {f"{key}.png": picture(32)}
        row = {name: [f"{key}.png", "other.png"], "conversations": [{"from": "human", "value": "Compare."}, turns[1]]}
        entries[f"{key}.json"] = json.dumps(row).encode()
    tar_of(tmp_path / "x.tar", entries)
    write_only(settings_for({"mine": {"files": str(tmp_path / "x.tar"), "images": None}}), tmp_path / "out")
    images = {sample.id: sample.images for sample in stored(tmp_path / "out") if sample.turns[0].answer == "That."}
    assert images == dict.fromkeys(("mine/x/a", "mine/x/b"), (picture(31), picture(30)))
    assert [bad.id for bad in quarantine(tmp_path / "out")][-2:] == ["x/c", "x/d"]


def test_a_key_twice_in_a_tar_file_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in [*tar_entries(range(20)).items(), *tar_entries(range(30, 31)).items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest = write_only(settings_for({"mine": {"files": str(tmp_path / "x.tar"), "images": None}}), tmp_path / "out")
    assert [(bad.reason, "at bytes" in bad.detail) for bad in quarantine(tmp_path / "out")] == [("ambiguous_name", True)] * 2
    assert manifest.rows_in == 21 and "Number 0." not in image_by_answer(tmp_path / "out")


def test_the_members_of_a_sample_are_found_wherever_they_stand(tmp_path: Path) -> None:
    entries = tar_entries(range(PICTURES))
    pictures_first = {name: entries[name] for name in sorted(entries, key=lambda name: name.endswith(".json"))}
    pictures_first |= {"._3.json": b"what a Mac leaves", "__MACOSX/4.json": b"", "5.cls": b"7"}
    tar_of(tmp_path / "x.tar", pictures_first)
    write_only(settings_for({"mine": {"files": str(tmp_path / "x.tar"), "images": None}}), tmp_path / "out")
    assert image_by_answer(tmp_path / "out") == {f"Number {n}.": picture(n) for n in range(PICTURES)}


def test_members_that_may_be_pictures_are_never_left_out(tmp_path: Path) -> None:
    row = json.dumps({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}).encode()
    odd = {"a.mp4": b"x", "b.npy": b"x", "c.bin": b"\x93\x00", "d.0.jpg": picture(1), "d.1.jpg": picture(2)}
    entries = tar_entries(range(PICTURES)) | odd | {f"{key}.json": row for key in "abcde"} | {"e.input.jpg": picture(3)}
    tar_of(tmp_path / "x.tar", entries)
    write_only(settings_for({"mine": {"files": str(tmp_path / "x.tar"), "images": None}}), tmp_path / "out")
    reasons = [refused.reason for refused in quarantine(tmp_path / "out")]
    assert reasons == ["video", "unread_media", "unread_media"]
    images = {sample.id: sample.images for sample in stored(tmp_path / "out") if sample.turns[0].answer == "That."}
    assert images == {"mine/x/d": (picture(1), picture(2)), "mine/x/e": (picture(3),)}


def test_a_picture_that_is_not_beside_its_row_is_not_nothing(tmp_path: Path) -> None:
    """A row of text alone would be stored: the picture is a link, or lies in another folder of the tar file."""
    row = json.dumps({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}).encode()
    tar_of(
        tmp_path / "x.tar",
        {"images/a.png": picture(1), "rows/a.json": row, "rows/b.json": row, "c.json": b"{'a'}", "d.txt": b" "},
    )
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("rows/b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../images/a.png"
        tar.addfile(link)
    sources = {"mine": {"files": str(tmp_path / "x.tar"), "images": None}, "good": as_folder(tmp_path)}
    write_only(settings_for(sources), tmp_path / "out")
    assert [(refused.id, refused.reason) for refused in quarantine(tmp_path / "out")] == [
        ("x/images/a", "missing_key"),
        ("x/rows/a", "ambiguous_name"),
        ("x/rows/b", "unread_media"),
        ("x/c", "malformed_json"),
        ("x/d", "empty_answer"),
    ]
    assert "x/c.json: Expecting property name" in quarantine(tmp_path / "out")[3].detail


def test_a_tar_file_of_pictures_alone_is_refused_as_its_rows_would_be_text(tmp_path: Path) -> None:
    row = json.dumps({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}).encode()
    tar_of(tmp_path / "a.tar", {f"{n}.json": row for n in range(3)})
    tar_of(tmp_path / "b.tar", {f"{n}.png": picture(n) for n in range(3)})
    with pytest.raises(DataError, match=r"b\.tar holds pictures, videos or sounds, and no row"):
        list(store(f"{tmp_path}/*.tar", None).rows())


def test_whatever_else_a_tar_file_holds_is_counted_or_refused(tmp_path: Path) -> None:
    """Hidden files, two rows under one key, links without an ending, devices, and members stored in parts (tar -S)."""
    row = json.dumps({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}).encode()
    entries = dict.fromkeys(("a.json", "b.json", "c.json", ".d.json", "v1.0_a.json", "v1.0_b.json"), row)
    tar_of(tmp_path / "x.tar", entries | {".d.png": picture(1), "v1.0_a.png": picture(2), "._a.png": b"", ".DS_Store": b""})
    with tarfile.open(tmp_path / "x.tar", "a", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, link in (("a.jpg", tarfile.LNKTYPE, "blob"), ("b.jpg", tarfile.FIFOTYPE, ""), ("c.bmp", b"S", "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    sources = {"mine": {"files": str(tmp_path / "x.tar"), "images": None}, "good": as_folder(tmp_path)}
    manifest = write_only(settings_for(sources), tmp_path / "out")
    refusals = [(refused.id, refused.reason) for refused in quarantine(tmp_path / "out")]
    assert refusals == [(f"x/{key}", "unread_media") for key in "abc"] + [("x/v1", "missing_key")] * 2
    assert image_by_answer(tmp_path / "out")["That."] == picture(1) and manifest.rows_in == PICTURES + 6


@pytest.mark.parametrize("rows", [None, "rows.jsonl"])
def test_names_and_addresses_that_are_no_utf8_are_read_or_refused(rows: str | None, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in tar_entries(range(2), "Größe{}").items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    odd = ["Größe0.png", "data:image/png;base64,\ud800", "data:image/\ud800,x", "data:image/png,\ud800", "d" * 5000]
    lines = [json.dumps({"image": image, "conversations": conversations(1)}) + "\n" for image in odd]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    files, images = (tmp_path / "x.tar", None) if rows is None else (tmp_path / rows, tmp_path / "x.tar")
    sources = {"mine": {"files": str(files), "images": images}, "good": as_folder(tmp_path / "good")}
    write_only(settings_for(sources), tmp_path / "out")
    reasons = ["missing_file", "not_an_image", "not_an_image", "not_an_image", "missing_file"]
    assert [refused.reason for refused in quarantine(tmp_path / "out")] == ([] if rows is None else reasons)
    assert all(len(refused.detail) <= 500 for refused in quarantine(tmp_path / "out"))
    if rows is None:
        assert r"mine/x/Gr\xf6\xdfe1" in {sample.id for sample in stored(tmp_path / "out")}


def test_what_an_image_key_holds_is_told_by_its_kind(tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    inline = []
    for kind in ("BMP", "TIFF"):
        file = io.BytesIO()
        Image.open(io.BytesIO(picture(1))).save(file, kind)
        inline.append(base64.b64encode(file.getvalue()).decode())
    odd = ["in/a.MP4", "data:video/mp4;base64,AAAA", "in/a.wav", "data:audio/wav;base64,AAAA", "video/frames.mp4/1.png"]
    rows = [{"id": f"o{n}", "image": image, "conversations": conversations(99)} for n, image in enumerate([*inline, *odd])]
    (tmp_path / "rows.json").write_text(json.dumps([*llava_rows(), *rows]))
    pq.write_table(pa.table({"id": [b"7"], "conversations": [conversations(1)]}), tmp_path / "x.parquet")
    write_only(settings_for({"mine": member, "x": {"files": str(tmp_path / "x.parquet"), "images": None}}), tmp_path / "out")
    refusals = [(refused.id, refused.reason) for refused in quarantine(tmp_path / "out")]
    reasons = ["video", "video", "unread_media", "unread_media", "missing_file"]
    assert refusals == [*((f"o{n}", reason) for n, reason in enumerate(reasons, start=2)), ("x/1", "wrong_type")]
    assert "whole number, not bytes" in quarantine(tmp_path / "out")[-1].detail


def test_a_file_whose_own_name_is_no_utf8_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xf6.jsonl")).touch()
    with pytest.raises(DataError, match=r"rename.*udcf6"):
        store(str(tmp_path / "*.jsonl"), None)


def test_a_text_row_and_a_picture_may_share_a_name(tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    (tmp_path / "images" / "text:t").write_bytes(picture(50))
    text = {"id": "t", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    with_image = {"id": "u", "image": "text:t", "conversations": conversations(50)}
    (tmp_path / "rows.json").write_text(json.dumps([*llava_rows(), text, with_image]))
    write_only(settings_for({"mine": member}), tmp_path / "out")
    images = image_by_answer(tmp_path / "out")
    assert (images["So."], images["Number 50."]) == (None, picture(50))


def test_ids_that_repeat_are_made_unique_and_the_card_says_so(tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    rows = [row | {"id": "same"} for row in llava_rows()]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0]]))
    prepare(settings_for({"mine": member}), target=tmp_path / "dataset", workers=1)
    assert len({sample.id for sample in stored(tmp_path / "dataset")}) == PICTURES
    assert [refused.reason for refused in quarantine(tmp_path / "dataset")] == ["duplicate_id"]  # the very same row
    assert "| mine | repeated_id | 23 | row 2: 'same' became 'same#2' |" in (tmp_path / "dataset" / "card.md").read_text()


def test_what_is_long_in_a_row_is_short_in_the_card(tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    odd = {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": 10**900}], "k" * 5000: 1}
    (tmp_path / "rows.json").write_text(json.dumps([*llava_rows(), odd]))
    prepare(settings_for({"mine": member}), target=tmp_path / "dataset", workers=1)
    lines = [line for line in (tmp_path / "dataset" / "card.md").read_text().splitlines() if line.startswith("| mine")]
    assert max(map(len, lines)) < 600 and any("kkk ... kkk" in line for line in lines)


def test_rows_of_several_json_files_and_of_parquet_beside_a_folder(tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    (tmp_path / "rows.json").unlink()
    for name, numbers in (("0", range(10)), ("1", range(10, PICTURES))):
        lines = [json.dumps({k: v for k, v in llava_rows()[n].items() if k != "id"}) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    write_only(settings_for({"mine": member | {"files": str(tmp_path / "*.jsonl")}}), tmp_path / "out")
    assert {sample.id for sample in stored(tmp_path / "out")} == {f"mine/{n + 1}" for n in range(PICTURES)}
    columns = {key: [row[key] for row in llava_rows()] for key in ("image", "conversations")}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    write_only(settings_for({"mine": member | {"files": str(tmp_path / "x.parquet")}}), tmp_path / "other")
    assert image_by_answer(tmp_path / "other") == {f"Number {n}.": picture(n) for n in range(PICTURES)}


@pytest.mark.parametrize("texts", [[{"question": "What?", "answer": "That."}], ["What?"], "What?"])
def test_conversations_that_parquet_files_hold_in_other_forms_are_quarantined(texts: Any, tmp_path: Path) -> None:
    good = as_cauldron(tmp_path)
    image = {"bytes": picture(1), "path": None}
    pq.write_table(pa.table({"images": [[image]], "texts": [texts]}), tmp_path / "odd.parquet")
    write_only(settings_for({"good": good, "odd": {"files": str(tmp_path / "odd.parquet"), "images": None}}), tmp_path / "out")
    (refused,) = quarantine(tmp_path / "out")
    assert refused.source == "odd" and refused.reason in ("missing_key", "wrong_type")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(llava_rows()).encode("utf-16"), "is UTF-16"),
        (gzip.compress(json.dumps(llava_rows()).encode()), "is compressed"),
        (json.dumps({"data": llava_rows()}, indent=1).encode(), "is one JSON object"),
        (json.dumps({"data": llava_rows()}).encode(), "is one JSON object"),
        (json.dumps({"set": {"root": "x", "annotation": "y.jsonl"}}).encode(), "is one JSON object"),
        (b"image,question\n1.png,What?\n", "begins with 'image,question"),
        (json.dumps(llava_rows()[:3]).encode()[:-2] + b", 5x}]", "after 2 rows, Expecting property name.*5x"),
    ],
)
def test_a_file_that_is_no_rows_is_said_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(settings_for({"mine": member}), target=tmp_path / "dataset", workers=1)


@pytest.mark.parametrize("ending", READERS)
def test_a_pointer_of_git_lfs_is_told_with_the_remedy(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"rows{ending}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=rf"rows{ending}: a pointer of Git LFS; `git lfs pull`"):
        store(str(tmp_path / f"rows{ending}"), None)


# --- files that cannot be used ----------------------------------------------------------------------------------------


def stored_images(path: Path, columns: dict[str, Any]) -> list[Any]:
    """The pictures of the rows of a Parquet file."""
    pq.write_table(pa.table(columns), path)
    reader = store(str(path), None)
    of_rows = [raw["image"] if isinstance(raw["image"], list) else [raw["image"]] for _, _, raw in reader.rows()]
    return [[reader.image(image.place, 1) for image in of_row] for of_row in of_rows]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([b"x", b"y"]).dictionary_encode(), [[b"x"], [b"y"]]),
        (pa.array([b"x", b"y"], pa.binary_view()), [[b"x"], [b"y"]]),
        (pa.array([[{"bytes": b"x"}, {"bytes": b"y"}]], pa.list_(STRUCT, 2)), [[b"x", b"y"]]),
        (pa.array([[{"bytes": b"x"}]], pa.large_list(STRUCT)), [[b"x"]]),
    ],
    ids=["dictionary", "view", "fixed list", "large list"],
)
def test_bytes_in_columns_of_every_kind(column: Any, expected: Any, tmp_path: Path) -> None:
    assert stored_images(tmp_path / "x.parquet", {"image": column}) == expected


def test_a_row_group_that_arrow_reads_in_no_one_piece_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of more than 2 GiB of pictures, as pandas writes them: a million rows in a group."""

    def overflow(*_: object, **__: object) -> None:
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", overflow)
    pictures = [bytes([number]) for number in range(40)]
    column = pa.array([{"bytes": content} for content in pictures], STRUCT)
    assert stored_images(tmp_path / "x.parquet", {"image": column}) == [[content] for content in pictures]


def test_a_null_of_a_list_of_pictures_keeps_its_place(tmp_path: Path) -> None:
    pq.write_table(pa.table({"images": pa.array([[None, {"bytes": b"x"}]], pa.list_(STRUCT))}), tmp_path / "x.parquet")
    ((_, _, raw),) = store(str(tmp_path / "x.parquet"), None).rows()
    assert raw["images"][0] is None and raw["images"][1].place[-1] == 1


def test_two_columns_of_one_name_refuse_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array([b"x"]), pa.array([b"y"])], names=["image", "image"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="the column image twice"):
        list(store(str(tmp_path / "x.parquet"), None).rows())


@pytest.mark.parametrize("several", [False, True])
def test_a_cell_without_bytes_is_the_file_that_it_names_or_nothing(several: bool, tmp_path: Path) -> None:
    member = as_folder(tmp_path)
    cells = [{"bytes": picture(0), "path": "in/9.png"}, {"bytes": None, "path": "in/1.png"}]
    cells += [{"bytes": None, "path": None}, None, {"bytes": None, "path": "in/gone.png"}]
    texts = [[{"user": "What?", "assistant": f"Number {n}."}] for n in range(len(cells))]
    columns = {"texts": texts, "images" if several else "image": [[cell] if several else cell for cell in cells]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=2)
    sources = {"odd": {"files": str(tmp_path / "x.parquet"), "images": member["images"]}, "good": member}
    write_only(settings_for(sources), tmp_path / "out")
    (refused,) = quarantine(tmp_path / "out")
    assert (refused.row, refused.reason) == (5, "missing_file") and "in/gone.png" in refused.detail
    images = {s.id: s.image for s in stored(tmp_path / "out") if s.id.startswith("odd/")}
    assert images == {"odd/x/1": picture(0), "odd/x/2": picture(1), "odd/x/3": None, "odd/x/4": None}


def test_bytes_within_other_values_refuse_the_file(tmp_path: Path) -> None:
    inner = pa.struct([("image", STRUCT)])
    for column in (pa.array([{"image": {"bytes": b"x"}}], inner), pa.array([[("k", b"x")]], pa.map_(pa.string(), pa.binary()))):
        with pytest.raises(DataError, match=r"x\.parquet: the column data\..* holds bytes within other values"):
            stored_images(tmp_path / "x.parquet", {"image": [b"x"], "data": column})


def test_a_parquet_row_that_is_no_utf8_is_refused_alone(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"b"]).buffers())
    pq.write_table(pa.table({"id": broken, "meta": ["x", "y"], "meta.bytes": [b"x", b"y"]}), tmp_path / "x.parquet")
    (_, _, first), (_, _, second) = store(str(tmp_path / "x.parquet"), None).rows()
    assert isinstance(first, Refusal) and "utf-8" in first.detail
    assert second["id"] == "b" and second["meta.bytes"].place == [0, 0, 1, "meta.bytes", None]


def test_a_long_line_is_not_read_on_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(json_rows, "LONGEST_LINE", 1000)
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" + b"{" * 5000)
    with pytest.raises(DataError, match="line 2 has more than"):
        list(json_rows.rows(tmp_path / "x.jsonl"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def gzipped(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, path.stat().st_size // 2), "0.tar"),
        (lambda path: cut(path, 1024), "is cut off after 1,024 bytes; fetch it again"),
        (lambda path: cut(path, 700), "0.tar"),
        (gzipped, "is no uncompressed tar file"),
        (lambda path: path.write_bytes(b"text" * 500), "is no uncompressed tar file"),
        (lambda path: path.write_bytes(b""), "is no uncompressed tar file"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "goes on after byte 10,752"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"y\0", b"z\0", 1)), "goes on after byte 1,024"),
    ],
    ids=["half", "at a member's end", "in a member", "compressed", "text", "empty", "another behind it", "a header"],
)
def test_a_tar_file_that_is_not_whole_is_an_error(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    member = as_tars(tmp_path)
    tar_of(tmp_path / "0.tar", {"x": b"x" * 100, "y": b"y" * 9000})
    damage(tmp_path / "0.tar")
    with pytest.raises(DataError, match=message) as stop:
        prepare(settings_for({"mine": member}), target=tmp_path / "dataset", workers=1)
    assert "\n" not in str(stop.value) and "fetch it again" in str(stop.value)
    assert not list(tmp_path.glob("*dataset*"))


def test_a_parquet_file_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    member = as_parquet(tmp_path)
    cut(tmp_path / "1.parquet", 3000)
    with pytest.raises(DataError, match=r"1\.parquet is no Parquet file, or is cut off.*fetch it again"):
        prepare(settings_for({"mine": member}), target=tmp_path / "dataset", workers=1)
    assert not list(tmp_path.glob("*dataset*"))


def test_a_parquet_file_whose_columns_have_damaged_names_is_an_error(tmp_path: Path) -> None:
    member = as_parquet(tmp_path)
    path = tmp_path / "1.parquet"
    path.write_bytes(path.read_bytes().replace(b"conversations", b"\xe3onversations"))
    with pytest.raises(DataError, match=r"1\.parquet is no Parquet file, or is cut off.*fetch it again"):
        prepare(settings_for({"mine": member}), target=tmp_path / "dataset", workers=1)


def test_text_that_is_called_bytes_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"meta": [{"bytes": "hello", "path": "p"}]}), tmp_path / "rows.parquet")
    assert [raw for _, _, raw in store(str(tmp_path / "rows.parquet"), None).rows()] == [
        {"meta": {"bytes": "hello", "path": "p"}}
    ]


READ_DAMAGED = """
import sys
from pathlib import Path
from components.dataset.readers import store
from components.errors import DataError
path = Path(sys.argv[1])
whole = path.read_bytes()
refused = 0
for at in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
    for byte in (0, 9, 21, 38):
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            list(store(str(path), None).rows())
        except DataError:
            refused += 1
print(refused)
"""


def test_a_parquet_file_with_a_damaged_footer_never_aborts_the_process(tmp_path: Path) -> None:
    pictures = [{"bytes": b"x", "path": "p"}, {"bytes": b"y", "path": None}]
    pq.write_table(pa.table({"n": [1, None], "text": [["q"], ["r", "s"]], "image": pictures}), tmp_path / "rows.parquet")
    read = subprocess.run([sys.executable, "-c", READ_DAMAGED, tmp_path / "rows.parquet"], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert int(read.stdout) > 100


@pytest.mark.parametrize(
    ("files", "images", "message"),
    [
        ("x.zip", None, "ends in none of .json, .jsonl, .tar, .parquet; unpack"),
        (str(HERE / "llava"), None, r"llava is a folder; name the files in it: .*llava/\*"),
        (".", None, r"\. is a folder; name the files in it"),
        ("x-{000..002}.tar", None, r"no file x-\{000\.\.002\}\.tar; a pattern has"),
        ("rows.json", None, "there is no file"),
        (str(HERE / "llava/annotations.json"), Path("nowhere"), "is no folder"),
        (str(HERE / "llava/annotations.json"), Path("nowhere/*.tar"), "there is no file"),
        ("nowhere/*.parquet", None, "there is no file"),
        (str(HERE / "llav?"), HERE, r"llava is a folder; name the files in it: .*llava/\*"),
        ("hf://datasets/a/b/c.parquet", None, "all 40 digits"),
        ("hf://datasets/a/b@main/c.parquet", None, "all 40 digits"),
    ],
)
def test_what_is_no_source_is_said_at_once(files: str, images: Path | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        store(files, images)


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "data/**/r*.jsonl", "data/*/r?.jsonl", "data/r0.jsonl"])
def test_a_pattern_stands_for_the_same_files_on_the_hub(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("r0.jsonl", "data/r0.jsonl", "data/a/r1.jsonl", "data/a/b/r2.jsonl", "data/a/s.txt")

    def placed(folder: Path, names: Iterable[str]) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    def download(*_: object, allow_patterns: list[str], **__: object) -> Path:
        return placed(tmp_path / "hub", filter_repo_objects(names, allow_patterns=allow_patterns))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = matching_files(f"hf://datasets/a/b@{'0' * 40}/{pattern}")
    local = matching_files(str(placed(tmp_path / "local", names) / pattern))
    assert [file.relative_to(tmp_path / "hub") for file in found] == [file.relative_to(tmp_path / "local") for file in local]


def test_a_linked_folder_is_not_passed_over(tmp_path: Path) -> None:
    for name in ("web/a/1.jsonl", "web/b/readme.md", "disk/2.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "web" / "again").symlink_to("a")
    (tmp_path / "web" / "docs").symlink_to(tmp_path / "web" / "b")
    assert [path.name for path in matching_files(str(tmp_path / "web/**/*.jsonl"))] == ["1.jsonl"]
    (tmp_path / "web" / "b" / "more").symlink_to(tmp_path / "disk")
    assert [path.name for path in matching_files(str(tmp_path / "web/b/*/*.jsonl"))] == ["2.jsonl"]
    with pytest.raises(DataError, match=r"web/b/more is a link, which \*\* does not follow: name .*/disk, too"):
        matching_files(str(tmp_path / "web/**/*.jsonl"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub.HTTPError("peer closed the connection"), TryAgainError, "the download stopped: peer closed"),
        (RuntimeError("CAS Client Error: error sending request"), TryAgainError, "the download stopped: CAS"),
        (RuntimeError("IO Error: No space left on device (os error 28)"), TryAgainError, "disk is full"),
        (ConnectionResetError(104, "reset by peer"), TryAgainError, "the download stopped"),
        (hub.HFValidationError("Repo id must use alphanumeric chars"), DataError, "must use alphanumeric chars"),
    ],
    ids=["HTTP", "hf_xet", "hf_xet's disk", "reset", "no name"],
)
def test_a_download_that_breaks_off_may_be_tried_again(
    error: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=message):
        store(f"hf://datasets/a/b@{'0' * 40}/*.parquet", None)


def test_without_the_hub_the_same_command_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TryAgainError, match="hub cannot be reached"):
        store(f"hf://datasets/nobody/nothing@{'0' * 40}/*.parquet", None)


# --- JSON lists of any length -----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def streamed(text: bytes, read: int) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_rows, "READ", read)
        try:
            return list(json_rows.elements(io.BytesIO(text)))
        except Refusal as refusal:
            return refusal.reason


@given(st.lists(JSON, max_size=6), st.integers(1, 20), st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=150)
def test_a_list_is_read_as_json_does_however_it_is_cut_into_pieces(
    rows: list[Any], read: int, indent: Any, ascii_: bool
) -> None:
    assert streamed(json.dumps(rows, indent=indent, ensure_ascii=ascii_).encode("utf-8", "replace"), read) == json.loads(
        json.dumps(rows, ensure_ascii=ascii_).encode("utf-8", "replace")
    )


@given(
    st.lists(JSON, max_size=3),
    st.integers(0, 60),
    st.sampled_from(['"', "[", "]", ",", "x", " ", "", "1", "\\"]),
    st.integers(1, 9),
)
@settings(max_examples=150)
def test_what_json_refuses_is_refused(rows: list[Any], offset: int, symbol: str, read: int) -> None:
    text = json.dumps(rows)
    broken = text[:offset] + symbol + text[offset + 1 :]
    try:
        expected = json.loads(broken)
    except ValueError:
        expected = "malformed_json"
    twice: list[bool] = []
    if isinstance(expected, list):
        json.loads(broken, object_pairs_hook=lambda pairs: twice.append(len(dict(pairs)) < len(pairs)))
    parsed = streamed(broken.encode(), read)
    if any(twice):
        assert any(isinstance(row, Refusal) for row in parsed)
    else:
        assert parsed == (expected if isinstance(expected, list) else "malformed_json")


UNREAD = {  # Python takes the last of two keys in silence: another picture, another speaker; and stops at a long number
    "the key 'from' stands twice in one object": '{"id": "b", "turns": [{"from": "human", "value": "x", "from": "gpt"}]}',
    "a number has 5,000 characters, too many to read": f'{{"id": "b", "label": {"9" * 5000}}}',
}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("read", [1, 7, 4096])
@pytest.mark.parametrize("problem", UNREAD)
def test_a_row_that_json_readers_change_or_stop_at_is_refused_alone(
    problem: str, name: str, read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "READ", read)
    rows = ['{"id": "a"}', UNREAD[problem], '{"id": "c"}']
    (tmp_path / name).write_text(f"[{', '.join(rows)}]" if name == "x.json" else "\n".join(rows))
    (_, first), (number, refused), (_, last) = json_rows.rows(tmp_path / name)
    assert (first, last, number) == ({"id": "a"}, {"id": "c"}, 2)
    assert isinstance(refused, Refusal) and refused.reason == "malformed_json"
    assert refused.detail.endswith(problem)


def test_a_quote_that_is_missing_does_not_read_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST", 1000)
    monkeypatch.setattr(json_rows, "READ", 100)
    file = io.BytesIO(b'["' + b"a" * 100_000)
    with pytest.raises(Refusal, match="Unterminated string"):
        list(json_rows.elements(file))
    assert file.closed or file.tell() < 50_000
