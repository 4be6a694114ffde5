"""Page of answers: image, question, reference, answers of teacher and arms, the teacher's attention map.

One self-contained HTML file. Samples are embedded as JSON and only the cards on screen are rendered, so a page of thousands
opens fast; the URL fragment holds the filters, so a view can be shared. The default view: questions that some arms answer
right and others wrong, the most evenly divided first.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from components.config.settings import Settings
from components.dataset.shards import Samples
from components.evaluate import generate, origin
from components.evaluate.load_results import images_of
from components.evaluate.plots import yardstick
from components.io import write_text
from components.irs.regions import placed
from components.models.attention import AttentionProbe, probing
from components.models.collate import Collator
from components.models.load import Loaded
from components.models.rendered import with_marks
from components.models.template import Template
from components.models.vlm import VLM
from components.records.compare import Comparison
from components.records.evaluate import Prediction
from components.records.paths import REPORTS, TEACHER_ARM
from components.report.pages import data_uri, templates, thumbnail

PAGE = REPORTS / "samples.html"
THUMBNAIL_PX = 240  # longest side


def write(
    comparison: Comparison,
    predictions: Mapping[str, Sequence[Prediction]],
    maps: Mapping[str, Sequence[NDArray[np.uint8] | None]],
    layer: int | None,
    most: int,
) -> Path:
    """Write reports/samples.html with the first `most` samples of the evaluated split.

    Args:
        predictions: per arm and of the teacher, the same questions in the same order (`load_results.read`).
        maps: sample id -> the teacher's attention map of each image at `layer`, None: over all (`attention_maps`).

    Raises DataError if the data set lacks an image that was asked about.
    """
    entries = predictions[TEACHER_ARM][:most]
    kinds = list(comparison.kinds)
    who = list(comparison.results)
    images = images_of(entries, comparison.split)
    content = {(p.image_id, number): image for p in entries for number, image in enumerate(images[p.id])}
    place = {image: index for index, image in enumerate(content)}
    rows = [
        {
            "id": p.id,
            "images": [place[p.image_id, number] for number in range(len(images[p.id]))],
            "kind": kinds.index(p.kind),
            "question": with_marks(p.question),
            "reference": p.reference,
            "answers": [predictions[name][index].answer for name in who],
            "right": [int(predictions[name][index].correct) for name in who],
            "attention": [grid is not None and [grid.shape[1], _base64(grid)] for grid in maps.get(p.id, ())],
        }
        for index, p in enumerate(entries)
    ]
    best, *others = comparison.order
    other = yardstick(comparison) if best != yardstick(comparison) else next(iter(others), best)
    data = {
        "who": who,
        "pairs": [] if other == best else [[best, other], [other, best]],
        "kinds": [kind.replace("_", " ") for kind in kinds],
        "images": [data_uri(thumbnail(image, THUMBNAIL_PX)) for image in content.values()],
        "rows": rows,
    }
    page = templates(Path(__file__).parent).get_template("samples.html.j2")
    context = {"samples": len(rows), "split": comparison.split, "layer": layer, "facts": origin.facts(())}
    write_text(PAGE, page.render(data=_embedded(data), **context))
    return PAGE


@torch.inference_mode()
def attention_maps(
    loaded: Loaded, samples: Samples, entries: Sequence[Prediction], layer: int | None, settings: Settings
) -> dict[str, list[NDArray[np.uint8] | None]]:
    """Sample id -> attention map of each image at `layer`, or the mean over all layers, (rows, columns) uint8 as its visual
    tokens lie, scaled to a maximum of 255; None where that is not known. Samples without an image are left out."""
    ids = {p.id for p in entries}
    rows = [row for row in generate.questions(samples) if (sample := samples[row].upto(1)).id in ids and sample.images]
    # Sequences as in the layer search: the answer follows, but causal masking hides it from the instruction rows.
    collator = Collator(loaded.processor, Template.from_settings(settings.models.template), max_length=sys.maxsize, train=True)
    view, size = VLM(loaded.model), settings.evaluate.batch_size
    maps: dict[str, list[NDArray[np.uint8] | None]] = {}
    for start in tqdm(range(0, len(rows), size), desc="samples: where the teacher looks", unit="batch"):
        these = [samples[row].upto(1) for row in rows[start : start + size]]
        batch = collator(these).to(loaded.model.device)
        probe = AttentionProbe.from_masks(batch.instruction, batch.pictures)
        with probing(loaded.model, [*range(loaded.layers)] if layer is None else [layer], probe):
            view.plain(batch, view.features(batch), keep=False)
        image = count()  # number in the batch
        attention = torch.stack([*probe.maps.values()]).mean(0)
        for sample, seen, numbers in zip(these, attention.cpu().numpy(), probe.pictures.cpu().numpy(), strict=True):
            own = (seen[numbers == number + 1] for number in range(len(sample.images)))
            maps[sample.id] = [_scaled(placed(loaded, batch, look, next(image))) for look in own]
    return maps


def _scaled(attention: NDArray[np.float32] | None) -> NDArray[np.uint8] | None:
    return None if attention is None else np.rint(255 * attention / attention.max()).astype(np.uint8)


def _base64(grid: NDArray[np.uint8]) -> str:
    return base64.b64encode(grid.tobytes()).decode("ascii")


def _embedded(data: Any) -> str:
    """JSON escaped for a script element: `<` as \\u003c."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
