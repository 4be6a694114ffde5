"""The composed data set as a whole: what no split may share, what must be even, what must be the same twice."""

import hashlib
import io
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.config.data import DataSettings
from components.dataset.prepare import prepare
from components.dataset.shards import Sample, Samples
from components.digits import raw
from components.digits.grids import draw, split_digits
from components.digits.questions import CAPTIONS, DIGITS, KINDS, NUMBERS, cell_names
from components.errors import DataError
from components.models.rendered import question_of
from components.records.paths import SPLITS
from tests.dataset.conftest import REPOSITORY, Prepared


def samples_of(prepared: Prepared) -> dict[str, list[Sample]]:
    return {split: list(Samples(prepared.folder, split)) for split in SPLITS}


# --- splits -----------------------------------------------------------------------------------------------------------


def test_no_handwriting_crosses_splits(prepared: Prepared) -> None:
    used: dict[str, set[int]] = defaultdict(set)
    for origin in prepared.provenance:
        assert origin.raw
        used[origin.split].update(origin.raw)
    assert not used["train"] & used["val"]
    assert not used["train"] & used["test"]
    assert not used["val"] & used["test"]


def test_provenance_tells_the_truth(prepared: Prepared, raw_folder: Path) -> None:
    """The raw digits that provenance.jsonl names are in the picture, by their labels and by their pixels."""
    drawings, labels = raw.read(raw_folder)
    train = Samples(prepared.folder, "train")
    origins = {origin.image_id: origin for origin in prepared.provenance}
    px, grid = prepared.settings.digits.cell_px, prepared.settings.digits.grid  # type: ignore[union-attr]
    matching, other = [], []
    for row in range(60):
        captioned = next(train[i] for i in train.of_image(row) if train[i].kind == "caption")
        words = captioned.turns[0].answer.split()
        filled = [cell for cell in range(grid**2) if words[3 * cell + 1] != "empty"]
        used = origins[captioned.image_id].raw
        assert [words[3 * cell + 2] for cell in filled] == [DIGITS[labels[index]] for index in used]
        pixels = np.asarray(Image.open(io.BytesIO(captioned.image or b"")), dtype=float).max(axis=2)
        for cell, index in zip(filled, used, strict=True):
            top, left = (px * part for part in divmod(cell, grid))
            patch = pixels[top : top + px, left : left + px].ravel()
            same_value = np.flatnonzero(labels == labels[index])
            stranger = same_value[(np.flatnonzero(same_value == index)[0] + 1) % len(same_value)]
            for which, scores in ((index, matching), (stranger, other)):
                scores.append(np.corrcoef(patch, np.kron(drawings[which], np.ones((px // 8, px // 8))).ravel())[0, 1])
    assert np.mean(np.array(matching) > np.array(other)) > 0.95  # nearer to the named digit than to another of the same value


def test_splits_share_out_every_digit_in_proportion(raw_folder: Path, digits_settings: DataSettings) -> None:
    _, labels = raw.read(raw_folder)
    design = digits_settings.digits
    assert design is not None
    hands = split_digits(labels, design, seed=7)
    everything = np.concatenate([hands[split] for split in SPLITS])
    assert len(everything) == len(set(everything.tolist())) == 1797
    for split in SPLITS:
        assert len(hands[split]) == getattr(design.handwriting, split)
        counts = np.bincount(labels[hands[split]], minlength=10)
        assert counts.max() - counts.min() <= 0.1 * counts.mean()
    assert not np.array_equal(hands["test"], split_digits(labels, design, seed=8)["test"])


def test_a_split_without_one_of_the_digits_is_refused(raw_folder: Path, digits_settings: DataSettings) -> None:
    _, labels = raw.read(raw_folder)
    design = digits_settings.digits
    assert design is not None
    few = design.model_copy(update={"handwriting": design.handwriting.model_copy(update={"val": 7})})
    with pytest.raises(DataError, match=r"digits\.handwriting\.val"):
        split_digits(labels, few, seed=1)


# --- questions --------------------------------------------------------------------------------------------------------


def test_counts_are_as_asked_for_and_sample_ids_unique(prepared: Prepared) -> None:
    design = prepared.settings.digits
    assert design is not None
    everything = [sample for samples in samples_of(prepared).values() for sample in samples]
    assert len({sample.id for sample in everything}) == len(everything) == prepared.manifest.rows_out
    assert prepared.manifest.rows_in == prepared.manifest.rows_out
    for split in SPLITS:
        images, questions = getattr(design.images, split), getattr(design.instructions_per_image, split)
        assert prepared.manifest.splits[split].images == images
        rows = math.ceil(questions / design.turns_per_row) + CAPTIONS if split == "train" else questions
        assert prepared.manifest.splits[split].samples == images * rows


def test_every_image_has_different_instructions(prepared: Prepared) -> None:
    for split in SPLITS:
        samples = Samples(prepared.folder, split)
        for row in range(samples.images):
            rows = [samples[i].turns for i in samples.of_image(row) if samples[i].kind != "caption"]
            questions = [question_of(turn) for turns in rows for turn in turns]
            assert len(questions) == len(set(questions)) >= 2
            for first, *others in rows:
                assert first.question.startswith("<image>\n") and not any("<image>" in turn.question for turn in others)


def test_kinds_are_even_in_every_split_and_captions_in_train_only(prepared: Prepared) -> None:
    for split in SPLITS:
        counts = dict(prepared.manifest.splits[split].kinds)
        images = prepared.manifest.splits[split].images
        assert counts.pop("caption", 0) == (CAPTIONS * images if split == "train" else 0)
        if split == "train":
            assert set(counts) == {"conversation"}
        else:
            assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 2


def test_no_result_pays_as_a_blind_guess(prepared: Prepared) -> None:
    ends = {"How many", "digit in", "digit is", "plus", "apart", "larger"}
    endings: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples_of(prepared)["train"]:
        for turn in sample.turns:
            for end in ends:
                if end in turn.question:
                    endings[end][turn.answer.split()[-1]] += 1
    assert set(endings) == ends
    assert all(max(counts.values()) / counts.total() <= 0.5 for counts in endings.values()), endings


def test_answers_agree_with_the_caption(prepared: Prepared) -> None:
    """Every answer in the train split, worked out again from the caption alone."""
    train = Samples(prepared.folder, "train")
    for row in range(train.images):
        samples = [train[i] for i in train.of_image(row)]
        words = next(s for s in samples if s.kind == "caption").turns[0].answer.split()
        cells = {words[i]: (words[i + 1], words[i + 2]) for i in range(0, len(words), 3)}
        for sample in samples:
            for turn in sample.turns if sample.kind != "caption" else ():
                assert turn.answer == worked_out(question_of(turn), cells), (turn, cells)


def test_boxes_are_the_cells_that_a_question_asks_about(prepared: Prepared) -> None:
    """Read off the answer, which names each place that it looks at; a caption asks about the whole image."""
    design = prepared.settings.digits
    assert design is not None
    named = cell_names(design.grid)
    for sample in samples_of(prepared)["train"]:
        for turn in sample.turns:
            expected = set() if sample.kind == "caption" else set(turn.answer.split()) & set(named)
            corners = [(round(left * design.grid), round(top * design.grid)) for left, top, *_ in turn.boxes]
            assert {named[y * design.grid + x] for x, y in corners} == expected, sample
            assert all(right - left == pytest.approx(1 / design.grid) for left, _, right, _ in turn.boxes)
            assert all(bottom - top == pytest.approx(1 / design.grid) for _, top, _, bottom in turn.boxes)


def worked_out(question: str, cells: dict[str, tuple[str, str]]) -> str:
    """The answer from cell -> (colour, digit word), or ("empty", "cell")."""

    def line(name: str) -> list[str]:
        part = 1 if name in NUMBERS else 0
        mark = str(NUMBERS.index(name)) if part else name
        return [cell for cell in cells if cell[part] == mark]

    def value(cell: str) -> int:
        return DIGITS.index(cells[cell][1])

    def read(name: str) -> str:
        return " ".join(f"{cell} {'empty' if cells[cell][0] == 'empty' else cells[cell][1]}" for cell in line(name))

    def values(name: str) -> list[int]:
        return [value(cell) for cell in line(name) if cells[cell][0] != "empty"]

    match question.rstrip("?.").replace(",", "").split():
        case ["What", "digit", "is", "at", cell]:
            return f"{cell} {cells[cell][1]}"
        case ["Which", "colours", "are", "in", _, name]:
            return " ".join(f"{cell} {cells[cell][0]}" for cell in line(name))
        case ["Describe", _, name]:
            return f"{read(name)} then {' '.join(f'{cell} {cells[cell][0]}' for cell in line(name))}"
        case ["Which", "is", "larger", a, "or", b]:
            return f"{a} {cells[a][1]} and {b} {cells[b][1]} so {DIGITS[max(value(a), value(b))]}"
        case ["What", "is", a, "plus", b]:
            return f"{a} {cells[a][1]} plus {b} {cells[b][1]} is {NUMBERS[value(a) + value(b)]}"
        case ["How", "far", "apart", "are", a, "and", b]:
            return f"{a} {cells[a][1]} and {b} {cells[b][1]} so {NUMBERS[abs(value(a) - value(b))]}"
        case ["What", "is", "the", end, "digit", "in", _, name]:
            return f"{read(name)} so {DIGITS[max(values(name)) if end == 'largest' else min(values(name))]}"
        case ["How", "many", "digits", "are", "in", _, name]:
            return f"{read(name)} so {NUMBERS[len(values(name))]}"
    raise AssertionError(question)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_have_the_size_of_the_grid(prepared: Prepared) -> None:
    design = prepared.settings.digits
    assert design is not None
    sample = Samples(prepared.folder, "test")[0]
    image = Image.open(io.BytesIO(sample.image or b""))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (design.grid * design.cell_px,) * 2)


def test_an_undisturbed_digit_is_drawn_where_it_is(digits_settings: DataSettings) -> None:
    design = digits_settings.digits
    assert design is not None
    still = design.augmentation.model_copy(
        update={"shift_px": 0.0, "scale": (1.0, 1.0), "rotation_deg": 0.0, "brightness": (1.0, 1.0)}
    )
    drawing = np.pad(np.arange(64, dtype=np.float32).reshape(8, 8) / 64, 1)
    rng = np.random.default_rng(0)
    assert np.allclose(draw(drawing[None], 8, still, rng)[0], drawing[1:-1, 1:-1], atol=1e-5)  # one pixel for one pixel
    down = draw(drawing[None], 8, still.model_copy(update={"brightness": (0.5, 0.5)}), rng)[0]
    assert np.allclose(down, drawing[1:-1, 1:-1] / 2, atol=1e-5)
    varied = draw(np.repeat(drawing[None], 2, axis=0), 16, design.augmentation, rng)
    assert varied.shape == (2, 16, 16)
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert not np.allclose(varied[0], varied[1])


# --- the same twice ---------------------------------------------------------------------------------------------------


def test_the_same_bytes_in_another_process_with_another_hash_seed(prepared: Prepared, raw_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from components.dataset.prepare import prepare;"
        "from components.config.data import DataSettings;"
        "prepare(DataSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    target = tmp_path / "again"
    command = [sys.executable, "-c", code, prepared.settings.model_dump_json(), str(raw_folder), str(target)]
    hash_seed = "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8"
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": hash_seed}, check=True, capture_output=True)
    assert contents(target) == contents(prepared.folder)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_no_image_depends_on_how_many_there_are_but_all_on_the_seed(
    prepared: Prepared, raw_folder: Path, tmp_path: Path
) -> None:
    design = prepared.settings.digits
    assert design is not None
    fewer = design.model_copy(update={"images": design.images.model_copy(update={"train": 20, "val": 20, "test": 20})})
    settings = prepared.settings.model_copy(update={"digits": fewer})
    prepare(settings, raw_folder, tmp_path / "fewer")
    prepare(settings.model_copy(update={"seed": 2}), raw_folder, tmp_path / "seed")
    for split in SPLITS:
        samples = list(Samples(tmp_path / "fewer", split))
        assert samples == list(Samples(prepared.folder, split))[: len(samples)]
        assert {sample.image for sample in samples}.isdisjoint(sample.image for sample in Samples(tmp_path / "seed", split))
