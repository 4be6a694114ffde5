"""Trial of all rows, distributed over processes.

Writes SPLIT.npy for each split: turns retained (0: left out), tokens and response tokens of each sample; remarks.jsonl: samples
left out or changed, with reasons; rows.json: counts. `Samples` skips what is left out, so that no row stops a training. An
interrupted run is resumed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from components.config.models import ModelsSettings
from components.config.settings import Settings
from components.dataset.shards import Samples
from components.errors import DataError
from components.io import draft_of, fingerprint, sha256, whole_folder, write_text
from components.process import shared_out
from components.records.dataset import Manifest
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, RUNS, SPLITS, Split
from components.records.record import jsonl
from components.records.rows import TriedRows, TriedSplit
from components.rows.judge import CUT, RESIZED, VERDICT, Issue, Judge, distinct_encodings

IMAGES_PER_JOB = 4_000
BATCH_SIZE = 64  # samples


def try_rows(
    settings: Settings, workers: int, dataset: Path = DATASET, models: Path = MODELS, target: Path = ROWS
) -> TriedRows:
    """Try all rows and write `target`. Raises DataError if more than `limits.max_bad_ratio`, or a whole split, is left out."""
    index = ModelIndex.read(models / "index.json")
    folders = distinct_encodings([Path(record.path) for record in (*index.teachers.values(), *index.students.values())])
    manifest = Manifest.read(dataset / "manifest.json")
    inputs = {"dataset": manifest.digest, "models": [str(folder) for folder in folders], "index": index.model_dump(mode="json")}
    inputs |= {"settings": settings.models.model_dump(mode="json", exclude={"embedded", "pretrained"})}
    draft = RUNS / "check_rows" / fingerprint(inputs, ["rows", "models"])
    _run_missing_jobs(dataset, manifest, folders, settings.models, draft, workers)
    verdicts = {split: np.concatenate([np.load(part) for part in _parts(draft, split)]) for split in SPLITS}
    counts = {split: _count(verdicts[split], _read_issues(draft, split)) for split in SPLITS}
    _accept(counts, draft, settings.data.limits.max_bad_ratio)
    with whole_folder(target) as folder:
        for split, verdict in verdicts.items():
            np.save(folder / f"{split}.npy", verdict)
        with (folder / "remarks.jsonl").open("wb") as file:
            file.writelines(part.with_suffix(".jsonl").read_bytes() for split in SPLITS for part in _parts(draft, split))
        result = TriedRows(
            digest=manifest.digest,
            max_length=settings.models.max_length,
            tried_with=[folder.name for folder in folders],
            splits=counts,
            sha256={split: sha256([folder / f"{split}.npy"]) for split in SPLITS},
        )
        result.write(folder / "rows.json")
    shutil.rmtree(draft.parent)
    return result


def _run_missing_jobs(
    dataset: Path, manifest: Manifest, folders: list[Path], settings: ModelsSettings, draft: Path, workers: int
) -> None:
    """Compute all missing parts; a part is complete if its .npy file exists."""
    jobs = []
    for split in SPLITS:
        images = manifest.splits[split].images
        for first in range(0, images, IMAGES_PER_JOB):
            part = draft / f"{split}-{first:09d}.npy"
            if not part.exists():
                last = min(first + IMAGES_PER_JOB, images)
                jobs.append((dataset, split, first, last, tuple(folders), settings.model_dump_json(), part))
    for split in SPLITS:
        Samples(dataset, split)  # checks the hashes once; worker processes do not
    with tqdm(desc="check_rows", total=sum(last - first for _, _, first, last, *_ in jobs), unit="image") as bar:
        for images in shared_out(try_part, jobs, workers):
            bar.update(images)


def try_part(dataset: Path, split: Split, first: int, last: int, folders: tuple[Path, ...], settings: str, part: Path) -> int:
    """Try the samples about images `first`..`last` - 1 and write verdicts and issues; returns the number of images."""
    judge, samples = build_judge(folders, settings), _samples(dataset, split)
    verdicts: list[tuple[int, int, int]] = []
    issues: list[Issue] = []
    sizes = {row: samples.image_sizes(row) for row in range(first, last)}
    pairs = [(sample, row_sizes[: len(sample.images)]) for row, row_sizes in sizes.items() for sample in samples.texts(row)]
    for start in range(0, len(pairs), BATCH_SIZE):
        batch, batch_sizes = zip(*pairs[start : start + BATCH_SIZE], strict=True)
        for verdict, issue in judge(split, batch, batch_sizes):
            verdicts.append(verdict)
            issues += [issue] if issue else []
    write_text(part.with_suffix(".jsonl"), jsonl(issues))
    with draft_of(part) as draft, draft.open("wb") as file:
        np.save(file, np.array(verdicts, dtype=VERDICT))
    return last - first


@lru_cache(maxsize=1)
def build_judge(folders: tuple[Path, ...], settings: str) -> Judge:
    return Judge(folders, ModelsSettings.model_validate_json(settings))


@lru_cache(maxsize=3)
def _samples(dataset: Path, split: Split) -> Samples:
    return Samples(dataset, split, check=False)


def _parts(draft: Path, split: Split) -> list[Path]:
    return sorted(draft.glob(f"{split}-*.npy"))


def _read_issues(draft: Path, split: Split) -> Iterator[Issue]:
    for part in _parts(draft, split):
        with part.with_suffix(".jsonl").open(encoding="utf-8") as file:
            yield from map(Issue.model_validate_json, file)


def _count(verdict: np.ndarray, issues: Iterable[Issue]) -> TriedSplit:
    reasons = Counter(issue.reason for issue in issues)
    usable = verdict["turns"] > 0
    return TriedSplit(
        samples=len(verdict),
        usable=int(usable.sum()),
        cut=reasons.pop(CUT, 0),
        resized=reasons.pop(RESIZED, 0),
        left_out=dict(reasons),
        tokens=int(verdict["tokens"].sum(dtype=np.int64)),
        response_tokens=int(verdict["response"].sum(dtype=np.int64)),
        longest=int(verdict["tokens"].max()),
    )


def left_out(splits: Mapping[Split, TriedSplit]) -> Counter[str]:
    """Number of excluded samples by reason."""
    return sum((Counter(split.left_out) for split in splits.values()), Counter())


def _accept(splits: Mapping[Split, TriedSplit], draft: Path, max_bad_ratio: float) -> None:
    samples, dropped = sum(counts.samples for counts in splits.values()), left_out(splits)
    issues_file = RUNS / "check_rows" / "remarks.jsonl"
    if dropped.total() > max_bad_ratio * samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        problem = (
            f"{dropped.total():,} of {samples:,} samples cannot be trained on, more than limits.max_bad_ratio = {max_bad_ratio}"
            f" of params/data.yaml allows: {reasons}; each and its reason is in {issues_file}"
        )
    elif empty := [split for split, counts in splits.items() if not counts.usable]:
        problem = f"no sample of {' and '.join(empty)} can be used; the reasons are in {issues_file}"
    else:
        return
    write_text(issues_file, jsonl(issue for split in SPLITS for issue in _read_issues(draft, split) if not issue.kept))
    raise DataError(problem)
