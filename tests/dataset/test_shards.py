"""The stored data set: what goes in comes out, and only what is read is touched."""

import hashlib
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.dataset import shard_writer
from components.dataset.__main__ import can_search
from components.dataset.shard_writer import SplitWriter, without
from components.dataset.shards import ImageRow, Sample, Samples, Turn
from components.errors import DataError
from components.io import sha256
from components.records.dataset import Manifest
from tests.shards import write_split


def image_row(number: int, samples: int = 2, size: int = 100) -> ImageRow:
    image = bytes([number % 256]) * size
    turns = (Turn(f"<image>\nquestion {number}", f"answer {number}"),)
    return ImageRow(f"image-{number}", image, tuple((f"{number}-{i}", "kind", turns) for i in range(samples)))


def stored(folder: Path, rows: Sequence[ImageRow], images_per_shard: int = 4) -> Samples:
    record = write_split(folder / "train", rows, images_per_shard)
    Manifest(
        source="digits", rows_in=record.samples, rows_out=record.samples, quarantined=0, splits={"train": record}, digest="0"
    ).write(folder / "manifest.json")
    return Samples(folder, "train")


def expected(rows: Sequence[ImageRow]) -> list[Sample]:
    return [Sample(id_, row.image_id, kind, row.image, turns) for row in rows for id_, kind, turns in row.samples]


TURNS = st.lists(st.builds(Turn, st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=3).map(tuple)
ROWS = st.lists(
    st.builds(
        ImageRow,
        st.text(max_size=5),
        st.none() | st.binary(max_size=20),
        st.lists(st.tuples(st.text(max_size=5), st.sampled_from("ab"), TURNS), min_size=1, max_size=4).map(tuple),
    ),
    max_size=9,
)


@given(ROWS, st.integers(1, 5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_goes_in_comes_out(tmp_path: Path, rows: list[ImageRow], images_per_shard: int) -> None:
    samples = stored(tmp_path, rows, images_per_shard)
    assert list(samples) == expected(rows)
    assert samples.images == len(rows)
    assert [list(samples.of_image(i)) for i in range(len(rows))] == [
        np.flatnonzero(samples.row_of == i).tolist() for i in range(len(rows))
    ]
    assert [shard.images for shard in samples.record.shards] == [
        min(images_per_shard, len(rows) - start) for start in range(0, len(rows), images_per_shard)
    ]
    assert sum(samples.record.kinds.values()) == samples.record.samples == len(samples)


def test_indices_count_from_either_end(tmp_path: Path) -> None:
    rows = [image_row(n, samples=n % 3 + 1) for n in range(9)]
    samples = stored(tmp_path, rows)
    assert [samples[i] for i in range(-len(samples), 0)] == expected(rows)
    for index in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError):
            samples[index]


def test_datasets_opens_a_shard_too(tmp_path: Path) -> None:
    samples = stored(tmp_path, [image_row(n) for n in range(3)])
    opened = datasets.Dataset.from_file(str(tmp_path / "train" / samples.record.shards[0].file))
    assert opened[1]["image_id"] == "image-1"
    assert opened[1]["samples"][0]["conversations"][0] == {"from": "human", "value": "<image>\nquestion 1"}


def test_bytes_depend_on_rows_alone_and_the_record_knows_them(tmp_path: Path) -> None:
    rows = [image_row(n) for n in range(9)]
    first, second = (stored(tmp_path / name, rows) for name in ("first", "second"))
    assert first.record == second.record
    for shard in first.record.shards:
        assert shard.sha256 == sha256([tmp_path / "first" / "train" / shard.file])
    assert sorted(path.name for path in (tmp_path / "first" / "train").iterdir()) == [s.file for s in first.record.shards]


def test_rows_of_one_image_and_none_keep_the_bytes_of_before_several_images(tmp_path: Path) -> None:
    """Of the writer that knew one image a row; another pyarrow may write others."""
    text = ImageRow("text", None, (("t", "kind", (Turn("Why?", "So."),)),))
    stored(tmp_path, [*(image_row(n) for n in range(3)), text])
    (shard,) = (tmp_path / "train").iterdir()
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == "1e32fb0bcd5983f84d710bf19b8762f946ad5dd280c394b5b2cb2f672ae36c26"


@pytest.mark.parametrize(
    ("pictures", "turns", "kind", "possible"),
    [(9, 1, "kind", False), (9, 2, "kind", True), (2, 1, "kind", True), (9, 2, "caption", False)],
)
def test_whether_a_layer_can_be_searched_is_known_from_the_questions_of_equal_images(
    pictures: int, turns: int, kind: str, possible: bool, tmp_path: Path
) -> None:
    """Nine rows of `turns` questions each, about so many different pictures."""
    rows = [
        ImageRow(f"{n}", bytes([n % pictures]), ((f"{n}", kind, tuple(Turn(f"<image>\n{n} {i}?", "a") for i in range(turns))),))
        for n in range(9)
    ]
    assert can_search(stored(tmp_path, rows)) == possible


# --- only what is read ------------------------------------------------------------------------------------------------


def test_reading_one_sample_leaves_the_rest_on_disk(tmp_path: Path) -> None:
    """128 MiB are stored; opening and reading allocates next to nothing, as the file is mapped."""
    size = 2**20
    allocated = pa.total_allocated_bytes()
    samples = stored(tmp_path, [image_row(n, size=size) for n in range(128)], images_per_shard=64)
    samples = Samples(tmp_path, "train")
    resident = resident_bytes()
    assert samples[101].image == bytes([50]) * size
    assert pa.total_allocated_bytes() - allocated < 2**20
    assert resident_bytes() - resident < 16 * size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_one_changed_byte_is_seen_at_opening_and_what_is_open_still_reads(tmp_path: Path) -> None:
    """The byte is in an image of the second shard; the structure of the file is as it was."""
    rows = [image_row(n, size=5000) for n in range(1, 9)]
    samples = stored(tmp_path, rows)
    path = tmp_path / "train" / samples.record.shards[1].file
    content = bytearray(path.read_bytes())
    content[content.index(rows[5].image or b"") + 2500] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    assert samples[8] == expected(rows)[8]
    with pytest.raises(DataError, match=r"shard-00001\.arrow has changed since it was written.*`dvc repro prepare`"):
        Samples(tmp_path, "train")


def test_images_left_out_of_shards_are_gone_and_nothing_else(tmp_path: Path) -> None:
    rows = [image_row(n, samples=n % 3 + 1) for n in range(10)]
    record = stored(tmp_path, rows).record
    gone = ["image-1", "image-4", "image-5", "image-6", "image-7", "nobody"]
    for _ in range(2):  # the same again changes nothing
        left = without(tmp_path / "train", record, gone)
        manifest = Manifest.read(tmp_path / "manifest.json")
        Manifest(**{**manifest.model_dump(), "splits": {"train": left.model_dump()}}).write(tmp_path / "manifest.json")
        assert list(Samples(tmp_path, "train")) == expected([row for row in rows if row.image_id not in gone])
    assert {path.name for path in (tmp_path / "train").iterdir()} == {shard.file for shard in left.shards}
    assert [shard.file for shard in left.shards] == ["shard-00000.arrow", "shard-00002.arrow"]


def test_a_loader_worker_is_sent_the_place_not_the_data(tmp_path: Path) -> None:
    rows = [image_row(n, size=2**20) for n in range(4)]
    samples = stored(tmp_path, rows)
    packed = pickle.dumps(samples)
    assert len(packed) < 1000
    assert list(pickle.loads(packed)) == expected(rows)  # noqa: S301


@pytest.mark.parametrize(("bound", "most"), [("BATCH_BYTES", 1000), ("BATCH_CHARS", 510)])
def test_the_writer_holds_a_batch_and_not_a_shard(
    bound: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images, and of rows of text alone."""
    monkeypatch.setattr(shard_writer, bound, most)
    with SplitWriter(tmp_path / "train", images_per_shard=100, boxes=False) as writer:
        for number in range(60):
            writer.add(image_row(number, size=100))
            assert len(writer._pending) < 10
    (shard,) = writer.record.shards
    with pa.memory_map(str(tmp_path / "train" / shard.file)) as file, pa.ipc.open_stream(file) as stream:
        assert [batch.num_rows for batch in stream] == [10] * 6


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing; `dvc repro` makes it"):
        Samples(tmp_path, "train")


def test_no_such_split(tmp_path: Path) -> None:
    stored(tmp_path, [image_row(0)])
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        Samples(tmp_path, "val")


def other_columns(path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"image_id": ["a"], "picture": [b""]})
    with pa.ipc.new_stream(str(path), batch.schema) as stream:
        stream.write_batch(batch)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"no arrow" * 50),
    "a column's name": lambda path: path.write_bytes(path.read_bytes().replace(b"image_id", b"image_i\xff")),
    "another shard": lambda path: shutil.copy(path.with_name("shard-00000.arrow"), path),
    "other columns": other_columns,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    samples = stored(tmp_path, [image_row(n, samples=n + 1) for n in range(8)])
    damage(tmp_path / "train" / samples.record.shards[1].file)
    with pytest.raises(DataError, match="`dvc repro prepare`"):
        Samples(tmp_path, "train")
