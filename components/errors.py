"""Exceptions and their exit codes: 2 wrong input, 75 try again, 143 interrupted but resumable."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class AlignTIError(Exception):
    """Base of all errors that this project raises on purpose. The message gives fault, place and remedy; secrets are redacted,
    since it ends in logs and on servers."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class InputError(AlignTIError):
    """Wrong file, setting or argument: a retry changes nothing."""


class SettingsError(InputError):
    """One or more problems in `params/`; the message lists all of them."""


def unknown(kind: str, name: str, existing: Iterable[str]) -> InputError:
    """InputError for an unknown name, with the nearest known one and the full list."""
    names = list(existing)
    return InputError(f"there is no {kind} {name!r}; {meant(name, names)}there are {', '.join(names) or 'none'}")


def meant(name: str, existing: Iterable[str]) -> str:
    """Suggestion of the nearest known name, `did you mean 'x'? `; empty if none is near."""
    near = difflib.get_close_matches(name, list(existing), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def first_line(error: BaseException) -> str:
    """First line of the error's message, at most 300 characters, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class ModelError(InputError):
    """Checkpoint, tokenizer or processor that is unusable as configured."""


class DataError(InputError):
    """Data set, shard or sample that is unusable as configured."""


def shortened(text: str) -> str:
    """Text, without its middle if overlong."""
    return text if len(text) <= 500 else f"{text[:400]} ... {text[-90:]}"


class Refusal(Exception):
    """Row, image or sample that is left out: `reason` is a keyword of docs/data.md, `detail` a sentence, cut if overlong. The
    stage goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, shortened(detail)
        super().__init__(self.detail)


class TryAgainError(AlignTIError):
    """Transient fault: no network, a full disk, a busy lock."""

    exit_code = 75


class Interrupted(AlignTIError):
    """Stopped by a signal; the same command resumes from the last saved state."""

    exit_code = 143


NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file may not be so large"}
LIMITS = {
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this machine may open no more files",
    errno.EAGAIN: "no more processes may be started (ulimit -u)",
    errno.ENOMEM: "memory is used up",
    errno.ENOLCK: "this file system gives no locks (NFS without its lock service, perhaps)",
}
PERMISSION_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: Python's, or torch's of a device or the processor."""
    text = str(error)
    of_torch = "out of memory" in text or ("DefaultCPUAllocator" in text and "allocate" in text)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def machine_error(error: BaseException) -> AlignTIError | None:
    """Fault of the machine as TryAgainError (no space, quota, files, processes, memory or locks left) or InputError (path not
    writable, or no valid name; batches that torch has no memory for); None for other faults. Rust libraries, e.g. safetensors,
    give the errno in their text alone."""
    if out_of_memory(error) and not isinstance(error, MemoryError):
        return InputError(
            f"out of memory ({first_line(error)}); lower what this stage reads of batch_size in params/evaluate.yaml and"
            " params/irs.yaml and micro_batch_size in params/distill.yaml, or end what else holds the device"
        )
    match = re.search(r"\(os error (\d+)\)", str(error))
    code = errno.ENOMEM if isinstance(error, MemoryError) else isinstance(error, OSError) and error.errno
    number = int(match[1]) if match else code or 0
    location = error.filename if isinstance(error, OSError) and error.filename else "what it was about to write"
    if number in NO_ROOM:
        return TryAgainError(f"{NO_ROOM[number]} ({location}); free space and run again")
    if number in LIMITS:
        return TryAgainError(f"{LIMITS[number]}; run again when that has changed")
    if number in PERMISSION_ERRORS:
        return InputError(f"{location}: {os.strerror(number).lower()}; see who owns it (ls -ld)")
    if number in (errno.ENAMETOOLONG, errno.ELOOP):
        return InputError(f"{str(location)[:60]} ...: {os.strerror(number).lower()}")
    return None


SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_KEY|AUTH|AUTH_STRING|WEBHOOK(_URL)?)$")  # variable names
MIN_SECRET_CHARS = 6  # characters; shorter values occur as ordinary words
LOGIN = re.compile(r"//[^/\s]+@")  # user:password@ in a URL, up to the last @: a password may hold one
HIDDEN = "***"


def redact(text: str) -> str:
    """`text` with URL logins and the values of secret environment variables masked."""
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return LOGIN.sub(f"//{HIDDEN}@", text)


def without_login(address: str) -> str:
    """http://user:password@host/ as http://host/"""
    return LOGIN.sub("//", address)


def _secrets() -> set[str]:
    """Values of environment variables with secret names; for user:password also the password alone."""
    values = {value for name, value in os.environ.items() if SECRET.search(name.upper())}
    values |= {value.partition(":")[2] for value in values if not value.startswith("http")}
    return {value for value in values if len(value) >= MIN_SECRET_CHARS}
