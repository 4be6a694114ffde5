"""Streaming reader of JSON lists and JSONL: one row in memory at a time."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from components.dataset.images import Refusal
from components.errors import DataError

READ = 2**20  # characters read ahead in a JSON list
LONGEST = 2**26  # characters of one element of it: past them it is not the element that is long but a quote that is missing
NUMBER = "0123456789.eE+-"
SPACE = re.compile(r"[ \t\n\r]*")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each row; a JSONL line that is no JSON comes as the Refusal that it deserves.

    Raises DataError if the file is not there, cannot be read, is neither a list nor lines, or starts as a list and is none.
    """
    try:
        with path.open("rb") as file:
            is_list = _is_list(path, file.read(2**16))
            file.seek(0)
            yield from enumerate(elements(file), start=1) if is_list else _lines(file)
    except FileNotFoundError:
        raise DataError(f"params/data.yaml: the annotations file {path} is missing") from None
    except OSError as error:
        raise DataError(f"params/data.yaml: the annotations file {path} cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        raise DataError(f"{path} is no JSON list: {refusal.detail}") from None


def _is_list(path: Path, beginning: bytes) -> bool:
    """Else it is JSONL. Raises DataError if it can be neither."""
    if beginning.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"{path} is compressed; unpack it first (gunzip, unzip, xz -d, zstd -d)")
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in beginning[:100]:
        raise DataError(f"{path} is UTF-16 or no text at all; rows are UTF-8: iconv -f UTF-16 -t UTF-8")
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{") and text[1:].lstrip(b" \t\r").startswith(b"\n"):  # an object on several lines
        raise DataError(f"{path} is one JSON object; rows are a list, [{{...}}, ...], or one object a line")
    return text.startswith(b"[")


def parse(content: bytes) -> Any:
    """Raises Refusal malformed_json."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refusal("malformed_json", str(error)) from None


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse(line)
            except Refusal as refusal:
                yield number, refusal


def elements(file: BinaryIO) -> Iterator[Any]:
    """The elements of a JSON list, one after another. Raises Refusal malformed_json where it stops being one."""
    text = _Text(file)
    text.expect("[")
    if text.symbol() != "]":
        yield text.value()
        while text.symbol() == ",":
            text.at += 1
            yield text.value()
    text.expect("]")
    if symbol := text.symbol():
        raise Refusal("malformed_json", f"{symbol!r} follows the list")


class _Text:
    """A JSON text, of which a part is held: `text` from `at` on is not used up yet."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self._decoder = json.JSONDecoder()
        self.text, self.at = "", 0

    def symbol(self) -> str:
        """The next character that is no space, not used up; empty at the end."""
        while True:
            found = SPACE.match(self.text, self.at)
            assert found is not None  # it matches nothing at least
            self.at = found.end()
            if self.at < len(self.text) or not self._more(READ):
                return self.text[self.at : self.at + 1]

    def expect(self, symbol: str) -> None:
        if (found := self.symbol()) != symbol:
            raise Refusal("malformed_json", f"{found!r} stands where {symbol!r} should" if found else "it ends in the middle")
        self.at += 1

    def value(self) -> Any:
        self.symbol()
        wanted = READ
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
                if end < len(self.text) and self.text[end] not in NUMBER:  # else it may go on: 12 of 123, 1 of 1.5
                    self.at = end
                    return value
                problem = "it ends in the middle"
            except RecursionError as error:
                raise Refusal("malformed_json", str(error)) from None
            except ValueError as error:  # perhaps only because the rest has not been read
                problem = str(error)
            if len(self.text) - self.at > LONGEST or not self._more(wanted):
                raise Refusal("malformed_json", problem)
            wanted *= 2

    def _more(self, amount: int) -> bool:
        try:
            read = self._file.read(amount)
        except UnicodeDecodeError as error:
            raise Refusal("malformed_json", str(error)) from None
        self.text, self.at = self.text[self.at :] + read, 0
        return bool(read)
