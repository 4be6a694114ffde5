"""Blind baselines, `alignti controls`: scores without the image, and contamination of the test split.

A question answered right with a blank image, or with another image, needs no vision: the language prior or the most frequent
answer suffices. The blank image is the usual control, but is out of distribution and may break a model; another image of the
split is in distribution. An arm's margin over both is due to the image.

Image need: nats per reference token lost by blurring the image, the ranking of L_va_kd (align_ti/image_dependence.py).
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from components.config.settings import Settings
from components.dataset.shards import Sample, Samples
from components.errors import DataError
from components.evaluate import generate, metrics
from components.evaluate.contamination import Contamination, contamination
from components.evaluate.kits.vlmeval_worker import blank
from components.evaluate.likelihood import likelihoods, nats_per_token
from components.io import write_text
from components.models.load import Loaded, load
from components.models.template import Template
from components.process import shared_out
from components.records.evaluate import Likelihood
from components.records.paths import DATASET, REPORTS, ROWS, Split
from components.records.record import Record
from components.report.markdown import percent, table
from components.report.pages import templates
from components.runtime import models_at_once, prepare_torch

NEED = (
    "Image need: how many nats the model's log-probability of a reference token loses when the image is shrunk to a tenth and"
    " enlarged again. About nothing: the words before, or a glance, say as much."
)


class Blind(Record):
    """Exact match of one model with each question's image, with a blank one, and with another question's image."""

    seeing: float
    blank: float
    other: float
    seeing_per_kind: dict[str, float]
    blank_per_kind: dict[str, float]
    other_per_kind: dict[str, float]
    need_per_kind: dict[str, float]  # nats per reference token lost with a blurred image


class Controls(Record):
    """reports/controls.json"""

    split: Split
    questions: int
    majority: float  # exact match of the most frequent reference of each kind
    majority_per_kind: dict[str, float]
    models: dict[str, Blind]
    contamination: Contamination


class ReplacedImages(Sequence[Sample]):
    """View of samples with replaced images: `change` maps index and sample to the new sample; text-only ones stay."""

    def __init__(self, samples: Samples, change: Callable[[int, Sample], Sample]) -> None:
        self._samples, self._change = samples, change

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        sample = self._samples[index]
        return sample if sample.image is None else self._change(index, sample)


def edited_images(samples: Samples, edit: Callable[[bytes], bytes]) -> ReplacedImages:
    """Samples with `edit` (`blank`, `blurred`) applied to each image."""

    def change(_: int, sample: Sample) -> Sample:
        first, *more = map(edit, sample.images)
        return replace(sample, image_id=f"{edit.__name__} {sample.image_id}", image=first, more=tuple(more))

    return ReplacedImages(samples, change)


def blurred(image: bytes) -> bytes:
    """Image downsampled to a tenth of each side and upsampled again, as PNG."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(image)) as original:
        small = original.convert("RGB").resize([max(1, side // 10) for side in original.size], Image.Resampling.BILINEAR)
        small.resize(original.size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def other_images(samples: Samples) -> ReplacedImages:
    """Samples with as many images from half a split further on. Raises DataError if the split has too few images."""
    if samples.images < 2:
        raise DataError("another image to ask about needs a split of two or more")

    def other(index: int, sample: Sample) -> Sample:
        own_row, images = int(samples.row_of[index]), samples.images
        rows = ((own_row + images // 2 + step) % images for step in range(images))
        donors = (samples[row_samples[0]] for row in rows if row != own_row and (row_samples := samples.of_image(row)))
        replacements = list(islice(((donor.image_id, image) for donor in donors for image in donor.images), len(sample.images)))
        if len(replacements) < len(sample.images):
            raise DataError(f"{sample.id} shows {len(sample.images)} images, and there are not as many others in its split")
        (name, first), *more = replacements
        return replace(sample, image_id=name, image=first, more=tuple(image for _, image in more))

    return ReplacedImages(samples, other)


def measure(models: Sequence[tuple[str, Path]], settings: Settings) -> Controls:
    """Blind baselines of each model on the evaluated split, and contamination of that split by the training data."""
    evaluate_settings, samples = settings.evaluate, Samples(DATASET, settings.evaluate.split, ROWS)
    rows = generate.questions(samples)
    device = prepare_torch(settings.runtime, seed=0)
    at_once = models_at_once(settings.runtime, device) if settings.models.family == "embedded" else 1  # others may be large
    results = dict(shared_out(measure_model, [(name, path, settings) for name, path in models], at_once))
    majority_scores = metrics.score("majority", metrics.predictions((samples[row] for row in rows), majority(samples, rows)))
    return Controls(
        split=evaluate_settings.split,
        questions=len(rows),
        majority=majority_scores.exact_match,
        majority_per_kind=majority_scores.per_kind,
        models={name: results[name] for name, _ in models},
        contamination=contamination(samples, Samples(DATASET, "train"), evaluate_settings.split),
    )


def measure_model(name: str, path: Path, settings: Settings) -> tuple[str, Blind]:
    """Blind baselines of the model in folder `path`, beside its name."""
    evaluate_settings, samples = settings.evaluate, Samples(DATASET, settings.evaluate.split, ROWS)
    rows, template = generate.questions(samples), Template.from_settings(settings.models.template)
    loaded, scores = load(path, prepare_torch(settings.runtime, seed=0)), dict[str, Any]()
    for condition, view in {"seeing": samples, "blank": edited_images(samples, blank), "other": other_images(samples)}.items():
        answers = generate.answers(
            loaded, view, rows, template, settings.models.max_length, evaluate_settings, f"{name}: {condition}"
        )
        score = metrics.score(name, metrics.predictions((samples[row] for row in rows), answers))
        scores |= {condition: score.exact_match, f"{condition}_per_kind": score.per_kind}
    return name, Blind(**scores, need_per_kind=_image_need(loaded, samples, rows, template, evaluate_settings.batch_size, name))


def _image_need(
    loaded: Loaded, samples: Samples, rows: Sequence[int], template: Template, batch_size: int, name: str
) -> dict[str, float]:
    with_image, with_blur = (
        likelihoods(loaded, view, rows, template, batch_size, f"{name}: nats, {condition}")
        for condition, view in (("seeing", samples), ("blurred", edited_images(samples, blurred)))
    )
    kinds = [samples[row].kind for row in rows]

    def nats(references: list[Likelihood], kind: str) -> float:
        return nats_per_token(
            reference for reference, reference_kind in zip(references, kinds, strict=True) if reference_kind == kind
        )

    return {kind: nats(with_blur, kind) - nats(with_image, kind) for kind in sorted(set(kinds))}


def majority(samples: Sequence[Sample], rows: Sequence[int]) -> list[str]:
    """Most frequent reference of each row's kind, as exact match reads it; ties by alphabetical order."""
    labelled = [(sample.kind, metrics.normalise(sample.turns[0].answer)) for sample in (samples[row] for row in rows)]
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, reference in labelled:
        by_kind[kind][reference] += 1
    most_frequent = {kind: max(sorted(counts), key=counts.__getitem__) for kind, counts in by_kind.items()}
    return [most_frequent[kind] for kind, _ in labelled]


def score_table(controls: Controls) -> tuple[list[str], list[list[str]]]:
    """Table (header, rows) of exact match with and without images, over all and per kind."""
    models = controls.models.values()
    lines = [["all questions", *(_percentages(m.seeing, m.blank, m.other) for m in models), percent(controls.majority)]]
    for kind, majority_share in controls.majority_per_kind.items():
        model_cells = (_percentages(m.seeing_per_kind[kind], m.blank_per_kind[kind], m.other_per_kind[kind]) for m in models)
        lines.append([kind.replace("_", " "), *model_cells, percent(majority_share)])
    return ["exact match, %: its image / blank / another", *controls.models, "majority"], lines


def need_table(controls: Controls) -> tuple[list[str], list[list[str]]]:
    """Table (header, rows) of image need per kind and model."""
    models = controls.models.values()
    lines = [[kind.replace("_", " "), *(f"{m.need_per_kind[kind]:.3f}" for m in models)] for kind in controls.majority_per_kind]
    return ["image need, nats per token", *controls.models], lines


def introduction(controls: Controls) -> str:
    return (
        f"{controls.questions:,} {controls.split} questions, with their images, with a blank grey one, and with those of other"
        " questions. Majority: the most frequent reference of each kind, said every time."
    )


def markdown(controls: Controls) -> str:
    """Scores with and without images, and contamination, as Markdown."""
    twins = "\n".join(
        [contamination_summary(controls.contamination), "", *(f"- {pair}" for pair in twin_pairs(controls))]
    ).strip()
    parts = ["# Controls", introduction(controls), table(*score_table(controls)), NEED, table(*need_table(controls))]
    parts += ["## Is the test in the training data?", twins]
    return "\n\n".join(parts) + "\n"


def page(controls: Controls) -> str:
    """`markdown` as one self-contained HTML file."""
    template = templates(Path(__file__).parent).get_template("controls.html.j2")
    context = {
        "introduction": introduction(controls),
        "twins": contamination_summary(controls.contamination),
        "pairs": twin_pairs(controls),
    }
    return template.render(scores=score_table(controls), needs=need_table(controls), need=NEED, **context)


def write(controls: Controls) -> list[Path]:
    """Write reports/controls.{json,md,html}; returns their paths."""
    write_text(REPORTS / "controls.md", markdown(controls))
    write_text(REPORTS / "controls.html", page(controls))
    return [controls.write(REPORTS / "controls.json"), REPORTS / "controls.md", REPORTS / "controls.html"]


def contamination_summary(overlap: Contamination) -> str:
    return (
        f"Of {overlap.images:,} {overlap.split} images {overlap.exact:,} equal one of {overlap.train_images:,} training images,"
        f" and {overlap.near:,} more look like one (difference hash). Such twins were asked {overlap.verbatim:,} of the same"
        f" questions word for word. Of all {overlap.questions:,} questions {overlap.questions_in_training:,} are asked in"
        " training about some image."
    )


def twin_pairs(controls: Controls) -> list[str]:
    return [
        f"{pair.test} and {pair.train}: {'the same pixels' if pair.exact else f'{pair.bits} bits apart'}"
        for pair in controls.contamination.pairs
    ]


def _percentages(*shares: float) -> str:
    return " / ".join(map(percent, shares))
