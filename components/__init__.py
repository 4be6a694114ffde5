"""Rooms of the platform; each stage is one `python -m components.<room>`."""

from __future__ import annotations

import errno
import io
import os
import pwd
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:  # closed by some schedulers: the next file opened would take its descriptor
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115

for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")  # characters outside its encoding raise no error


class _Terminal(io.FileIO):
    """Terminal's descriptor, which is /dev/null from the first write after the terminal was closed: some milliseconds lie
    between that and SIGHUP, and the error of a progress bar would end a stage that SIGHUP lets save."""

    def write(self, text: Buffer, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(text).nbytes


def _on_terminal(stream: TextIO, number: int) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or not stream.isatty():
        return stream
    terminal = _Terminal(number, "w", closefd=False)
    return io.TextIOWrapper(
        terminal if stream.write_through else io.BufferedWriter(terminal),  # type: ignore[arg-type]  # raw, as of `python -u`
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


sys.stdout, sys.stderr = _on_terminal(sys.stdout, 1), _on_terminal(sys.stderr, 2)

try:
    pwd.getpwuid(os.getuid())
except KeyError:  # `docker run --user`: a user without an account, whose name DVC asks for
    os.environ |= {"USER": str(os.getuid()), "HOME": "/"} | os.environ

os.environ.setdefault("TQDM_DELAY", "2")  # no bar for shorter loops; tqdm reads these when it is imported
if not sys.stderr.isatty():
    # Log file: one progress line per 15 s instead of a redrawn bar.
    os.environ.setdefault("TQDM_MININTERVAL", "15")
    _line = "{desc}: {percentage:.0f}%| {n_fmt} of {total_fmt}, {remaining} left{postfix}\n"
    os.environ.setdefault("TQDM_BAR_FORMAT", _line)

if any(name.lower().endswith("_proxy") for name in os.environ):
    # Proxy bypass for loopback addresses, read by urllib, requests, httpx and child processes.
    _direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if _direct.strip() != "*":
        _named = {name.strip() for name in _direct.split(",")}
        _direct = ",".join(filter(None, [_direct, *sorted({"127.0.0.1", "localhost", "::1"} - _named)]))
    os.environ |= {"no_proxy": _direct, "NO_PROXY": _direct}
