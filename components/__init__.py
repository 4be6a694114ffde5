"""Rooms of the platform; each stage is one `python -m components.<room>`."""

import io
import os
import sys

for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:  # closed, as some schedulers start what they start: what is opened next would take its place
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115

for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")  # a text that this terminal or log cannot show ends nothing

os.environ.setdefault("TQDM_DELAY", "2")  # what is done before has no bar. Read, as below, by tqdm when it is imported
if not sys.stderr.isatty():
    # A log is not a terminal: progress now and then instead of ten times a second, and no drawing.
    os.environ.setdefault("TQDM_MININTERVAL", "15")
    _line = "{desc}: {percentage:.0f}%| {n_fmt} of {total_fmt}, {remaining} left{postfix}\n"
    os.environ.setdefault("TQDM_BAR_FORMAT", _line)

if any(name.lower().endswith("_proxy") for name in os.environ):
    # No proxy stands between this machine and itself. Read by urllib, requests and httpx, and by what is started from here.
    _direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if _direct.strip() != "*":
        _named = {name.strip() for name in _direct.split(",")}
        _direct = ",".join(filter(None, [_direct, *sorted({"127.0.0.1", "localhost", "::1"} - _named)]))
    os.environ |= {"no_proxy": _direct, "NO_PROXY": _direct}
