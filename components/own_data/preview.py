"""`alignti preview`: samples of every kind as the student reads them, with visual and response tokens marked.

Decoded from the token ids and masks of training. Reads about `MOST` images at most: evenly spaced ones of the prepared
training split if it is of these params, else the first ones of each part of the source.
"""

from __future__ import annotations

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
from components.config.settings import Settings
from components.dataset.prepare import source_of
from components.dataset.shards import Sample, Samples
from components.dataset.source import Stored
from components.io import write_text
from components.models.collate import Collator
from components.own_data.check import Tally
from components.records.paths import DATASET, REPORTS, Split
from components.report.pages import data_uri, templates, thumbnail
from components.rows.judge import CUT, Judge, distinct_encodings
from components.tracking import provenance

PAGE = REPORTS / "preview.html"
MOST = 2_000  # images read, about
BARS = 24  # maximum number of bins of the length histogram
THUMBNAIL_PX = 240

Role = Literal["read", "trained", "visual"]


@dataclass(frozen=True)
class Piece:
    """Run of tokens of one role."""

    role: Role
    text: str
    tokens: int


@dataclass(frozen=True)
class Shown:
    sample: Sample
    pieces: list[Piece]
    remark: str  # detail of its remark of `check_rows`; empty: none

    def tokens(self, role: Role | None = None) -> int:
        return sum(piece.tokens for piece in self.pieces if role in (None, piece.role))


@dataclass(frozen=True)
class Preview:
    origin: str
    read_by: str  # names of the models
    shown: dict[str, list[Shown]]  # by kind
    tally: Tally  # over all images read
    max_length: int
    max_new_tokens: int

    @property
    def lengths(self) -> str:
        images, samples, longest = self.tally.images.total(), self.tally.samples.total(), max(self.tally.tokens, default=0)
        beyond = [remark for remark in self.tally.remarks if remark.reason in (CUT, "too_long")]
        middle = median(self.tally.tokens.elements()) if self.tally.tokens else 0
        out = sum(not remark.kept for remark in beyond)
        longer = f"{len(beyond):,} are longer, {out:,} of them left out and the others cut" if beyond else "none is longer"
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
        width = -(-(max(self.tally.tokens) + 1) // BARS)
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
    shown: dict[str, list[Shown]] = {}
    with TemporaryDirectory(prefix="alignti-") as scratch:
        origin, images = _images(settings, Path(scratch))
        for split, samples in images:
            tally.add(split, samples, judge)
            remarks = {remark.id: remark for remark in tally.remarks[-len(samples) :]}
            for sample in samples:
                if len(of_kind := shown.setdefault(sample.kind, [])) < each:
                    remark = remarks.get(sample.id)
                    kept = sample if remark is None else sample.upto(remark.kept)
                    read = pieces(collator, kept) if kept.turns else []
                    of_kind.append(Shown(sample, read, remark.detail if remark else ""))
    alike = len(judge.collators) == 1
    by = " and ".join(folders) if alike else f"{next(iter(folders))}; another of {', '.join(folders)} reads otherwise"
    return Preview(origin, by, shown, tally, settings.models.max_length, settings.evaluate.max_new_tokens)


def pieces(collator: Collator, sample: Sample) -> list[Piece]:
    """Decoded tokens of the sample, in order, by role."""
    (row,) = collator.encode([sample])
    roles = ["visual" if seen else "trained" if said else "read" for seen, said in zip(row.visual, row.response, strict=True)]
    found, start = [], 0
    for (role, _), group in groupby(zip(roles, row.pictures, strict=True)):
        end = start + len(list(group))
        # Difference of two prefixes: decoded alone, a run loses its first space with some tokenizers.
        before, upto = (collator.tokenizer.decode(row.input_ids[:n][~row.visual[:n]]) for n in (start, end))
        found.append(Piece(role, "" if role == "visual" else upto[len(before) :], end - start))  # type: ignore[arg-type]
        start = end
    return found


# --- samples ----------------------------------------------------------------------------------------------------------------


def _images(settings: Settings, scratch: Path) -> tuple[str, Iterator[tuple[Split, list[Sample]]]]:
    """Title of the source, and (split, samples) of each image."""
    if prepared(settings.data):
        samples = Samples(DATASET, "train", check=False)
        rows = np.unique(np.linspace(0, samples.images - 1, min(MOST, samples.images)).astype(int))
        bar = tqdm(rows, desc="preview", unit="image")
        return f"{DATASET}, split train", (("train", samples.about(int(row))) for row in bar)
    source = source_of(settings.data, scratch / "index.sqlite")

    def read() -> Iterator[tuple[Split, list[Sample]]]:
        of_part = -(-MOST // source.parts)
        bar = tqdm(desc="preview", total=min(MOST, source.images), unit="image")
        for part in range(source.parts):
            for found in islice(source.rows(part), of_part):
                bar.update()
                if isinstance(found, Stored):
                    yield found.origin.split, found.row.about()

    return f"{source.title}, not prepared yet", read()


def prepared(settings: DataSettings) -> bool:
    """Whether artifacts/dataset was made with these params, by dvc.lock."""
    if not (DATASET / "manifest.json").is_file():
        return False
    made = provenance.lock_file().get("prepare", {}).get("params", {}).get("params/data.yaml")
    try:
        return made is not None and DataSettings.model_validate(made) == settings
    except ValidationError:
        return False


# --- output -----------------------------------------------------------------------------------------------------------------


def lines(found: Preview) -> Iterator[str]:
    """Terminal output; its marks are readable without colours."""
    style: dict[Role, Callable[[str], str]] = {
        "read": str,
        "trained": lambda text: typer.style(f"«{text}»", fg="green", bold=True),
        "visual": lambda text: typer.style(text, fg="cyan"),
    }
    yield f"{found.origin}; read by {found.read_by}"
    yield f"{style['trained']('trained on')}, {style['visual']('[visual tokens]')}, all else is read only"
    for kind, samples in found.shown.items():
        for shown in samples:
            visual, said = shown.tokens("visual"), shown.tokens("trained")
            yield ""
            yield typer.style(f"{printable(kind)} {printable(shown.sample.id)}", bold=True) + (
                f"  {shown.tokens():,} tokens: {visual:,} visual, {said:,} trained on"
            )
            if shown.remark:
                yield typer.style(f"{'cut or stretched' if shown.pieces else 'left out'}: {printable(shown.remark)}", fg="red")
            whole = ""
            for piece in shown.pieces:
                text = f"[{piece.tokens:,} visual]" if piece.role == "visual" else printable(piece.text)
                whole += style[piece.role](text)
            yield "    " + whole.replace("\n", "\n    ")
    yield ""
    yield found.lengths
    yield found.answers


def printable(text: str) -> str:
    """Text with control characters escaped, so that the terminal does not act on them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def write_page(found: Preview) -> Path:
    """Write reports/preview.html, self-contained; all text is escaped."""
    images = {
        shown.sample.id: [data_uri(thumbnail(image, THUMBNAIL_PX)) for image in shown.sample.images]
        for of_kind in found.shown.values()
        for shown in of_kind
    }
    page = templates(Path(__file__).parent).get_template("preview.html.j2")
    write_text(PAGE, page.render(found=found, images=images))
    return PAGE
