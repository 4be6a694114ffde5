"""`alignti push`: upload of a checkpoint to the Hub; a dry run without the explicit flag."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from components.distill.card import NOT_STATED
from components.errors import HIDDEN, InputError, ModelError, TryAgainError, first_line
from components.models.checkpoint_folder import weight_files
from components.models.download import ALLOWED_PATTERNS

CARD = "README.md"
NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial|research only", re.IGNORECASE)
UNSTATED = re.compile(r"note it here before|not verified|unknown", re.IGNORECASE)  # unknown licences in our data cards


@dataclass(frozen=True)
class Upload:
    """Upload plan: files, excluded files and warnings."""

    folder: Path
    repo: str
    files: dict[str, int]  # name -> bytes
    left_out: list[str]
    warnings: list[str]
    private: bool

    def __str__(self) -> str:
        width = max(len(name) for name in self.files)
        lines = [f"{self.folder} -> {self.repo} on huggingface.co ({'private' if self.private else 'PUBLIC'}):"]
        lines += [f"  {name:{width}}  {size / 2**20:10,.2f} MiB" for name, size in self.files.items()]
        lines.append(f"  {len(self.files)} files, {sum(self.files.values()) / 2**20:,.2f} MiB")
        lines += [f"  not uploaded: {name}" for name in self.left_out]
        return "\n".join([*lines, *(f"  WARNING: {warning}" for warning in self.warnings)])


def check_repo(repo: str) -> None:
    """Raises InputError if `repo` is no ORG/NAME."""
    if "/" not in repo:
        raise InputError(f"{repo!r}: name the repository ORG/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no name of a repository: {_redacted(error)}") from None


def plan(folder: Path, repo: str, private: bool) -> Upload:
    """Upload plan. Raises ModelError without a complete checkpoint and a card."""
    weight_files(folder)
    if not (folder / CARD).is_file():
        raise ModelError(
            f"{folder}: no {CARD}, and a model without a card tells nobody what it is; `alignti export` writes one"
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.name: path.stat().st_size
        for path in paths
        if path.parent == folder and any(fnmatch(path.name, pattern) for pattern in ALLOWED_PATTERNS)
    }
    left_out = [path.relative_to(folder).as_posix() for path in paths if path.parent != folder or path.name not in files]
    return Upload(folder, repo, files, left_out, list(warnings(folder / CARD)), private)


def warnings(card: Path) -> Iterator[str]:
    """Warnings on licences and scores from the card's front matter. Raises ModelError if it is not valid."""
    try:
        front_matter = ModelCard(card.read_text(encoding="utf-8")).data.to_dict()
    except Exception as error:  # from yaml and from the hub client
        raise ModelError(f"{card}: its front matter is not valid: {_redacted(error)}") from None
    if not front_matter.get("license"):
        yield f"{card.name} names no `license:`; choose one that all that went in allows, and put it into its front matter"
    licences = front_matter.get("licences_of_inputs")
    if not licences:
        yield f"{card.name} does not say under which licences its teacher, its start and its data are"
    stated = licences if isinstance(licences, Mapping) else {"its inputs": licences} if licences else {}
    for component, licence in _flatten(stated):
        if licence == NOT_STATED or UNSTATED.search(licence):
            yield f"the licence of {component} is not stated; find out whether you may pass on what was made of it"
        elif NON_COMMERCIAL.search(licence):
            yield f"{component} is for non-commercial use or research ({licence})"
    if not front_matter.get("model-index"):
        yield f"{card.name} has no scores"


def push(upload: Upload, update: bool, api: HfApi | None = None) -> str:
    """Upload as one commit; returns its URL. Creates a missing repository.

    Args:
        update: allow a commit to a repository that already holds files.

    Raises:
        InputError: no token, or one without write access; gated; the repository is public and the plan private, or it holds
            files and `update` is not set.
        TryAgainError: no network, or a failure of the hub; a retry resumes the upload.
    """
    api = api or HfApi()
    try:
        if not (api.token or get_token()):
            raise LocalTokenNotFoundError
        repo_url = api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        if upload.private and api.repo_info(upload.repo).private is False:
            raise InputError(f"{upload.repo} is on the hub already and public; choose another name, or say --public")
        files = [name for name in api.list_repo_files(upload.repo) if name != ".gitattributes"]
        if files and not update:
            raise InputError(
                f"{upload.repo} is on the hub already and holds {len(files)} files; choose another name, or --update to add a"
                " commit"
            )
        commit = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            commit_message="Upload by alignti push",
        )
    except LocalTokenNotFoundError:
        raise InputError("no token of the hub: `hf auth login`, or set HF_TOKEN to one that may write") from None
    except GatedRepoError:
        raise InputError(f"{upload.repo} is gated, and this token's account has no access; ask its owner") from None
    except HfHubHTTPError as error:
        raise _hub_error(upload.repo, error) from None
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: of hf_xet
        raise TryAgainError(f"the hub cannot be reached ({_redacted(error)}); check the network and HF_HUB_OFFLINE") from None
    return str(getattr(commit, "commit_url", None) or repo_url)


def _hub_error(repo: str, error: HfHubHTTPError) -> InputError | TryAgainError:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        return InputError("the hub does not take this token; `hf auth login`, or set HF_TOKEN to one that may write")
    if status in (403, 404):
        return InputError(f"this token may not write to {repo}; name your own account or an organisation that you may write to")
    if status == 429 or status >= 500:
        return TryAgainError(f"{repo}: the hub answers {status}; run again later, and it goes on")
    return InputError(f"{repo}: the hub refuses: {_redacted(error)}")


def _flatten(licences: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for component, licence in licences.items():
        if isinstance(licence, Mapping):
            yield from ((f"{component} {name}", str(value)) for name, value in licence.items())
        else:
            yield component, str(licence)


def _redacted(error: Exception) -> str:
    """First line of the message, without the token: `redact` covers the environment's only, not that of `hf auth login`."""
    line = first_line(error)
    return line.replace(token, HIDDEN) if (token := get_token()) else line
