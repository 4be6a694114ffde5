"""On-disk index of the rows of all sources: validated, grouped by image, numbered.

An SQLite file keeps annotations out of memory, groups the rows of an image wherever they are in the source, and detects
repeated ids. It holds text and places, no images.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from components.config.data import DataLimits
from components.dataset.groups import groups
from components.dataset.media import NO_PICTURE, Held
from components.dataset.readers import Place, Store
from components.dataset.row import Row, understand
from components.dataset.shards import Turn
from components.dataset.source import Refused, Rule
from components.errors import DataError, Refusal, shortened
from components.io import draft_of

# An image's key is its place, which is unique; its name may be shared, and is made unique.
SCHEMA = """
    CREATE TABLE images (number INTEGER PRIMARY KEY, key TEXT UNIQUE, name TEXT UNIQUE, source TEXT, file TEXT, place TEXT);
    CREATE TABLE rows (
        number INTEGER PRIMARY KEY, id TEXT UNIQUE, image INTEGER, row INTEGER, kind TEXT, turns TEXT, boxes TEXT
    );
    CREATE TABLE contents (digest BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE repeated (id TEXT PRIMARY KEY, uses INTEGER) WITHOUT ROWID;
    CREATE TABLE members (source TEXT, name TEXT, place TEXT, other TEXT, PRIMARY KEY (source, name)) WITHOUT ROWID;
    CREATE TABLE groups (digest TEXT PRIMARY KEY, least TEXT) WITHOUT ROWID;
    CREATE TABLE refused (source TEXT, row INTEGER, record TEXT);
    CREATE TABLE sources (name TEXT, rows INTEGER);
    CREATE TABLE rules (source TEXT, rule TEXT, rows INTEGER, row INTEGER, example TEXT);
"""
TOGETHER = 10_000  # rows between commits


class Indexed(NamedTuple):
    """One image, or several shown together, and the rows about it."""

    source: str
    name: str
    file: str | None  # name in the source's rows
    places: list[Place]  # empty: text-only
    rows: list[tuple[int, str, str, tuple[Turn, ...]]]  # (number within the source, id, kind, turns)

    @property
    def first(self) -> dict[int, str]:
        """Row number -> id of its first sample."""
        return {row: id_ for row, id_, *_ in reversed(self.rows)}


def build(path: Path, stores: dict[str, Store], limits: DataLimits, prefixed: bool, workers: int = 1) -> None:
    """Index every row of every store, atomically. Raises DataError if a source cannot be read or has no row.

    Args:
        prefixed: prefix ids and names with the source's name, so that they are unique over sources.
    """
    try:
        with draft_of(path) as draft, closing(sqlite3.connect(draft)) as database:
            _fill(database, stores, limits, prefixed)
            _group(database, stores, limits, workers)
    except sqlite3.OperationalError as error:
        if "disk is full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise OSError(28, "No space left on device", str(path)) from None


def _fill(database: sqlite3.Connection, stores: dict[str, Store], limits: DataLimits, prefixed: bool) -> None:
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;" + SCHEMA)
    for name, store in stores.items():
        database.executemany(
            "INSERT INTO members VALUES (?, ?, ?, NULL) ON CONFLICT DO UPDATE SET other = excluded.place",
            ((name, member, json.dumps(place)) for member, place in store.names()),
        )
        filled = _Source(database, name, store, f"{name}/" if prefixed else "")
        rows = 0
        ending = "" if sys.stderr.isatty() else "\n"  # lines of a log; of how many rows is not known
        bar = tqdm(store.rows(), desc=f"prepare: rows of {name}", bar_format=f"{{desc}}: {{n}} in {{elapsed}}{ending}")
        for rows, (number, name_without_id, raw) in enumerate(bar, start=1):
            try:
                filled.insert(understand(number, raw, limits, store.folder), name_without_id)
            except Refusal as refusal:
                record = refused(number, name_without_id, raw, refusal, name if prefixed else None)
                database.execute("INSERT INTO refused VALUES (?, ?, ?)", (name, number, record.model_dump_json()))
            if rows % TOGETHER == 0:
                database.commit()
        if rows == 0:
            raise DataError(f"{', '.join(map(str, store.paths))} holds no row")
        database.execute("INSERT INTO sources VALUES (?, ?)", (name, rows))
        rules = ((name, rule, count, *filled.examples[rule]) for rule, count in filled.rules.items())
        database.executemany("INSERT INTO rules VALUES (?, ?, ?, ?, ?)", rules)
    for table in ("members", "contents", "repeated"):
        database.execute(f"DROP TABLE {table}")
    database.execute("CREATE INDEX rows_of_image ON rows (image)")
    database.commit()


def _group(database: sqlite3.Connection, stores: dict[str, Store], limits: DataLimits, workers: int) -> None:
    shown = database.execute("SELECT source, place FROM images WHERE json_array_length(place) > 1")
    together = [(source, json.loads(places)) for source, places in shown]
    database.executemany("INSERT INTO groups VALUES (?, ?)", groups(together, stores, limits, workers).items())
    database.commit()


class _Source:
    """Insertion of one source's rows, with counts of the rules that changed them."""

    def __init__(self, database: sqlite3.Connection, name: str, store: Store, prefix: str) -> None:
        self.database, self.name, self.store, self.prefix = database, name, store, prefix
        self.rules: Counter[str] = Counter()
        self.examples: dict[str, tuple[int, str]] = {}  # rule -> (row, change)

    def insert(self, row: Row, name_without_id: str) -> None:
        """Insert a row. Raises Refusal: duplicate_id, missing_file or ambiguous_name."""
        pictures = [self._picture(picture) for picture in row.pictures]
        if row.id is not None:
            content = repr((self.prefix, row.id, pictures, row.kind, row.samples)).encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if not self.database.execute("INSERT OR IGNORE INTO contents VALUES (?)", (digest,)).rowcount:
                raise Refusal("duplicate_id", f"an earlier row with the id {row.id!r} says the same")
        row_id = name_without_id if row.id is None else row.id
        rules = row.rules | dict.fromkeys((f"ignored key {key!r}" for key in row.ignored), "")
        for turns in row.samples:
            sample_id = self._free("rows", "id", self.prefix + row_id)
            if sample_id != self.prefix + row_id and turns is row.samples[0]:
                rules["repeated_id"] = f"{row_id!r} became {sample_id.removeprefix(self.prefix)!r}"
            name, key = f"text:{sample_id.removeprefix(self.prefix)}", f"text {row.number}"
            if pictures:
                names, keys, _ = zip(*pictures, strict=True)
                name, key = " + ".join(names), " ".join(keys)
            texts = json.dumps([(turn.question, turn.answer) for turn in turns])
            boxes = json.dumps([turn.boxes for turn in turns]) if any(turn.boxes for turn in turns) else None
            self.database.execute(
                "INSERT INTO rows (id, image, row, kind, turns, boxes) VALUES (?, ?, ?, ?, ?, ?)",
                (sample_id, self._image(name, key, [place for *_, place in pictures]), row.number, row.kind, texts, boxes),
            )
        for rule, change in rules.items():
            self.rules[shortened(rule)] += 1
            self.examples.setdefault(shortened(rule), (row.number, shortened(change)))

    def _picture(self, picture: str | Held) -> tuple[str, str, Place]:
        """Name, key and place of an image."""
        if isinstance(picture, Held):
            return picture.name, json.dumps(picture.place), picture.place
        if medium := NO_PICTURE.search(picture[:40] if picture.startswith("data:") else picture):
            what = "video" if medium["video"] or medium[1] == "video" else "unread_media"
            raise Refusal(what, f"'image' is no image, but {picture[:80]!r}")
        if picture.startswith("data:"):
            digest = hashlib.sha256(picture.encode("utf-8", "surrogatepass")).hexdigest()
            return f"data:{digest[:32]}", digest, [picture]
        place = self._member(picture) if self.store.tars else [picture]
        return picture, json.dumps(place), place

    def _member(self, name: str) -> Place:
        member = self.database.execute(
            "SELECT place, other FROM members WHERE source = ? AND name = ?", (self.name, name)
        ).fetchone()
        if member is None:
            raise Refusal("missing_file", f"no tar file has a member {name!r}")
        if member[1] is not None:
            places = [json.loads(place) for place in member]
            both = " and ".join(f"{self.store.paths[tar]} at byte {offset:,}" for tar, offset, _ in places)
            raise Refusal("ambiguous_name", f"{name!r} is a member of {both}: which one is meant is not known")
        return list(json.loads(member[0]))

    def _image(self, name: str, key: str, places: list[Place]) -> int:
        key = f"{self.name} {key}"
        known = self.database.execute("SELECT number FROM images WHERE key = ?", (key,)).fetchone()
        if known is None:
            unique = self._free("images", "name", self.prefix + name)
            known = self.database.execute(
                "INSERT INTO images (key, name, source, file, place) VALUES (?, ?, ?, ?, ?) RETURNING number",
                (key, unique, self.name, name if places else None, json.dumps(places)),
            ).fetchone()
        return int(known[0])

    def _free(self, table: str, column: str, name: str) -> str:
        """First unused of `name`, `name#2`, `name#3`, ..."""
        candidate = name
        while self.database.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", (candidate,)).fetchone():
            (uses,) = self.database.execute(
                "INSERT INTO repeated VALUES (?, 2) ON CONFLICT DO UPDATE SET uses = uses + 1 RETURNING uses",
                (f"{column} {name}",),
            ).fetchone()
            candidate = f"{name}#{uses}"
        return candidate


def refused(number: int, name_without_id: str, raw: Any, refusal: Refusal, source: str | None) -> Refused:
    id_ = raw.get("id") if isinstance(raw, dict) else None
    known = str(id_).encode("utf-8", "replace").decode() if isinstance(id_, str | int) else name_without_id
    return Refused(row=number, id=known, reason=refusal.reason, detail=refusal.detail, source=source)


class Index(AbstractContextManager["Index"]):
    """Read access to an index written by `build`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def __exit__(self, *_: object) -> None:
        self._database.close()

    @property
    def images(self) -> int:
        return int(self._only("SELECT count(*) FROM images"))

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by source, including refused ones."""
        return dict(self._database.execute("SELECT name, rows FROM sources"))

    @property
    def boxes(self) -> bool:
        """Whether any row has boxes."""
        return bool(self._only("SELECT EXISTS (SELECT 1 FROM rows WHERE boxes IS NOT NULL)"))

    @property
    def several(self) -> bool:
        """Whether any row shows several readable images."""
        return bool(self._only("SELECT EXISTS (SELECT 1 FROM groups)"))

    def group(self, digest: str) -> str:
        """Smallest digest of the image's group: images connected by rows that show them together. Its own if it has none."""
        return str(self._only("SELECT coalesce((SELECT least FROM groups WHERE digest = ?1), ?1)", digest))

    def _only(self, query: str, *values: str) -> Any:
        """The one value that a query gives."""
        return self._database.execute(query, values).fetchone()[0]

    def rules(self) -> list[Rule]:
        """Rules by source, the most frequent first."""
        return [Rule(*columns) for columns in self._database.execute("SELECT * FROM rules ORDER BY source, rows DESC, rule")]

    def refused(self) -> Iterator[Refused]:
        for (record,) in self._database.execute("SELECT record FROM refused ORDER BY rowid"):
            yield Refused.model_validate_json(record)

    def part(self, first: int, last: int) -> Iterator[Indexed]:
        """Images `first`..`last` - 1, in the order of their first rows."""
        joined = self._database.execute(
            "SELECT images.number, source, name, file, place, row, id, kind, turns, boxes FROM images"
            " JOIN rows ON image = images.number WHERE images.number BETWEEN ? AND ? ORDER BY images.number, rows.number",
            (first + 1, last),
        )
        for _, of_image in groupby(joined, key=lambda row: row[0]):
            lines = list(of_image)
            source, name, file, place = lines[0][1:5]
            rows = [(row, id_, kind, _turns(turns, boxes)) for *_, row, id_, kind, turns, boxes in lines]
            yield Indexed(source, name, file, json.loads(place), rows)

    def texts(self, image: str) -> set[str]:
        """Conversations about an image, as stored JSON; empty for an unknown image."""
        rows = self._database.execute("SELECT turns FROM images JOIN rows ON image = images.number WHERE name = ?", (image,))
        return {turns for (turns,) in rows}

    def rows_of(self, image: str) -> list[tuple[str, int, str]]:
        """Rows about an image: (source, number within it, id of its first sample)."""
        rows = self._database.execute(
            "SELECT source, row, id, min(rows.number) FROM images JOIN rows ON image = images.number WHERE name = ?"
            " GROUP BY row",
            (image,),
        )
        return [(source, row, id_) for source, row, id_, _ in rows]


def _turns(turns: str, boxes: str | None) -> tuple[Turn, ...]:
    """Turns from the columns that `_Source.insert` writes."""
    texts = json.loads(turns)
    regions = [[]] * len(texts) if boxes is None else json.loads(boxes)
    return tuple(
        Turn(question, answer, tuple(map(tuple, region))) for (question, answer), region in zip(texts, regions, strict=True)
    )
