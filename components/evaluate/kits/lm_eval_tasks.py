"""Documents of the tasks in params/lm_eval/, from the prepared split."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.load import load_settings
from components.dataset.shards import Sample, Samples, Turn
from components.evaluate.generate import questions as scored_rows
from components.evaluate.metrics import normalise
from components.models.image_processor import decode_images
from components.models.load import load_processor
from components.models.rendered import pieces, question_of
from components.models.template import IMAGE, Template
from components.records.paths import DATASET, ROWS

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

WRONG_CHOICES = 3  # number of wrong choices in `manners`
SEED = 1


@cache
def split() -> Samples:
    """Evaluated split of the working directory."""
    return Samples(DATASET, load_settings().evaluate.split, ROWS)


def questions(**_: Any) -> dict[str, Dataset]:
    """Documents of the scored questions with an image; `row` is the sample's index."""
    samples = split()
    indexed = ((row, samples[row]) for row in scored_rows(samples))
    return _documents(
        {"row": row, "id": s.id, "question": _question_text(s.turns[0]), "answer": s.turns[0].answer}
        for row, s in indexed
        if s.upto(1).images
    )


def image(document: dict[str, Any]) -> list[Image.Image]:
    return decode_images(split()[document["row"]].upto(1))


def conversations(model: str, **_: Any) -> dict[str, Dataset]:
    """Documents of question and reference answer, rendered as in the training of the student in folder `model`.

    BOS and EOS are stripped: lm-eval prepends a token itself.
    """
    processor = load_processor(Path(model))
    template = Template.from_settings(load_settings().models.template).of(processor)
    bos = processor.tokenizer.bos_token or ""
    samples = split()

    def text(sample: Sample) -> str:
        first = sample.turns[0]
        rendered = template.render([Turn(question_of(first), first.answer)], [])
        return rendered.text[: rendered.response_spans[0][1]].removesuffix(template.eos).removeprefix(bos)

    return _documents({"text": text(samples[row])} for row in scored_rows(samples))


def manners(**_: Any) -> dict[str, Dataset]:
    """Documents with one answer of the question's kind among `OTHERS` that no question of that kind has."""
    samples = split()
    rows = scored_rows(samples)
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        kinds[samples[row].kind].add(normalise(samples[row].turns[0].answer))
    rng = random.Random(SEED)
    documents = []
    for row in rows:
        sample = samples[row]
        kind_answers = kinds[sample.kind]
        other_answers = sorted(set().union(*kinds.values()) - kind_answers)
        if len(other_answers) < WRONG_CHOICES:
            continue
        choices = [rng.choice(sorted(kind_answers)), *rng.sample(other_answers, WRONG_CHOICES)]
        order = rng.sample(range(WRONG_CHOICES + 1), WRONG_CHOICES + 1)
        documents.append(
            {
                "question": question_of(sample.turns[0]),
                "choices": [choices[index] for index in order],
                "right": order.index(0),
            }
        )
    return _documents(documents)


def _question_text(turn: Turn) -> str:
    """Question text with IMAGE at each image's position, as lm-eval expects."""
    return "".join(IMAGE if piece is None else piece for piece in pieces(turn.question))


def _documents(entries: Iterable[dict[str, Any]]) -> dict[str, Dataset]:
    from datasets import Dataset

    return {"test": Dataset.from_list(list(entries))}
