"""Streaming reader of JSON lists and JSONL: one row in memory at a time."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from components.dataset.json_values import each_once, whole_number
from components.dataset.row import CONVERSATION, PROMPT
from components.errors import DataError, Refusal

READ = 2**20  # characters read ahead in a JSON list
LONGEST = 2**26  # characters of a list element; a longer one is taken for an unterminated string
LONGEST_LINE = 2**28  # bytes of one row of JSONL
NUMBER = "0123456789.eE+-"
SPACE = re.compile(r"[ \t\n\r]*")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each row. The content is a Refusal for a JSONL line that is not JSON, and for a row with a
    duplicate key, of which JSON readers silently take the last, or a number too long for Python.

    Raises DataError if the file is missing, unreadable, neither JSONL nor a list, a malformed list, or has an overlong line.
    """
    number = 0
    try:
        with path.open("rb") as file:
            is_list = _is_list(path, file.read(2**16))
            file.seek(0)
            for number, row in enumerate(elements(file), start=1) if is_list else _lines(path, file):
                yield number, row
    except FileNotFoundError:
        raise DataError(f"params/data.yaml: the annotations file {path} is missing") from None
    except OSError as error:
        raise DataError(f"params/data.yaml: the annotations file {path} cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        raise DataError(f"{path} is no JSON list: after {number:,} rows, {refusal.detail}") from None


def _is_list(path: Path, beginning: bytes) -> bool:
    """Whether a file is a JSON list; else it is JSONL. Raises DataError if it can be neither."""
    if beginning.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"{path} is compressed; unpack it first (gunzip, unzip, xz -d, zstd -d)")
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in beginning[:100]:
        raise DataError(f"{path} is UTF-16 or no text at all; rows are UTF-8: iconv -f UTF-16 -t UTF-8")
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{") and text[1:].lstrip(b" \t\r").startswith(b"\n"):  # one object over several lines
        raise _no_rows(path)
    if text and not text.startswith(b"[") and not any(line.lstrip().startswith(b"{") for line in text.splitlines()):
        raise DataError(
            f"{path} begins with {text[:30].decode('utf-8', 'replace')!r}: rows are a JSON list or JSONL, so convert it"
        )
    return text.startswith(b"[")


def _no_rows(path: Path) -> DataError:
    return DataError(f"{path} is one JSON object; rows are a list, [{{...}}, ...], or one object a line")


def parse(content: bytes, name: str = "") -> Any:
    """Parse one JSON text. Raises Refusal malformed_json, with `name` before the detail."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=each_once, parse_int=whole_number)
    except Refusal as refusal:
        raise Refusal(refusal.reason, f"{name}{refusal.detail}") from None
    except json.JSONDecodeError as error:
        raise Refusal("malformed_json", f"{name}{error.msg} at character {error.pos + 1:,}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal("malformed_json", f"{name}{error}") from None


def _lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
        if len(line) == LONGEST_LINE:
            raise DataError(f"{path}: line {number:,} has more than {LONGEST_LINE >> 20} MiB; rows are one JSON object a line")
        if line.strip():
            try:
                row = parse(line, f"{path.name}, line {number:,}: ")
            except Refusal as refusal:
                row = refusal
            if number == 1 and _holds_rows(row) and not file.peek(1):
                raise _no_rows(path)
            yield number, row


def _holds_rows(value: Any) -> bool:
    """Whether an object is not a row but holds rows, as in {"data": [{...}, ...]} or {"1": {...}, ...}."""
    if not isinstance(value, dict) or not {*CONVERSATION, *PROMPT}.isdisjoint(value):
        return False
    return any(
        isinstance(item, dict) for member in value.values() for item in (member if isinstance(member, list) else [member])
    )


def elements(file: BinaryIO) -> Iterator[Any]:
    """Elements of a JSON list, one at a time. Raises Refusal malformed_json at the first syntax error."""
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
    """Streaming JSON parser: `text` is the buffer, `at` the position in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self._refusal: Refusal | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._recorded(each_once), parse_int=self._recorded(whole_number))
        self.text, self.at = "", 0

    def symbol(self) -> str:
        """Next character that is not white space, without consuming it; empty at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            assert space is not None  # matches the empty string
            self.at = space.end()
            if self.at < len(self.text) or not self._more(READ):
                return self.text[self.at : self.at + 1]

    def expect(self, symbol: str) -> None:
        if (next_symbol := self.symbol()) != symbol:
            raise Refusal(
                "malformed_json", f"{next_symbol!r} stands where {symbol!r} should" if next_symbol else "it ends in the middle"
            )
        self.at += 1

    def value(self) -> Any:
        self.symbol()
        amount = READ
        while True:
            try:
                self._refusal = None
                value, end = self._decoder.raw_decode(self.text, self.at)
                if end < len(self.text) and self.text[end] not in NUMBER:  # a number may continue: 12 of 123, 1 of 1.5
                    self.at = end
                    return self._refusal or value
                problem = "it ends in the middle"
            except RecursionError as error:
                raise Refusal("malformed_json", str(error)) from None
            except json.JSONDecodeError as error:  # may be for want of more text
                problem = f"{error.msg}: {self.text[max(self.at, error.pos - 20) : error.pos + 20]!r}"
            if len(self.text) - self.at > LONGEST or not self._more(amount):
                raise Refusal("malformed_json", problem)
            amount *= 2

    def _recorded(self, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`hook`, whose refusal is recorded; the decoder continues, so that the list's other elements are read."""

        def called(value: Any) -> Any:
            try:
                return hook(value)
            except Refusal as refusal:
                self._refusal = refusal

        return called

    def _more(self, amount: int) -> bool:
        try:
            read = self._file.read(amount)
        except UnicodeDecodeError as error:
            raise Refusal("malformed_json", str(error)) from None
        self.text, self.at = self.text[self.at :] + read, 0
        return bool(read)
