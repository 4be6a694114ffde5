"""`alignti preview`: samples of every kind as the student reads them, with visual and response tokens marked.

Decoded from the token ids and masks of training. Reads about MAX_IMAGES at most: evenly spaced ones of the prepared
training split if it is of these params, else of the source, ADJACENT together as Parquet files are read by row group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import typer
from pydantic import ValidationError
from tqdm import tqdm

from components.config.data import DataSettings
from components.config.models import Template as TemplateSettings
from components.config.settings import Settings
from components.dataset.prepare import source_of
from components.dataset.shards import Sample, Samples
from components.dataset.source import Stored
from components.errors import ModelError
from components.io import write_text
from components.models.collate import Collator
from components.models.template import Template
from components.own_data.check import Tally
from components.records.paths import DATASET, REPORTS, Split
from components.report.pages import data_uri, templates, thumbnail
from components.report.terminal import printable
from components.rows.judge import CUT, Judge, distinct_encodings
from components.tracking import provenance

PAGE = REPORTS / "preview.html"
MAX_IMAGES = 2_000  # about
ADJACENT = 20  # images
MAX_BINS = 24  # of the length histogram
THUMBNAIL_PX = 240

Role = Literal["read", "trained", "visual"]


@dataclass(frozen=True)
class Piece:
    """Run of tokens of one role."""

    role: Role
    text: str
    tokens: int


@dataclass(frozen=True)
class SamplePreview:
    sample: Sample
    pieces: list[Piece]
    issue: str  # detail of its issue in `check_rows`; empty: none

    def tokens(self, role: Role | None = None) -> int:
        return sum(piece.tokens for piece in self.pieces if role in (None, piece.role))


@dataclass(frozen=True)
class Preview:
    origin: str
    read_by: str  # names of the models
    samples: dict[str, list[SamplePreview]]  # kind -> samples; of a mixture `source: kind`
    tally: Tally  # over all images read
    max_length: int
    max_new_tokens: int
    unused_template: str  # the checkpoint's own chat template, if it reads a sample otherwise; else empty

    @property
    def lengths(self) -> str:
        images, samples, longest = self.tally.images.total(), self.tally.samples.total(), max(self.tally.tokens, default=0)
        issues = [issue for issue in self.tally.issues if issue.reason in (CUT, "too_long")]
        middle = median(self.tally.tokens.elements()) if self.tally.tokens else 0
        left_out = sum(not issue.kept for issue in issues)
        longer = f"{len(issues):,} are longer, {left_out:,} of them left out and the others cut" if issues else "none is longer"
        return (
            f"{samples:,} samples of {images:,} images: {middle:,.0f} tokens in the middle, {longest:,} at most, of max_length"
            f" {self.max_length:,}; {longer}"
        )

    @property
    def answers(self) -> str:
        answers = self.tally.first_answers()
        longer = sum(count for length, count in answers.items() if length > self.max_new_tokens)
        return (
            f"First answers have {max(answers, default=0):,} tokens at most, of evaluate.max_new_tokens"
            f" {self.max_new_tokens:,}; {f'{longer:,} are' if longer else 'none is'} longer"
        )

    @property
    def bars(self) -> list[tuple[str, int, float]]:
        """Histogram of token counts: `from-to`, samples, height relative to the highest bar."""
        if not self.tally.tokens:
            return []
        width = -(-(max(self.tally.tokens) + 1) // MAX_BINS)
        counts = [0] * (max(self.tally.tokens) // width + 1)
        for length, count in self.tally.tokens.items():
            counts[length // width] += count
        return [(f"{i * width}-{(i + 1) * width - 1}", count, count / max(counts)) for i, count in enumerate(counts)]


def preview(settings: Settings, folders: dict[str, Path], each: int) -> Preview:
    """Preview of `each` samples per kind, by the first model of `folders`; lengths are maxima over all models.

    Raises DataError or ModelError if data or models cannot be read.
    """
    judge = Judge(distinct_encodings(list(folders.values())), settings.models)
    collator, tally = judge.collators[0], Tally()
    previews: dict[str, list[SamplePreview]] = {}
    with TemporaryDirectory(prefix="alignti-") as scratch:
        origin, images = _samples_by_image(settings, Path(scratch))
        for split, samples in images:
            tally.add(split, samples, judge)
            issues = {issue.id: issue for issue in tally.issues[-len(samples) :]}
            for sample in samples:
                source = f"{sample.id.partition('/')[0]}: " if settings.data.source == "mixture" else ""
                if len(kind_previews := previews.setdefault(source + sample.kind, [])) < each:
                    issue = issues.get(sample.id)
                    cut_sample = sample if issue is None else sample.upto(issue.kept)
                    pieces = decode_pieces(collator, cut_sample) if cut_sample.turns else []
                    kind_previews.append(SamplePreview(sample, pieces, issue.detail if issue else ""))
    same_encoding = len(judge.collators) == 1
    read_by = (
        " and ".join(folders) if same_encoding else f"{next(iter(folders))}; another of {', '.join(folders)} reads otherwise"
    )
    shown = next((entry.sample for kind in previews.values() for entry in kind if entry.pieces), None)
    unused = _unused_template(collator, shown, settings.models.template) if shown else ""
    return Preview(origin, read_by, previews, tally, settings.models.max_length, settings.evaluate.max_new_tokens, unused)


def _unused_template(collator: Collator, sample: Sample, settings: TemplateSettings) -> str:
    """Sentence on the checkpoint's own chat template if it is not in use and reads `sample` otherwise; else empty."""
    processor = collator.processor
    if settings.style == "processor" or not (processor.chat_template or processor.tokenizer.chat_template):
        return ""
    try:
        own = Collator(processor, Template(settings.system, style="processor"), sys.maxsize, train=True)
        (its_own,), (used,) = own.encode([sample]), collator.encode([sample])
    except ModelError:  # a template that cannot be used
        return ""
    if np.array_equal(its_own.input_ids, used.input_ids):
        return ""
    return f"The checkpoint's own chat template reads otherwise; models.template.style is {settings.style}, not processor."


def decode_pieces(collator: Collator, sample: Sample) -> list[Piece]:
    """Decoded tokens of the sample, in order, by role."""
    (row,) = collator.encode([sample])
    roles = ["visual" if v else "trained" if r else "read" for v, r in zip(row.visual, row.response, strict=True)]
    pieces, start = [], 0
    for (role, _), group in groupby(zip(roles, row.pictures, strict=True)):
        end = start + len(list(group))
        # Difference of two prefixes: decoded alone, a run loses its first space with some tokenizers.
        prefix, extended = (collator.tokenizer.decode(row.input_ids[:n][~row.visual[:n]]) for n in (start, end))
        pieces.append(Piece(role, "" if role == "visual" else extended[len(prefix) :], end - start))  # type: ignore[arg-type]
        start = end
    return pieces


# --- samples ----------------------------------------------------------------------------------------------------------------


def _samples_by_image(settings: Settings, scratch: Path) -> tuple[str, Iterator[tuple[Split, list[Sample]]]]:
    """Title of the source, and (split, samples) of each image."""
    if is_prepared(settings.data):
        samples = Samples(DATASET, "train", check=False)
        rows = np.unique(np.linspace(0, samples.images - 1, min(MAX_IMAGES, samples.images)).astype(int))
        bar = tqdm(rows, desc="preview", unit="image")
        return f"{DATASET}, split train", (("train", samples.about(int(row))) for row in bar)
    source = source_of(settings.data.model_copy(update={"images_per_shard": ADJACENT}), scratch / "index.sqlite")

    def unprepared() -> Iterator[tuple[Split, list[Sample]]]:
        parts = np.unique(np.linspace(0, source.parts - 1, min(MAX_IMAGES // ADJACENT, source.parts)).astype(int))
        bar = tqdm(desc="preview", total=min(MAX_IMAGES, source.images), unit="image")
        for part in parts:
            for outcome in islice(source.rows(int(part)), MAX_IMAGES):
                bar.update()
                if isinstance(outcome, Stored):
                    yield outcome.origin.split, outcome.row.about()

    return f"{source.title}, not prepared yet", unprepared()


def is_prepared(settings: DataSettings) -> bool:
    """Whether artifacts/dataset was made with these params, by dvc.lock."""
    if not (DATASET / "manifest.json").is_file():
        return False
    locked_params = provenance.lock_file().get("prepare", {}).get("params", {}).get("params/data.yaml")
    try:
        return locked_params is not None and DataSettings.model_validate(locked_params) == settings
    except ValidationError:
        return False


# --- output -----------------------------------------------------------------------------------------------------------------


def lines(preview: Preview) -> Iterator[str]:
    """Terminal output; its marks are readable without colours."""
    style: dict[Role, Callable[[str], str]] = {
        "read": str,
        "trained": lambda text: typer.style(f"«{text}»", fg="green", bold=True),
        "visual": lambda text: typer.style(text, fg="cyan"),
    }
    yield f"{preview.origin}; read by {preview.read_by}"
    yield f"{style['trained']('trained on')}, {style['visual']('[visual tokens]')}, all else is read only"
    if preview.unused_template:
        yield typer.style(preview.unused_template, fg="yellow")
    for kind, samples in preview.samples.items():
        for entry in samples:
            visual, trained = entry.tokens("visual"), entry.tokens("trained")
            yield ""
            yield typer.style(f"{printable(kind)} {printable(entry.sample.id)}", bold=True) + (
                f"  {entry.tokens():,} tokens: {visual:,} visual, {trained:,} trained on"
            )
            if entry.issue:
                yield typer.style(f"{'cut or stretched' if entry.pieces else 'left out'}: {printable(entry.issue)}", fg="red")
            body = ""
            for piece in entry.pieces:
                text = f"[{piece.tokens:,} visual]" if piece.role == "visual" else printable(piece.text)
                body += style[piece.role](text)
            yield "    " + body.replace("\n", "\n    ")
    yield ""
    yield preview.lengths
    yield preview.answers


def write_page(preview: Preview) -> Path:
    """Write reports/preview.html, self-contained; all text is escaped."""
    images = {
        entry.sample.id: [data_uri(thumbnail(image, THUMBNAIL_PX)) for image in entry.sample.images]
        for samples in preview.samples.values()
        for entry in samples
    }
    page = templates(Path(__file__).parent).get_template("preview.html.j2")
    write_text(PAGE, page.render(preview=preview, images=images))
    return PAGE
