"""`alignti check --data`: dry run of `prepare` and `check_rows` on every row; only counts are kept.

Rows are indexed in a temporary folder. Images are opened and checked as in `prepare`, but not compared: near duplicates are
found by `prepare` alone.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

from components.config.settings import Settings
from components.dataset.prepare import bad_rows, source_of
from components.dataset.shard_jobs import WORTH_A_WORKER
from components.dataset.shards import Sample, Turn, image_sizes
from components.dataset.source import Refused, Rule, Source, Stored
from components.errors import DataError
from components.irs.choice import NoRegions
from components.irs.search import TooFewInstructions, instructions
from components.models.rendered import question_of
from components.process import cores, shared_out
from components.records.paths import SPLITS, Split
from components.report.markdown import counted
from components.rows.judge import CUT, RESIZED, Issue, Judge, distinct_encodings
from components.rows.trial import build_judge

if TYPE_CHECKING:
    from components.models.collate import Collator

EXAMPLES = 3  # rows shown per reason
CONNECTED = "rows that share an image are in one split, and so is every image that they connect"


@dataclass
class Tally:
    """Counts of images and samples, mergeable over parts."""

    images: Counter[Split] = field(default_factory=Counter)
    together: Counter[Split] = field(default_factory=Counter)  # of `images`: several, shown together
    samples: Counter[Split] = field(default_factory=Counter)
    usable: Counter[Split] = field(default_factory=Counter)
    questions: array[int] = field(default_factory=lambda: array("Q"))  # triples of split, image and question about it
    tokens: Counter[int] = field(default_factory=Counter)  # usable samples by token count
    answers: Counter[tuple[Split, int]] = field(default_factory=Counter)  # first answers by token count, with EOS
    refused: list[Refused] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    def add(self, split: Split, samples: list[Sample], judge: Judge | None) -> None:
        """Count the samples about one image, or about several shown together."""
        self.images[split] += 1
        self.together[split] += len(samples[0].images) > 1
        self.samples[split] += len(samples)
        if judge is None:
            self.questions.extend(_question_triples(split, samples))
            return
        usable = []
        verdicts = judge(split, samples, [image_sizes(samples[0].images)] * len(samples))
        for sample, ((turns, tokens, _), issue) in zip(samples, verdicts, strict=True):
            if turns:
                usable.append(sample)
                self.tokens[tokens] += 1
            self.issues += [issue] if issue else []
        self.usable[split] += len(usable)
        self.questions.extend(_question_triples(split, usable))
        self.answers.update((split, length) for length in answer_lengths(judge.collators[0], usable))

    def first_answers(self, *splits: Split) -> Counter[int]:
        """First answers by token count, in these splits or in all."""
        return Counter(length for split, length in self.answers.elements() if split in (splits or SPLITS))

    def merge(self, other: Tally) -> None:
        for name, value in vars(other).items():
            total = getattr(self, name)
            total.update(value) if isinstance(total, Counter) else total.extend(value)

    @property
    def left_out(self) -> list[Issue]:
        return [issue for issue in self.issues if not issue.kept]

    def images_with_questions(self, split: Split, minimum: int) -> int:
        """Number of different images of the split with at least `minimum` different questions, in any rows."""
        distinct = np.unique(np.frombuffer(self.questions, np.uint64).reshape(-1, 3), axis=0)
        _, counts = np.unique(distinct[distinct[:, 0] == SPLITS.index(split), 1], return_counts=True)
        return int((counts >= minimum).sum())


@dataclass(frozen=True)
class CheckResult:
    """Result of `try_data`."""

    source: str  # title
    rows_in: int
    rules: list[Rule]
    boxes: bool
    tally: Tally


def _question_triples(split: Split, samples: Sequence[Sample]) -> Iterator[int]:
    """Triples, one after the other: number of the split, hash of the image (or images shown together), hash of a question."""
    for sample in instructions(samples):
        image_digests = b"".join(hashlib.sha256(image).digest() for image in sample.images)
        yield from (SPLITS.index(split), _hash(image_digests), _hash(question_of(sample.turns[0]).encode()))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def answer_lengths(collator: Collator, samples: Sequence[Sample]) -> list[int]:
    """Token count of each sample's first answer, with EOS: the length that `evaluate` has to generate."""
    first_turns = (sample.turns[0] for sample in samples)
    single_turns = [Sample("", "", "", None, (Turn(question_of(turn), turn.answer),)) for turn in first_turns]
    return [int(row.response.sum()) for row in collator.encode(single_turns)] if single_turns else []


def try_data(settings: Settings, folders: Iterable[Path], workers: int | None = None) -> CheckResult:
    """Try all rows with the models in `folders`, in `workers` processes. Raises DataError if the source cannot be read."""
    with tempfile.TemporaryDirectory(prefix="alignti-") as scratch:
        source = source_of(settings.data, Path(scratch) / "index.sqlite")
        tally = Tally(refused=list(source.refused()))
        judge_args = (tuple(distinct_encodings(list(folders))), settings.models.model_dump_json())
        count = min(workers or cores(), source.parts, source.images // WORTH_A_WORKER)
        with tqdm(desc="check: rows tried", total=source.images, unit="image") as bar:
            for partial in shared_out(try_part, [(source, part, *judge_args) for part in range(source.parts)], count):
                tally.merge(partial)
                bar.update(partial.images.total())
        tally.refused.sort(key=lambda refused: (refused.source or "", refused.row))
        tally.issues.sort(key=lambda issue: (issue.split, issue.id))
        return CheckResult(source.title, source.rows_in, source.rules(), source.boxes, tally)


def try_part(source: Source, part: int, folders: tuple[Path, ...], models: str) -> Tally:
    tally, judge = Tally(), build_judge(folders, models) if folders else None
    for outcome in source.rows(part):
        if isinstance(outcome, Stored):
            tally.add(outcome.origin.split, outcome.row.about(), judge)
        else:
            tally.refused += outcome
    return tally


# --- report -----------------------------------------------------------------------------------------------------------


def report(result: CheckResult, settings: Settings, folders: dict[str, Path], missing: list[str]) -> Iterator[str]:
    """Output lines of `alignti check --data`."""
    tally = result.tally
    yield f"data: {result.source}"
    share = f" ({len(tally.refused) / result.rows_in:.1%})" if tally.refused else ""
    yield f"  {counted(result.rows_in, 'row')}, {len(tally.refused):,} refused{share}"
    for reason, refused in _by_reason(tally.refused):
        yield f"  {reason}: {len(refused):,}"
        for refusal in refused[:EXAMPLES]:
            id_note = "" if refusal.id is None else f" ({refusal.id})"
            yield f"    {f'{refusal.source}, ' if refusal.source else ''}row {refusal.row}{id_note}: {refusal.detail}"
    for rule in result.rules:
        where = f"{rule.source}, " if settings.data.source == "mixture" else ""
        change = f": {rule.did}" if rule.did else ""
        yield f"  rule {rule.name}: {counted(rule.rows, 'row')}, such as {where}row {rule.row}{change}"
    yield "splits: " + "; ".join(
        f"{split} {counted(tally.images[split], 'image')}, {counted(tally.samples[split], 'sample')}" for split in SPLITS
    )
    if together := tally.together.total():
        yield f"  {together:,} of these images {'is' if together == 1 else 'are'} several shown together, which count as one"
    per_image = settings.irs.instructions_per_image
    image_counts = " and ".join(f"{tally.images_with_questions(split, per_image):,} of {split}" for split in ("train", "val"))
    yield f"  with {per_image} different questions (irs.instructions_per_image), of which IRS needs 2 images: {image_counts}"
    if missing:
        yield f"not tried with {', '.join(missing)}: not obtained yet; `dvc repro obtain_models` does"
    if not folders:
        return
    usable, samples = tally.usable.total(), tally.samples.total()
    yield f"tried with {', '.join(folders)}: {usable:,} of {samples:,} samples usable"
    for reason, issues in _by_reason(tally.issues):
        yield f"  {reason}: {len(issues):,}{'' if reason in (CUT, RESIZED) else ', left out'}"
        for issue in issues[:EXAMPLES]:
            yield f"    {issue.split} {issue.id}: {issue.detail}"
    if tally.tokens:
        yield f"  longest sample {max(tally.tokens):,} tokens of models.max_length {settings.models.max_length:,}"
    limit, split = settings.evaluate.max_new_tokens, settings.evaluate.split
    answers = tally.first_answers(split)
    if longer := sum(count for length, count in answers.items() if length > limit):
        summary = f"{longer:,} first answers of {split} are longer than evaluate.max_new_tokens {limit}"
        yield f"  {summary}, the longest {max(answers)}: raise it"


def accept(result: CheckResult, settings: Settings) -> None:
    """Raises DataError if `prepare`, `check_rows` or `search_layer` would fail on these data."""
    accept_rows(result, settings)
    tally = result.tally
    usable = tally.usable if tally.usable or tally.left_out else tally.samples
    if empty := [split for split in SPLITS if not usable[split]]:
        raise DataError(
            f"no usable sample fell into {' and '.join(empty)} ({CONNECTED}): give more images, or raise the shares in"
            " params/data.yaml"
        )
    check_intervals(result, settings)
    eligible = tally.images_with_questions("train", settings.irs.instructions_per_image)
    if settings.needs_layer and eligible < 2:
        raise TooFewInstructions(eligible, tally.images["train"], settings.irs)
    if settings.irs.rule == "pointing" and eligible >= 2 and not result.boxes and settings.distill.stage != "align":
        raise NoRegions


def accept_rows(result: CheckResult, settings: Settings) -> None:
    """Raises DataError if more rows are bad, or more samples left out, than `limits.max_bad_ratio` allows."""
    tally, max_bad_ratio = result.tally, settings.data.limits.max_bad_ratio
    problems = []
    if len(tally.refused) > max_bad_ratio * result.rows_in:
        problems.append(bad_rows(tally.refused, result.rows_in))
    if len(tally.left_out) > max_bad_ratio * tally.samples.total():
        example = tally.left_out[0]
        reason = f"such as {example.id}: {example.detail}"
        problems.append(f"{len(tally.left_out):,} of {tally.samples.total():,} samples cannot be trained on ({reason})")
    if problems:
        raise DataError(
            f"{' and '.join(problems)}, more than limits.max_bad_ratio = {max_bad_ratio} of params/data.yaml allows"
        )


def check_intervals(result: CheckResult, settings: Settings) -> None:
    """Raises DataError if the evaluated split has one image: `compare` resamples images, after everything is trained."""
    split = settings.evaluate.split
    if result.tally.images[split] < 2:
        raise DataError(
            f"{split} has one image, and intervals need two (rows that share an image are in one split): give more images, or"
            " raise the shares in params/data.yaml"
        )


T = TypeVar("T", Refused, Issue)


def _by_reason(records: Iterable[T]) -> list[tuple[str, list[T]]]:
    """Groups by reason, the largest first."""
    groups: dict[str, list[T]] = {}
    for record in records:
        groups.setdefault(record.reason, []).append(record)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
