"""Reader of Parquet files in the Hub's layout; image bytes are read on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from components.dataset.media import Held
from components.dataset.row import NumberedRow
from components.errors import DataError, Refusal

TOGETHER = 256  # rows
HELD_TOGETHER = 16  # rows whose pictures are decoded into one Arrow array, which holds at most 2 GiB


def rows(files: list[Path]) -> Iterator[NumberedRow]:
    number = 0
    for index, path in enumerate(files):
        file = _opened(path)
        if twice := [column for column, times in Counter(file.schema_arrow.names).items() if times > 1]:
            raise DataError(f"{path} has the column {twice[0]} twice; rename or drop one of them")
        held = [field.name for field in file.schema_arrow if _has_bytes(field.type)]
        for leaf in _bytes_leaves(file):
            if not any(leaf == column or leaf.startswith(f"{column}.") for column in held):
                raise DataError(
                    f"{path}: the column {leaf} holds bytes within other values; put pictures into a column `images`"
                )
        for group in range(file.num_row_groups):
            for place, raw in enumerate(_in_group(path, file, group)):
                number += 1
                name = f"{path.stem}/{number}"
                for column in held if isinstance(raw, dict) else ():
                    if column != "id":  # which is no picture
                        raw[column] = _held(raw[column], [index, group, place, column], name)
                yield number, name, raw


def _in_group(path: Path, file: Any, group: int) -> Iterator[Any]:
    """Rows of a row group, some at a time, as their pictures may be read with them."""
    with _undamaged(path, group):
        next(file.iter_batches(1, [group]), None)  # raises at a damaged footer, where `_leaves` would abort the process
        for batch in file.iter_batches(TOGETHER, [group], _leaves(file, group)):
            yield from _rows(batch)


def _rows(table: Any) -> list[Any]:
    """Rows as Python values. A row that Python cannot represent becomes a Refusal: invalid UTF-8, a date past the year 9999."""
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(table) == 1:
            return [Refusal("wrong_type", f"a value of the row cannot be read: {error}")]
        return [row for place in range(len(table)) for row in _rows(table.slice(place, 1))]


def _held(value: Any, place: list[Any], name: str) -> Any:
    """Place of a cell's bytes, or of each element's; without bytes its `path`, which names a file of the folder, or None."""
    if isinstance(value, list):
        references = [_cell(item, [*place, index], name) for index, item in enumerate(value)]
        return references if any(references) else None
    return _cell(value, [*place, None], name)


def _cell(value: Any, place: list[Any], name: str) -> Held | str | None:
    if isinstance(value, dict) and value.get("bytes", b"") is None:
        return value.get("path")
    return None if value is None else Held(place, name)


def content(path: Path, group: int, row: int, column: str, at: int | None) -> bytes:
    """Bytes of one cell, or of its element `at`. Raises Refusal missing_file; DataError if the row group is damaged."""
    try:
        value = _column(path, group, column)[row].as_py()
        value = value if at is None else value[at]
    except IndexError:  # damaged file: the column is shorter than its neighbours
        raise Refusal("missing_file", f"{path}, row group {group}, row {row}: the column {column} ends before it") from None
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise Refusal("missing_file", f"{path}, row group {group}, row {row} names a picture without holding it")
    return value


def _has_bytes(kind: Any) -> bool:
    """Whether an Arrow type is bytes, {bytes, path}, or a list of these."""
    import pyarrow as pa

    if (inner := getattr(kind, "value_type", None)) is not None:  # lists of any kind, dictionaries
        return _has_bytes(inner)
    if pa.types.is_struct(kind):
        return any(_is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return any(is_(kind) for is_ in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _bytes_leaves(file: Any) -> list[str]:
    leaves = [file.schema.column(i) for i in range(len(file.schema))]
    return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"]


def _leaves(file: Any, group: int) -> list[str]:
    """Columns to read: no `bytes` leaf without nulls, if its struct has another to show its own, as `path` in {bytes, path}."""
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    left_out = {
        leaf
        for i, leaf in enumerate(leaves)
        if leaf not in file.schema_arrow.names and leaf.endswith(".bytes") and _is_full(file, group, i)
    }
    shown = {leaf.split(".")[0] for leaf in leaves if leaf not in left_out}
    return [leaf for leaf in leaves if leaf not in left_out or leaf.split(".")[0] not in shown]


def _is_full(file: Any, group: int, leaf: int) -> bool:
    """Whether a column of bytes is known to have no nulls. Arrow aborts the process at damaged statistics of other types."""
    chunk = file.metadata.row_group(group).column(leaf)
    column = file.schema.column(leaf)
    if not chunk.physical_type == column.physical_type == "BYTE_ARRAY" or column.logical_type.type != "NONE":  # or it is text
        return False
    return chunk.statistics is not None and chunk.statistics.null_count == 0


def _opened(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: a damaged column name
        raise DataError(f"{path} is no Parquet file, or is cut off: {error}; fetch it again") from None


@contextmanager
def _undamaged(path: Path, group: int) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: row group {group} is damaged: {error}; fetch it again") from None


@lru_cache(maxsize=1)  # a part's rows are adjacent
def _column(path: Path, group: int, column: str) -> Any:
    import pyarrow as pa

    file = _opened(path)
    with _undamaged(path, group):  # in batches: Arrow reads no nested value of a row group of more than 2 GiB at once
        return pa.chunked_array([batch.column(0) for batch in file.iter_batches(HELD_TOGETHER, [group], [column])])
