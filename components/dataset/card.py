"""Data card and contact sheet."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from components.dataset.shards import Sample, Samples
from components.dataset.source import Source
from components.io import write_text
from components.records.dataset import Manifest
from components.records.paths import SPLITS

SHOWN, COLUMNS, QUESTIONS = 12, 4, 3
SIDE_BY_SIDE = 4  # at most, of images shown together
WIDTH, PICTURE, LINE, MARGIN = 340, 256, 22, 16  # pixels: tile width, image side, line height, margin
INK, GREY, ACCENT, PAPER = "#1b1f24", "#6b7280", "#0b5cad", "#ffffff"


def write_card(folder: Path, source: Source, manifest: Manifest) -> None:
    """Write `card.md` and `contact_sheet.png` into the finished data set `folder`."""
    examples = [example for split in SPLITS for example in _examples(Samples(folder, split, check=False), SHOWN // len(SPLITS))]
    contact_sheet(examples).save(folder / "contact_sheet.png")
    write_text(folder / "card.md", card(source, manifest, examples))


def _examples(samples: Samples, amount: int) -> list[list[Sample]]:
    """Evenly spaced images of a split, each with some of its samples, captions last."""
    rows = np.unique(np.linspace(0, samples.images - 1, amount).round().astype(int))
    return [sorted(samples.about(int(row)), key=lambda s: s.kind == "caption")[:QUESTIONS] for row in rows]


# --- contact sheet ----------------------------------------------------------------------------------------------------


def contact_sheet(examples: list[list[Sample]]) -> Image.Image:
    """Example images with questions and, in colour, answers."""
    tiles = [_tile(samples) for samples in examples]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (COLUMNS * (WIDTH + MARGIN) + MARGIN, sum(heights) + (len(rows) + 1) * MARGIN), PAPER)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (MARGIN + column * (WIDTH + MARGIN), top))
        top += height + MARGIN
    return sheet


def _tile(samples: list[Sample]) -> Image.Image:
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    lines = [(small, samples[0].image_id[-40:], GREY)]
    for sample in samples:
        lines += [(font, line, INK) for line in _wrapped(sample.turns[0].question.replace("<image>", ""))]
        lines += [(font, line, ACCENT) for line in _wrapped(sample.turns[0].answer)]
    tile = Image.new("RGB", (WIDTH, PICTURE + 8 + LINE * len(lines)), PAPER)
    images = samples[0].images or (None,)
    for place, image in enumerate(images[:SIDE_BY_SIDE]):
        side = PICTURE if len(images) == 1 else WIDTH // min(len(images), SIDE_BY_SIDE)
        tile.paste(_picture(image, side), (place * side, 0))
    pen = ImageDraw.Draw(tile)
    for number, (size, text, ink) in enumerate(lines):
        pen.text((0, PICTURE + 8 + LINE * number), text, ink, size)
    return tile


def _wrapped(text: str) -> list[str]:
    """Text in at most three lines of tile width."""
    return textwrap.wrap(" ".join(text.split()), 40, max_lines=3, placeholder=" ...") or [" "]


def _picture(image: bytes | None, side: int) -> Image.Image:
    if image is None:
        blank = Image.new("RGB", (PICTURE, PICTURE), "#f3f4f6")
        ImageDraw.Draw(blank).text((PICTURE // 2, PICTURE // 2), "text only", GREY, ImageFont.load_default(16), anchor="mm")
        return blank
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    ratio = side / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    return picture.resize(size, Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.LANCZOS)


# --- card -------------------------------------------------------------------------------------------------------------


def card(source: Source, manifest: Manifest, examples: list[list[Sample]]) -> str:
    """Data card in Markdown."""
    splits = manifest.splits.values()
    kinds = sorted({kind for split in splits for kind in split.kinds})
    counts = [("**images**", [split.images for split in splits]), ("**samples**", [split.samples for split in splits])]
    counts += [(kind, [split.kinds.get(kind, 0) for split in splits]) for kind in kinds]
    table = [f"| | {' | '.join(manifest.splits)} |", f"|---|{'---:|' * len(splits)}"]
    table += [f"| {title} | {' | '.join(f'{count:,}' for count in row)} |" for title, row in counts]
    shown = []
    for samples in examples[:3]:
        shown.append(f"### {samples[0].image_id}\n")
        shown += [f"- *{turn.question.replace('<image>', '').strip()}* {turn.answer}" for s in samples for turn in s.turns]
        shown.append("")
    return "\n".join(
        [
            f"# {source.title}\n",
            "Written by the stage `prepare`; `params/data.yaml` holds everything that it was made from.\n",
            f"- Rows in: {manifest.rows_in:,}. Stored: {manifest.rows_out:,}.",
            f"- Quarantined: {manifest.quarantined:,} (`quarantine.jsonl` says which and why).",
            f"- Hash over all shards (sha256): `{manifest.digest}`",
            "- Files: `train/`, `val/`, `test/` hold Arrow shards, one row per image with its LLaVA-style conversations;",
            "  `manifest.json` counts and hashes; `provenance.jsonl` what each image was made of.\n",
            f"## Licence\n\n{source.licence}\n",
            "## Counts\n",
            *table,
            *_changed(source),
            "\n## Examples\n",
            "![examples](contact_sheet.png)\n",
            *shown,
        ]
    )


def _changed(source: Source) -> list[str]:
    """Table of the rules that changed rows, and of ignored keys."""
    rules = source.rules()
    if not rules:
        return []
    lines = ["\n## Rows that were changed\n", "By the rules of docs/data.md; an ignored key is one that no rule reads.\n"]
    lines += ["| source | rule | rows | an example |", "|---|---|---:|---|"]
    for rule in rules:
        did = " ".join(rule.did.replace("|", "\\|").split())
        lines.append(f"| {rule.source} | {rule.name} | {rule.rows:,} | row {rule.row:,}{f': {did}' if did else ''} |")
    return lines
