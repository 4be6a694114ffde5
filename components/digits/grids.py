"""`source: digits`: coloured UCI handwriting on a grid of cells, over clouds and noise.

Each image has its own random stream, seeded by (seed, split, number). Its scene is independent of other
images; its questions, and with them the draws for its pixels, depend on the split's earlier questions (`Balance`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from components.config.data import Augmentation, DataSettings, DigitsGrid
from components.dataset.shards import Box, ImageRow, Turn
from components.dataset.source import Provenance, Source, Stored
from components.digits import raw
from components.digits.questions import (
    CAPTIONS,
    DIGITS,
    Balance,
    Digit,
    Question,
    Scene,
    captions,
    cell_names,
    choose_questions,
)
from components.errors import DataError
from components.records.paths import SPLITS, Split

TITLE = "Coloured handwritten digits on a grid, composed from the UCI set"
LICENCE = (
    'Composed from "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, '
    "CC BY 4.0, as shipped in scikit-learn (`data/ATTRIBUTION`, `data/LICENSE-DATA`). Questions and answers are made by rule, "
    "and under the same licence."
)


@dataclass(frozen=True)
class Digits(Source):
    """Data source of one part, since an image's questions depend on those of the images before it."""

    design: DigitsGrid
    seed: int
    folder: Path

    def rows(self, part: int) -> Iterator[Stored]:
        return (Stored(row, origin, (), len(row.samples)) for row, origin in _rows(self.design, self.seed, self.folder))


def source(settings: DataSettings, folder: Path) -> Digits:
    design = settings.digits
    assert design is not None  # validated by the settings
    images, questions = design.images, design.instructions_per_image
    conversations = math.ceil(questions.train / design.turns_per_row)
    return Digits(
        title=TITLE,
        licence=LICENCE,
        images=images.train + images.val + images.test,
        rows_in=images.train * (conversations + CAPTIONS) + images.val * questions.val + images.test * questions.test,
        parts=1,
        boxes=True,
        several=False,
        design=design,
        seed=settings.seed,
        folder=folder,
    )


def _rows(design: DigitsGrid, seed: int, folder: Path) -> Iterator[tuple[ImageRow, Provenance]]:
    drawings, labels = raw.read(folder)
    drawings = np.pad(drawings / np.float32(raw.DEPTH), ((0, 0), (1, 1), (1, 1)))  # empty frame: strokes at the border fade out
    indices_by_split = split_digits(labels, design, seed)
    for split in SPLITS:
        by_value = [indices_by_split[split][labels[indices_by_split[split]] == value] for value in range(10)]
        balance = Balance()
        for number in range(getattr(design.images, split)):
            rng = np.random.default_rng([seed, SPLITS.index(split), number])
            scene = compose(by_value, design, rng)
            image_id = f"{split}-{number:06d}"
            questions = choose_questions(scene, getattr(design.instructions_per_image, split), balance, rng)
            turns = design.turns_per_row if split == "train" else 1
            rows = [questions[first : first + turns] for first in range(0, len(questions), turns)]
            if split == "train":
                rows.extend([Question("caption", *caption, cells=())] for caption in captions(scene))
            samples = tuple((f"{image_id}-{i}", *_conversation(row, scene, design.grid)) for i, row in enumerate(rows))
            row = ImageRow(image_id, paint(scene, drawings, design, rng), samples)
            yield row, Provenance(image_id=image_id, split=split, raw=tuple(digit.raw for digit in scene.digits))


def split_digits(labels: np.ndarray, design: DigitsGrid, seed: int) -> dict[Split, np.ndarray]:
    """Indices of the raw digits per split: disjoint, random, stratified by digit. Raises DataError if a split lacks one."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels))  # rank of each digit among those of its value, 0..1; sorting by it interleaves the ten
    for value in range(10):
        of_value = order[labels[order] == value]
        rank[of_value] = (np.arange(len(of_value)) + rng.random()) / len(of_value)
    pool, indices_by_split, start = np.argsort(rank, kind="stable"), {}, 0
    for split in SPLITS:
        size = getattr(design.handwriting, split)
        indices_by_split[split] = np.sort(pool[start : start + size])
        start += size
        missing = sorted(set(range(10)) - set(labels[indices_by_split[split]].tolist()))
        if missing:
            raise DataError(
                f"params/data.yaml: digits.handwriting.{split}: {size} raw digits leave it no {DIGITS[missing[0]]}; give it 20"
            )
    return indices_by_split


def compose(by_value: list[np.ndarray], design: DigitsGrid, rng: np.random.Generator) -> Scene:
    """Random scene: cells, digits, colours and raw handwriting."""
    names, palette = cell_names(design.grid), tuple(sorted(design.palette))

    def randint(bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))

    def choose(values: np.ndarray) -> int:
        return int(values[rng.integers(len(values))])

    cells = sorted(rng.permutation(len(names))[: randint(design.filled)].tolist())
    values = rng.permutation(10)[: randint(design.classes)]
    colours = rng.permutation(len(palette))[: randint(design.colours)]
    digits = []
    for cell in cells:
        value, colour = choose(values), choose(colours)
        digits.append(Digit(names[cell], value, palette[colour], choose(by_value[value])))
    return Scene(names, tuple(digits))


def _conversation(questions: list[Question], scene: Scene, grid: int) -> tuple[str, tuple[Turn, ...]]:
    """Kind and turns of a row of questions about one image."""
    turns = (Turn(question, answer, boxes(cells, scene, grid)) for _, question, answer, cells in questions)
    first, *others = turns
    kind = questions[0].kind if len(questions) == 1 else "conversation"
    return kind, (replace(first, question=f"<image>\n{first.question}"), *others)


def boxes(cells: tuple[str, ...], scene: Scene, grid: int) -> tuple[Box, ...]:
    """Bounding boxes of the cells, in shares of the image."""
    corners = (divmod(scene.cells.index(cell), grid) for cell in cells)
    return tuple((column / grid, row / grid, (column + 1) / grid, (row + 1) / grid) for row, column in corners)


def paint(scene: Scene, drawings: np.ndarray, design: DigitsGrid, rng: np.random.Generator) -> bytes:
    """PNG of the scene, grid * cell_px pixels per side."""
    side, px = design.grid * design.cell_px, design.cell_px
    clouds = rng.integers(0, round(255 * design.texture) + 1, (2 * design.grid, 2 * design.grid, 3), dtype=np.uint8)
    canvas = np.asarray(Image.fromarray(clouds).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    opacities = draw(drawings[[digit.raw for digit in scene.digits]], px, design.augmentation, rng)
    for digit, opacity in zip(scene.digits, opacities, strict=True):
        row, column = divmod(scene.cells.index(digit.cell), design.grid)
        cell = canvas[row * px : (row + 1) * px, column * px : (column + 1) * px]
        cell += opacity[..., None] * (np.array(design.palette[digit.colour], dtype=np.float32) - cell)
    canvas += np.float32(255 * design.noise) * rng.standard_normal(canvas.shape, dtype=np.float32)
    file = io.BytesIO()
    Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def draw(drawings: np.ndarray, px: int, ranges: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Opacity (n, px, px) of raw digits (n, 10, 10) in 0..1, empty frame included: random shift, scale, rotation and
    brightness, bilinear sampling."""
    per_digit = (len(drawings), 1, 1)
    shift_x, shift_y = rng.uniform(-ranges.shift_px, ranges.shift_px, (2, *per_digit))
    step = raw.SIDE / px / rng.uniform(*ranges.scale, per_digit)  # raw pixels per pixel drawn
    angle = np.radians(rng.uniform(-ranges.rotation_deg, ranges.rotation_deg, per_digit))
    brightness = rng.uniform(*ranges.brightness, per_digit)
    from_centre = np.arange(px) - (px - 1) / 2
    x, y = from_centre - shift_x, from_centre[:, None] - shift_y
    last = drawings.shape[-1] - 1
    column = (last / 2 + step * (np.cos(angle) * x + np.sin(angle) * y)).clip(0, last - 1e-6)  # outside: empty frame
    row = (last / 2 + step * (np.cos(angle) * y - np.sin(angle) * x)).clip(0, last - 1e-6)
    left, top = column.astype(int), row.astype(int)
    right_share, bottom_share = column - left, row - top
    index = np.arange(len(drawings)).reshape(per_digit)
    upper = drawings[index, top, left] * (1 - right_share) + drawings[index, top, left + 1] * right_share
    lower = drawings[index, top + 1, left] * (1 - right_share) + drawings[index, top + 1, left + 1] * right_share
    return (brightness * (upper * (1 - bottom_share) + lower * bottom_share)).astype(np.float32)
