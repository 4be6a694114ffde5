"""All rows of all sources on disk, checked, grouped by image, numbered: what parts are cut from.

An SQLite file, so that neither the annotations nor what has been seen of them is ever in memory: rows of one image are
found together wherever they stand, and an id that was used before is known. It holds text and places, no images.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from components.dataset.images import Refusal
from components.dataset.llava import Row, check
from components.dataset.source import Refused
from components.dataset.stores import Place, Store
from components.errors import DataError
from components.settings import DataLimits
from components.shards import Turn

SCHEMA = """
    CREATE TABLE images (number INTEGER PRIMARY KEY, name TEXT UNIQUE, source TEXT, file TEXT, place TEXT);
    CREATE TABLE rows (
        number INTEGER PRIMARY KEY, id TEXT UNIQUE, image INTEGER, row INTEGER, kind TEXT, turns TEXT, boxes TEXT
    );
    CREATE TABLE members (source TEXT, name TEXT, place TEXT, PRIMARY KEY (source, name)) WITHOUT ROWID;
    CREATE TABLE refused (source TEXT, row INTEGER, record TEXT);
    CREATE TABLE sources (name TEXT, rows INTEGER);
"""
TOGETHER = 10_000  # rows between commits


class Indexed(NamedTuple):
    """One image and the rows about it."""

    source: str
    name: str
    file: str | None  # as the source's rows call it
    place: Place | None
    rows: list[tuple[int, str, str, tuple[Turn, ...]]]  # (number within the source, id, kind, turns)


def build(path: Path, stores: dict[str, Store], limits: DataLimits, prefixed: bool) -> None:
    """Read every row of every store, whole or not at all. Raises DataError if a source cannot be read or has no row.

    Args:
        prefixed: ids and names begin with the source's, so that sources do not mix them up.
    """
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        database = sqlite3.connect(draft)
        try:
            _fill(database, stores, limits, prefixed)
        finally:
            database.close()
        draft.replace(path)
    except sqlite3.OperationalError as error:
        if "disk is full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise OSError(28, "No space left on device", str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


def _fill(database: sqlite3.Connection, stores: dict[str, Store], limits: DataLimits, prefixed: bool) -> None:
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;" + SCHEMA)
    for name, store in stores.items():
        database.executemany(
            "INSERT OR IGNORE INTO members VALUES (?, ?, ?)",
            ((name, member, json.dumps(place)) for member, place in store.members()),
        )
        rows = 0
        bar = tqdm(store.rows(), desc=f"prepare: rows of {name}", unit="row", mininterval=1, delay=2)
        for rows, (number, raw, place) in enumerate(bar, start=1):
            try:
                row = check(number, raw, limits)
                _insert(database, name, f"{name}/" if prefixed else "", row, place)
            except Refusal as refusal:
                record = refused(number, raw, refusal, name if prefixed else None)
                database.execute("INSERT INTO refused VALUES (?, ?, ?)", (name, number, record.model_dump_json()))
            if rows % TOGETHER == 0:
                database.commit()
        if rows == 0:
            raise DataError(f"{', '.join(map(str, store.paths))} holds no row")
        database.execute("INSERT INTO sources VALUES (?, ?)", (name, rows))
    database.execute("DROP TABLE members")
    database.execute("CREATE INDEX rows_of_image ON rows (image)")
    database.commit()


def _insert(database: sqlite3.Connection, source: str, prefix: str, row: Row, place: Place | None) -> None:
    id_ = prefix + row.id
    if database.execute("SELECT 1 FROM rows WHERE id = ?", (id_,)).fetchone():
        raise Refusal("duplicate_id", f"the id {row.id!r} was used before")
    if row.image is None:
        name, where = f"{prefix}text:{row.id}", None
    else:
        name, where = prefix + row.image, json.dumps(place) if place is not None else _member(database, source, row.image)
    (image,) = database.execute(
        "INSERT INTO images (name, source, file, place) VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET name = name"
        " RETURNING number",
        (name, source, row.image, where),
    ).fetchone()
    database.execute(
        "INSERT INTO rows (id, image, row, kind, turns, boxes) VALUES (?, ?, ?, ?, ?, ?)",
        (
            *(id_, image, row.number, row.kind),
            json.dumps([(turn.question, turn.answer) for turn in row.turns]),
            json.dumps([turn.boxes for turn in row.turns]) if any(turn.boxes for turn in row.turns) else None,
        ),
    )


def _member(database: sqlite3.Connection, source: str, image: str) -> str:
    found = database.execute("SELECT place FROM members WHERE source = ? AND name = ?", (source, image)).fetchone()
    if found is None:
        raise Refusal("missing_file", f"no tar file has a member {image!r}")
    return str(found[0])


def refused(number: int, raw: Any, refusal: Refusal, source: str | None) -> Refused:
    id_ = raw.get("id") if isinstance(raw, dict) else None
    known = str(id_).encode("utf-8", "replace").decode() if isinstance(id_, str | int) else None
    return Refused(row=number, id=known, reason=refusal.reason, detail=refusal.detail, source=source)


class Index:
    """Reads what `build` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    @property
    def images(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM images").fetchone()[0])

    @property
    def rows(self) -> dict[str, int]:
        """How many each source has, the refused ones among them."""
        return dict(self._database.execute("SELECT name, rows FROM sources"))

    @property
    def boxes(self) -> bool:
        """Whether any row has boxes."""
        return bool(self._database.execute("SELECT EXISTS (SELECT 1 FROM rows WHERE boxes IS NOT NULL)").fetchone()[0])

    def refused(self) -> Iterator[Refused]:
        for (record,) in self._database.execute("SELECT record FROM refused ORDER BY rowid"):
            yield Refused.model_validate_json(record)

    def part(self, first: int, last: int) -> Iterator[Indexed]:
        """Images `first`..`last` - 1, in the order in which rows first name them."""
        joined = self._database.execute(
            "SELECT images.number, source, name, file, place, row, id, kind, turns, boxes FROM images"
            " JOIN rows ON image = images.number WHERE images.number BETWEEN ? AND ? ORDER BY images.number, rows.number",
            (first + 1, last),
        )
        for _, of_image in groupby(joined, key=lambda row: row[0]):
            lines = list(of_image)
            source, name, file, place = lines[0][1:5]
            rows = [(row, id_, kind, _turns(turns, boxes)) for *_, row, id_, kind, turns, boxes in lines]
            yield Indexed(source, name, file, None if place is None else json.loads(place), rows)

    def texts(self, image: str) -> set[str]:
        """The conversations about an image, as they are stored; none if there is no such image."""
        return {turns for (turns,) in self._of_image("turns", image)}

    def rows_of(self, image: str) -> list[tuple[str, int, str]]:
        """(source, number within it, id) of the rows about an image."""
        return list(self._of_image("source, row, id", image))

    def _of_image(self, columns: str, image: str) -> Iterator[Any]:
        return self._database.execute(
            f"SELECT {columns} FROM images JOIN rows ON image = images.number WHERE name = ? ORDER BY rows.number", (image,)
        )


def _turns(turns: str, boxes: str | None) -> tuple[Turn, ...]:
    """As `_insert` wrote them."""
    texts = json.loads(turns)
    regions = [[]] * len(texts) if boxes is None else json.loads(boxes)
    return tuple(
        Turn(question, answer, tuple(map(tuple, region))) for (question, answer), region in zip(texts, regions, strict=True)
    )
