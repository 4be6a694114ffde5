"""Writing of shards: rows in batches, each shard complete or absent; and removal of images from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.dataset.shards import ImageRow, open_shard, schema
from components.io import draft_of, sha256
from components.records.dataset import ShardRecord, SplitRecord

if TYPE_CHECKING:  # pyarrow is imported only where a shard is read or written
    import pyarrow as pa

BATCH_BYTES = 32 * 2**20  # image bytes per record batch
BATCH_CHARS = 4 * 2**20  # text characters per record batch; Python and pyarrow take ten bytes for each


class SplitWriter(AbstractContextManager["SplitWriter"]):
    """Writer of one split, row by row, to `folder/shard-00000.arrow`, ... (from number `first` on); `record` after the block.

    Rows are written in batches, so memory holds one batch, never a shard. A shard appears when it is complete.
    """

    def __init__(self, folder: Path, images_per_shard: int, boxes: bool, several: bool = False, first: int = 0) -> None:
        """`boxes`, `several`: as in `schema`."""
        self._schema = schema(boxes, several)
        self._folder, self._images_per_shard, self._first = folder, images_per_shard, first
        self._shards: list[Path] = []
        self._open = ExitStack()  # the last shard, until it is complete
        self._images = 0  # in it
        self._pending: list[ImageRow] = []
        self._bytes = self._chars = 0

    def add(self, row: ImageRow) -> None:
        if not self._images:
            self._shards.append(self._folder / f"shard-{self._first + len(self._shards):05d}.arrow")
            self._stream = self._open.enter_context(_written(self._shards[-1], self._schema))
        self._images += 1
        self._pending.append(row)
        self._bytes += sum(map(len, (row.image or b"", *row.more)))
        self._chars += sum(len(turn.question) + len(turn.answer) for *_, turns in row.samples for turn in turns)
        if self._bytes >= BATCH_BYTES or self._chars >= BATCH_CHARS:
            self._flush()
        if self._images == self._images_per_shard:
            self._complete()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            self._stream.write_batch(pa.RecordBatch.from_pylist([row.as_dict() for row in self._pending], schema=self._schema))
            self._pending.clear()
            self._bytes = self._chars = 0

    def _complete(self) -> None:
        with self._open:
            self._flush()
        self._images = 0

    def __exit__(self, *error: Any) -> None:
        """Complete the last shard, or after an error remove it."""
        if error[0] is None:
            self._complete()
        self._open.__exit__(*error)

    @property
    def record(self) -> SplitRecord:
        return joined(map(_of_shard, self._shards))


@contextmanager
def _written(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    """Stream to a shard, which is there if the block succeeds."""
    import pyarrow as pa

    with draft_of(path) as draft, pa.OSFile(str(draft), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        yield stream


def without(folder: Path, record: SplitRecord, image_ids: Iterable[str]) -> SplitRecord:
    """Remove images from the shards of `record` by rewriting them. Idempotent."""
    import pyarrow as pa
    import pyarrow.compute as pc

    left: list[Path] = []
    for shard in record.shards:
        path = folder / shard.file
        if not path.exists():  # removed as empty by an interrupted run
            continue
        table = open_shard(path)
        kept = table.filter(pc.invert(pc.is_in(table.column("image_id"), value_set=pa.array(list(image_ids), pa.string()))))
        if not kept.num_rows:
            path.unlink()
            continue
        if kept.num_rows < table.num_rows:
            with _written(path, table.schema) as stream:
                stream.write_table(kept)
        left.append(path)
    return joined(map(_of_shard, left))


def _of_shard(path: Path) -> SplitRecord:
    """Record of a split that is one shard."""
    import pyarrow.compute as pc

    table = open_shard(path)
    kinds = Counter(pc.struct_field(pc.list_flatten(table.column("samples")), "kind").to_pylist())
    shard = ShardRecord(file=path.name, images=table.num_rows, samples=kinds.total(), sha256=sha256([path]))
    return SplitRecord(images=shard.images, samples=shard.samples, kinds=kinds, shards=[shard])


def joined(parts: Iterable[SplitRecord]) -> SplitRecord:
    """Record of a split from the records of its parts."""
    kinds: Counter[str] = Counter()
    shards: list[ShardRecord] = []
    for part in parts:
        kinds.update(part.kinds)
        shards += part.shards
    return SplitRecord(
        images=sum(shard.images for shard in shards), samples=kinds.total(), kinds=dict(sorted(kinds.items())), shards=shards
    )
