"""Stage `search_layer`: the teacher's layer whose look at an image depends most on the instruction. `python -m components.irs`

Writes artifacts/irs/layer.json and, under reports/irs, curve.json, curve.png and overlay_*.png. For stage align
they say that there is no teacher.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from components.artifacts import (
    DATASET,
    IRS,
    NO_TEACHER,
    REPORTS,
    ROWS,
    TEACHER,
    LayerChoice,
    TeacherChoice,
    write_bytes,
    write_text,
)
from components.errors import exit_from
from components.settings import load_settings

if TYPE_CHECKING:
    from components.irs.search import Seen
    from components.models.load import Loaded

FOLDER = REPORTS / "irs"


def main() -> None:
    settings = load_settings()
    if settings.distill.stage == "align":
        NO_TEACHER.write(IRS / "layer.json")
        shutil.rmtree(FOLDER, ignore_errors=True)
        write_text(FOLDER / "curve.json", "[]\n")
        print(f"search_layer: nothing to do, {NO_TEACHER.none}")
        return
    teacher = TeacherChoice.read(TEACHER / "choice.json")

    from components import tracking
    from components.irs.search import choose, look
    from components.models.load import load
    from components.models.template import Template
    from components.runtime import prepare_torch
    from components.shards import Samples

    device = prepare_torch(settings.runtime, settings.irs.seed)
    with tracking.stage_run("search_layer", runtime=settings.runtime, params=settings.irs.model_dump()) as run:
        samples = Samples(DATASET, "train", ROWS)
        loaded = load(Path(teacher.path), device)
        seen = look(loaded, samples, Template.asked(settings.models.template), settings.irs)
        choice = choose(seen.attention)
        choice.write(IRS / "layer.json")
        run.dataset("train", samples.manifest.digest)
        run.tag("teacher", teacher.name)
        for point in points(choice):
            run.metrics({"irs": point["irs"], "irs_standard_error": point["standard_error"]}, step=int(point["layer"]))
        run.metrics({"layer": choice.layer, "separated": choice.separated})
        for path in [*_curve(choice), *_overlays(loaded, seen, choice.layer, settings.irs.overlays)]:
            run.artifact(path)
    print(closing_line(choice, settings.irs.images))


def points(choice: LayerChoice) -> list[dict[str, float]]:
    """The curve as data for `dvc plots`."""
    layers = enumerate(zip(choice.irs, choice.standard_error, strict=True))
    return [{"layer": layer, "irs": irs, "standard_error": error} for layer, (irs, error) in layers]


def closing_line(choice: LayerChoice, asked: int) -> str:
    best, second = choice.layer, choice.runner_up
    if best == second:
        verdict = "the teacher's only layer"
    else:
        separated = "separated from" if choice.separated else "not separated from"
        verdict = f"{separated} layer {second}, {choice.irs[second]:.3f} ± {choice.standard_error[second]:.3f}"
    fewer = f" (all that qualify of {asked} asked for)" if choice.images < asked else ""
    return (
        f"search_layer: layer {best} has the highest IRS, {choice.irs[best]:.3f} ± {choice.standard_error[best]:.3f},"
        f" {verdict};"
        f" {choice.pairs:,} pairs on {choice.images:,} images{fewer}; curve and overlays in {FOLDER}"
    )


def _curve(choice: LayerChoice) -> list[Path]:
    from components.figures import draw
    from components.irs.overlays import curve

    write_text(FOLDER / "curve.json", json.dumps(points(choice), indent=2) + "\n")
    write_bytes(FOLDER / "curve.png", draw(curve, choice))
    return [FOLDER / "curve.json", FOLDER / "curve.png"]


def _overlays(loaded: Loaded, seen: Seen, layer: int, count: int) -> list[Path]:
    """Pictures of the first `count` images drawn, each with the two instructions that look furthest apart."""
    from tqdm import tqdm

    from components.figures import draw
    from components.irs.overlays import Gaze, overlay, seen_by
    from components.irs.search import furthest_apart
    from components.models.collate import decode, visual_tokens
    from components.models.template import question_of

    for stale in FOLDER.glob("overlay_*.png"):
        stale.unlink()
    tokens = visual_tokens(loaded.processor)
    if tokens is None or math.isqrt(tokens) ** 2 != tokens:
        print("search_layer: no overlays, for the teacher's visual tokens are no square grid that all images share")
        return []
    paths = []
    for index, samples in enumerate(tqdm(seen.samples[:count], desc="overlays", unit="image")):
        attention = seen.attention[layer, index]
        gazes = [
            Gaze(question_of(samples[i].turns[0]), samples[i].turns[0].answer, attention[i].numpy())
            for i in furthest_apart(attention)
        ]
        image = seen_by(loaded.processor, decode(samples[0]))
        paths.append(FOLDER / f"overlay_{index + 1}.png")
        write_bytes(paths[-1], draw(overlay, image, gazes, layer))
    return paths


if __name__ == "__main__":
    exit_from(main)
