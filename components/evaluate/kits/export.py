"""A split as VLMEvalKit's TSV files: multiple choice, yes/no, and open questions.

Made where the kit is run and not by `prepare`: a TSV is a base64 copy of every image, and follows `evaluate.split`.
"""

from __future__ import annotations

import base64
import csv
import string
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from components.evaluate.metrics import normalise
from components.models.template import question_of
from components.shards import Sample

Form = Literal["mcq", "yes_no", "vqa"]
LETTERS = string.ascii_uppercase


class KitSet(NamedTuple):
    """One TSV: its name says to the kit how to score it (POPE's figures for yes/no)."""

    form: Form
    rows: list[int]  # indices of the split's samples, which are also the kit's

    @property
    def name(self) -> str:
        return {"mcq": "AlignTI_MCQ", "yes_no": "AlignTI_YesNo_POPE", "vqa": "AlignTI_VQA"}[self.form]


def sets(samples: Sequence[Sample], rows: Sequence[int]) -> tuple[list[KitSet], list[int]]:
    """The sets that there are questions for, and the rows without an image, which an image kit does not ask.

    A kind is yes/no if all its references are; multiple choice if its references are 2 to 26 texts of one line, none of which
    is in another (the kit takes for chosen the only option that an answer contains, to the letter); open otherwise.
    """
    kinds: dict[str, list[int]] = defaultdict(list)
    textual = []
    for row in rows:
        sample = samples[row]
        if sample.image is None:
            textual.append(row)
        else:
            kinds[sample.kind].append(row)
    found: dict[Form, list[int]] = defaultdict(list)
    for of_kind in kinds.values():
        found[_form([samples[row] for row in of_kind])] += of_kind
    return [KitSet(form, sorted(found[form])) for form in ("mcq", "yes_no", "vqa") if found[form]], textual


def options(samples: Sequence[Sample]) -> list[str]:
    """The different references, normalised, sorted."""
    return sorted({normalise(sample.turns[0].answer) for sample in samples})


def _form(samples: Sequence[Sample]) -> Form:
    references = options(samples)
    if set(references) <= {"yes", "no"}:
        return "yes_no"
    if not 2 <= len(references) <= len(LETTERS) or any(len(s.turns[0].answer.split("\n")) > 1 for s in samples):
        return "vqa"
    return "vqa" if any(a in b for a in references for b in references if a != b) else "mcq"


def write(kit_set: KitSet, samples: Sequence[Sample], folder: Path) -> Path:
    """folder/NAME.tsv. `category` is the kind; questions are as the model was trained on them, without the options."""
    chosen = [samples[row] for row in kit_set.rows]
    by_kind: dict[str, list[str]] = {}
    if kit_set.form == "mcq":
        for kind in {sample.kind for sample in chosen}:
            by_kind[kind] = options([sample for sample in chosen if sample.kind == kind])
    letters = LETTERS[: max((len(found) for found in by_kind.values()), default=0)]
    path = folder / f"{kit_set.name}.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["index", "image", "question", *letters, "answer", "category"])
        for row, sample in zip(kit_set.rows, chosen, strict=True):
            assert sample.image is not None
            reference = normalise(sample.turns[0].answer)
            among = by_kind.get(sample.kind, [])
            offered = among + [""] * (len(letters) - len(among))
            answer = {
                "mcq": LETTERS[among.index(reference)] if among else "",
                "yes_no": reference.capitalize(),
                "vqa": sample.turns[0].answer,
            }[kit_set.form]
            image = base64.b64encode(sample.image).decode()
            table.writerow([row, image, question_of(sample.turns[0]), *offered, answer, sample.kind])
    return path
