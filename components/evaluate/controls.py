"""What a score is worth without its image, and whether the test was trained on: `alignti controls`.

A question that a model answers right with a blank image in the picture's place needed no looking: language alone, or the most
frequent answer, will do. What an arm has over its own blind score is what it gets from seeing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from components.artifacts import DATASET, REPORTS, Record, Split, write_text
from components.evaluate import generate, metrics
from components.evaluate.contamination import Contamination, contamination
from components.models.load import load
from components.models.template import Template
from components.runtime import prepare_torch
from components.settings import Settings
from components.shards import Sample, Samples

GREY = (127, 127, 127)


class Blind(Record):
    """One model's exact match with the image and with a blank one, over all questions and per kind."""

    seeing: float
    blind: float
    seeing_per_kind: dict[str, float]
    blind_per_kind: dict[str, float]


class Controls(Record):
    """reports/controls.json"""

    split: Split
    questions: int
    majority: float  # exact match of the most frequent reference of each kind: what guessing well is worth
    majority_per_kind: dict[str, float]
    models: dict[str, Blind]
    contamination: Contamination


class Blank(Sequence[Sample]):
    """The same samples, each image replaced by a plain grey one of its size."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        sample = self._samples[index]
        if sample.image is None:
            return sample
        with Image.open(io.BytesIO(sample.image)) as image:
            blank = _blank(image.size)
        return Sample(sample.id, f"blank {sample.image_id}", sample.kind, blank, sample.turns)


def measure(models: Iterable[tuple[str, Path]], settings: Settings) -> Controls:
    """Every named model blind and seeing on the evaluated split, and that split against the training data."""
    asked, samples = settings.evaluate, Samples(DATASET, settings.evaluate.split)
    rows = generate.questions(samples)
    device = prepare_torch(settings.runtime, seed=0)
    template = Template(settings.models.template.system)
    found = {}
    for name, path in models:
        loaded, scores = load(path, device), []
        for title, shown in ((f"{name}: seeing", samples), (f"{name}: blind", Blank(samples))):
            said = generate.answers(loaded, shown, rows, template, settings.models.max_length, asked, title)
            scores.append(metrics.score(name, metrics.predictions((samples[row] for row in rows), said)))
        seeing, blind = scores
        found[name] = Blind(
            seeing=seeing.exact_match, blind=blind.exact_match, seeing_per_kind=seeing.per_kind, blind_per_kind=blind.per_kind
        )
    guessed = metrics.score("majority", metrics.predictions((samples[row] for row in rows), majority(samples, rows)))
    return Controls(
        split=asked.split,
        questions=len(rows),
        majority=guessed.exact_match,
        majority_per_kind=guessed.per_kind,
        models=found,
        contamination=contamination(samples, Samples(DATASET, "train"), asked.split),
    )


def majority(samples: Sequence[Sample], rows: Sequence[int]) -> list[str]:
    """For each row the most frequent reference of its kind, the first of equals in alphabetical order."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(samples[row].kind, []).append(samples[row].turns[0].answer)
    most = {kind: max(sorted(set(found)), key=found.count) for kind, found in references.items()}
    return [most[samples[row].kind] for row in rows]


def markdown(controls: Controls) -> str:
    """What each model gets from seeing, per kind, and what the split shares with the training data."""
    kinds = list(controls.majority_per_kind)
    names = list(controls.models)
    head = ["exact match, %: seeing / blind", *names, "majority"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines.append(
        ["all", *(_both(controls.models[n].seeing, controls.models[n].blind) for n in names), _percent(controls.majority)]
    )
    for kind in kinds:
        found = [_both(controls.models[n].seeing_per_kind[kind], controls.models[n].blind_per_kind[kind]) for n in names]
        lines.append([kind.replace("_", " "), *found, _percent(controls.majority_per_kind[kind])])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        "\n\n".join(
            [
                "# Controls",
                f"{controls.questions:,} {controls.split} questions, once with their images and once with a blank grey one."
                " Majority: the most frequent reference of each kind, said every time.",
                table,
                "## Is the test in the training data?",
                _contaminated(controls.contamination),
            ]
        )
        + "\n"
    )


def write(controls: Controls) -> list[Path]:
    """reports/controls.json and controls.md"""
    write_text(REPORTS / "controls.md", markdown(controls))
    return [controls.write(REPORTS / "controls.json"), REPORTS / "controls.md"]


def _contaminated(found: Contamination) -> str:
    words = (
        f"Of {found.images:,} {found.split} images {found.exact:,} equal one of {found.train_images:,} training images,"
        f" and {found.near:,} more look like one (difference hash). Such twins were asked {found.verbatim:,} of the same"
        f" questions word for word. Of all {found.questions:,} questions {found.questions_in_training:,} are asked in training"
        " about some image."
    )
    listed = [
        f"- {pair.test} and {pair.train}: {'the same pixels' if pair.exact else f'{pair.bits} bits apart'}"
        for pair in found.pairs
    ]
    return "\n".join([words, "", *listed]).strip()


@cache
def _blank(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, GREY).save(file, "PNG")
    return file.getvalue()


def _both(seeing: float, blind: float) -> str:
    return f"{_percent(seeing)} / {_percent(blind)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
