"""Export of a split as VLMEvalKit's TSV files: multiple choice, yes/no, and open questions.

Options are shuffled per question, so that the right letter carries no information. A row holds its own options, hence the
meaning of its letters.

Written by the kit's run, not by `prepare`: a TSV is a base64 copy of every image, and depends on `evaluate.split`.
"""

from __future__ import annotations

import base64
import string
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from components.dataset.shards import Sample
from components.evaluate.metrics import normalise
from components.io import write_table
from components.models.rendered import with_marks
from components.models.template import IMAGE

Form = Literal["mcq", "yes_no", "vqa"]
LETTERS = string.ascii_uppercase
ROTATION_OFFSET = 10**6  # index offset: the kit treats rows equal modulo it as one question with rotated options


class KitSet(NamedTuple):
    """One TSV; its name selects the kit's scoring (POPE's figures for yes/no)."""

    form: Form
    rows: list[int]  # sample indices in the split, also the TSV's `index`

    @property
    def name(self) -> str:
        return {"mcq": "AlignTI_MCQ", "yes_no": "AlignTI_YesNo_POPE", "vqa": "AlignTI_VQA"}[self.form]


def sets(samples: Sequence[Sample], rows: Sequence[int]) -> list[KitSet]:
    """Non-empty sets of the rows with an image; an image kit cannot use the others.

    A kind is yes/no if all its references are; multiple choice if its references are 2 to 26 texts of one line, none a
    substring of another (the kit accepts the only option that an answer contains verbatim), and no question has an image inside
    its text; open otherwise.
    """
    kinds: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        sample = samples[row]
        if sample.upto(1).images:
            kinds[sample.kind].append(row)
    rows_by_form: dict[Form, list[int]] = defaultdict(list)
    for kind_rows in kinds.values():
        rows_by_form[_form([samples[row] for row in kind_rows])] += kind_rows
    return [KitSet(form, sorted(rows_by_form[form])) for form in ("mcq", "yes_no", "vqa") if rows_by_form[form]]


def options(samples: Sequence[Sample]) -> list[str]:
    """Distinct references, normalised, sorted."""
    return sorted({normalise(sample.turns[0].answer) for sample in samples})


def _form(samples: Sequence[Sample]) -> Form:
    references = options(samples)
    if set(references) <= {"yes", "no"}:
        return "yes_no"
    if not 2 <= len(references) <= len(LETTERS) or any(len(s.turns[0].answer.split("\n")) > 1 for s in samples):
        return "vqa"
    # The kit's prompts drop the position of an image inside the text.
    inline_image = any(IMAGE in with_marks(sample.turns[0].question) for sample in samples)
    return "vqa" if inline_image or any(a in b for a in references for b in references if a != b) else "mcq"


def write(kit_set: KitSet, samples: Sequence[Sample], path: Path, seed: int, rotations: bool = False) -> Path:
    """Write the TSV at `path`. `category` is the kind; questions are as in training, without the options.

    `rotations`: a row for each rotation of a question's options. Circular evaluation: a question counts as right only if it is
    answered right in every rotation (Liu et al., MMBench, ECCV 2024).
    """
    if kit_set.form == "mcq":
        rows = [
            _choice(row + shift * ROTATION_OFFSET, samples[row], [*options[shift:], *options[:shift]])
            for row, options in _shuffled_options(kit_set.rows, samples, seed).items()
            for shift in range(len(options) if rotations else 1)
        ]
    else:
        rows = [_row(row, samples[row]) | {"answer": samples[row].turns[0].answer} for row in kit_set.rows]
    if kit_set.form == "yes_no":  # `Yes` and `No`, as in the kit
        rows = [row | {"answer": normalise(str(row["answer"])).capitalize()} for row in rows]
    return write_table(path, rows, delimiter="\t")


def _shuffled_options(rows: Sequence[int], samples: Sequence[Sample], seed: int) -> dict[int, list[str]]:
    """Row -> options of its kind, shuffled by `seed` and the sample's id."""
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        kinds[samples[row].kind].append(samples[row])
    offered = {kind: options(kind_samples) for kind, kind_samples in kinds.items()}
    ordered = {}
    for row in rows:
        kind_options = offered[samples[row].kind]
        rng = np.random.default_rng(zlib.crc32(f"{seed} {samples[row].id}".encode()))
        ordered[row] = [kind_options[index] for index in rng.permutation(len(kind_options))]
    return ordered


def _choice(index: int, sample: Sample, offered: Sequence[str]) -> dict[str, object]:
    letter = LETTERS[offered.index(normalise(sample.turns[0].answer))]
    return _row(index, sample) | dict(zip(LETTERS, offered, strict=False)) | {"answer": letter}


def _row(index: int, sample: Sample) -> dict[str, object]:
    images = [base64.b64encode(image).decode() for image in sample.upto(1).images]
    image = images[0] if len(images) == 1 else repr(images)  # list format of the kit
    return {"index": index, "image": image, "question": with_marks(sample.turns[0].question), "category": sample.kind}
