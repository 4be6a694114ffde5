"""Base of the records passed between stages: validated JSON, written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from components.errors import DataError
from components.io import write_text


class Record(BaseModel):
    """Base of all records: immutable, without unknown keys; a JSON file or a part of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def write(self, path: Path) -> Path:
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Record of a file. Raises DataError if the file is missing or is no such record."""
        text = content(path)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            if reason := Absent.reason_in(text):
                raise DataError(f"{path} holds no {cls.__name__}: {reason}") from None
            raise DataError(f"{path} is no {cls.__name__}: {error.errors()[0]['msg']}; `dvc repro` makes it anew") from None

    @classmethod
    def read_lines(cls, path: Path) -> list[Self]:
        """Records of a JSON Lines file. Raises DataError if the file is missing or a line is no such record."""
        try:
            return [cls.model_validate_json(line) for line in content(path).splitlines()]
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise DataError(f"{path} holds a line that is no {cls.__name__}: {problem}; make it anew") from None


class Absent(Record):
    """Placeholder for a record that does not apply to a run."""

    none: str  # reason

    @classmethod
    def reason_at(cls, path: Path) -> str | None:
        """Reason in the placeholder at `path`; None if the file is missing or holds another record."""
        return cls.reason_in(content(path)) if path.exists() else None

    @classmethod
    def reason_in(cls, text: bytes) -> str | None:
        """Reason in a placeholder's text; None for another record."""
        try:
            return cls.model_validate_json(text).none
        except ValidationError:
            return None


def content(path: Path) -> bytes:
    """Bytes of a file. Raises DataError if it is missing or a folder."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else "is a folder, and not a file"
        raise DataError(f"{path} {problem}; `dvc repro` makes it") from None


def parsed(path: Path) -> dict[str, Any]:
    """JSON object of a file. Raises DataError if there is none."""
    return _object(content(path), str(path))


def parsed_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a JSON Lines file. Raises DataError if a line holds none."""
    return [_object(line, f"{path}, line {number}") for number, line in enumerate(content(path).splitlines(), 1)]


def _object(text: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: no JSON ({error}); make it anew") from None
    if not isinstance(value, dict):
        raise DataError(f"{source}: no JSON object; make it anew")
    return value


def jsonl(records: Iterable[Record | dict[str, Any]]) -> str:
    """Records as JSON lines. Split them as bytes: `str.splitlines` also breaks at U+2028."""
    lines = (r.model_dump_json() if isinstance(r, Record) else json.dumps(r, ensure_ascii=False) for r in records)
    return "".join(line + "\n" for line in lines)
