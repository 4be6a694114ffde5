"""Pretrained checkpoints: hub ids at a pinned commit, or local folders, placed under `artifacts/models` for DVC to version.

Safetensors only; pickles and code are neither downloaded nor copied.
"""

from __future__ import annotations

import errno
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from components.config.models import Checkpoint
from components.errors import ModelError, TryAgainError, machine_error
from components.io import whole_folder
from components.models.checkpoint_folder import weight_files

WEIGHTS = "*.safetensors"
ALLOWED_PATTERNS = [WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md"]
SUBFOLDERS = ["*/*"]  # exports to other formats, training checkpoints


def obtain(checkpoint: Checkpoint, target: Path) -> Path:
    """Download or copy `checkpoint` to `target`, atomically. Raises as `locate` does, and TryAgainError if the disk is full."""
    source = locate(checkpoint)
    files = sorted(file for file in source.iterdir() if file.is_file() and any(fnmatch(file.name, p) for p in ALLOWED_PATTERNS))
    with whole_folder(target) as draft:
        for file in tqdm(files, desc=f"{target.parent.name} {target.name}", unit="file"):
            _link_or_copy(file.resolve(), draft / file.name, link=checkpoint.revision is not None)
    return target


def locate(checkpoint: Checkpoint, weights: bool = True) -> Path:
    """Local folder, or the hub's snapshot of that commit, downloaded if it is not in the cache, with or without its weights.

    Raises:
        ModelError: no such repository, revision or folder; gated; no safetensors weights; a file cut short.
        TryAgainError: the hub cannot be reached, or the download broke off; the next run resumes it.
    """
    if checkpoint.revision is None:
        source = Path(checkpoint.source).expanduser()
        if not source.is_dir():
            raise ModelError(f"{source}: no such folder; for a hub id, give its 40-digit commit as `revision`")
    else:
        source = snapshot(checkpoint.source, checkpoint.revision, weights)
    if weights or checkpoint.revision is None:
        weight_files(source)
    return source


def snapshot(source: str, revision: str | None, weights: bool = True) -> Path:
    """Hub cache folder of a model, downloaded if absent; the newest revision by default.

    Raises ModelError and TryAgainError as `locate`.
    """
    patterns = [pattern for pattern in ALLOWED_PATTERNS if weights or pattern != WEIGHTS]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=SUBFOLDERS))
    except GatedRepoError:
        raise ModelError(
            f"{source} is gated: accept its terms on huggingface.co, then `hf auth login` or set HF_TOKEN, and run again"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{source} has no revision {revision}; see its history on huggingface.co") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(f"{source}: no such model on the hub, or it is private and HF_TOKEN does not open it") from None
    except LocalEntryNotFoundError as error:
        raise TryAgainError(
            f"{source}: the hub cannot be reached and the model is not in the local cache ({_cause(error)}); "
            "check the network, unset HF_HUB_OFFLINE, or give a local folder with `revision: null`"
        ) from None
    except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: of hf_xet
        raise machine_error(error) or TryAgainError(
            f"{source}: the download broke off ({_cause(error)}); run again to go on from there"
        ) from None
    if weights and not any(folder.glob(WEIGHTS)):
        raise ModelError(
            f"{source}{f' at {revision[:8]}' if revision else ''} has no *.safetensors weights, and pickled ones are not "
            "taken, since reading them can run code; convert them, or choose another revision"
        )
    return folder


def _link_or_copy(file: Path, target: Path, link: bool) -> None:
    """Hard-link from the hub's cache, whose files never change; copy a user's files, which may."""
    if link:
        try:
            return os.link(file, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):  # links not supported: copy
                raise
    shutil.copy2(file, target)
    return None


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no message'])[0]}"
