"""Stage `search_layer`: the teacher layer whose attention map depends most on the instruction (highest IRS), and the visual
weighting selected by the rule of params/irs.yaml. `python -m components.irs`

Writes artifacts/irs/layer.json, background.safetensors if all images have one grid of visual tokens, and under reports/irs
curve.json, curve.png and overlay_*.png. Stage align: layer.json states that there is no teacher, and the curve is empty.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from components.config.load import load_settings
from components.io import write_bytes, write_text
from components.process import exit_from
from components.records.irs import LayerChoice, Picked, Rows
from components.records.paths import DATASET, IRS, REPORTS, ROWS, TEACHER
from components.records.record import Absent
from components.records.teacher import NO_TEACHER, TeacherChoice

if TYPE_CHECKING:
    from torch import Tensor

    from components.dataset.shards import Sample
    from components.irs.overlays import AttentionExample
    from components.irs.regions import Tiling
    from components.irs.search import AttentionMaps

FOLDER = REPORTS / "irs"


def main() -> None:
    settings = load_settings()
    if settings.distill.stage == "align":
        _no_layer(NO_TEACHER)
        return
    teacher = TeacherChoice.read(TEACHER / "choice.json")

    from components.dataset.shards import Samples
    from components.irs.choice import choose
    from components.irs.overlays import curve
    from components.irs.regions import Tiling
    from components.irs.search import TooFewInstructions, attention_maps
    from components.irs.weighting import save_backgrounds
    from components.models.load import load
    from components.models.template import Template
    from components.report.figures import draw
    from components.runtime import prepare_torch
    from components.tracking.stage_run import stage_run

    device = prepare_torch(settings.runtime, settings.irs.seed)
    with stage_run("search_layer", runtime=settings.runtime, params=settings.irs.model_dump()) as run:
        samples = Samples(DATASET, "train", ROWS)
        loaded = load(Path(teacher.path), device)
        try:
            maps = attention_maps(loaded, samples, Template.from_settings(settings.models.template), settings.irs)
        except TooFewInstructions as error:
            if settings.needs_layer:
                raise
            _no_layer(Absent(none=str(error)))
            return
        tiling = Tiling.of(loaded.processor)
        choice, backgrounds = choose(maps, tiling, settings.irs)
        save_backgrounds(backgrounds)
        choice.write(IRS / "layer.json")
        run.dataset("train", samples.manifest.digest)
        run.tag("teacher", teacher.name)
        for point in points(choice):
            metrics = {"irs_standard_error" if name == "standard_error" else name: value for name, value in point.items()}
            run.metrics({name: value for name, value in metrics.items() if name != "layer"}, step=int(point["layer"]))
        run.metrics({"layer": choice.layer, "separated": choice.separated, "picked_layer": choice.picked.layer})
        run.tag("picked", choice.picked.described)
        write_text(FOLDER / "curve.json", json.dumps(points(choice), indent=2) + "\n")
        write_bytes(FOLDER / "curve.png", draw(curve, choice))
        overlays = _overlays(tiling, maps, backgrounds, choice.picked, settings.irs.overlays)
        for path in (FOLDER / "curve.json", FOLDER / "curve.png", *overlays):
            run.artifact(path)
    print(closing_line(choice, settings.irs.images))


def _no_layer(reason: Absent) -> None:
    reason.write(IRS / "layer.json")
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_text(FOLDER / "curve.json", "[]\n")
    print(f"search_layer: nothing to do, {reason.none}")


def points(choice: LayerChoice) -> list[dict[str, float]]:
    """Curve data for `dvc plots`: IRS per layer, and IRS and pointing per weighting and kind of rows."""
    data = []
    for layer, (irs, error) in enumerate(zip(choice.irs, choice.standard_error, strict=True)):
        point: dict[str, float] = {"layer": layer, "irs": irs, "standard_error": error}
        for view in choice.views:
            name = f"{view.weighting}_{view.rows}"
            point[f"irs_{name}"] = view.irs[layer]
            if view.pointing:
                low, high = view.pointing_ci95[layer]
                point |= {f"pointing_{name}": view.pointing[layer], f"pointing_{name}_low": low, f"pointing_{name}_high": high}
        if choice.region is not None:
            point["pointing_equal"] = choice.region.equal
        for background in choice.backgrounds:
            name = f"background_{background.rows}"
            point |= {f"{name}_most": background.most[layer], f"{name}_on_sinks": background.on_sinks[layer]}
        data.append(point)
    return data


def closing_line(choice: LayerChoice, requested: int) -> str:
    best, second = choice.layer, choice.runner_up
    if best == second:
        verdict = "the teacher's only layer"
    else:
        separated = "separated from" if choice.separated else "not separated from"
        verdict = f"{separated} layer {second}, {choice.irs[second]:.3f} ± {choice.standard_error[second]:.3f}"
    shortfall = f" (all that qualify of {requested} asked for)" if choice.images < requested else ""
    return (
        f"search_layer: layer {best} has the highest IRS, {choice.irs[best]:.3f} ± {choice.standard_error[best]:.3f},"
        f" {verdict};"
        f" {choice.pairs:,} pairs on {choice.images:,} images{shortfall}; {_summary(choice)}; curve and overlays in {FOLDER}"
    )


def _summary(choice: LayerChoice) -> str:
    """Summary of the weighting used under `weighting: searched`: its pointing score, and its share of background."""
    picked = choice.picked
    (view,) = (view for view in choice.views if (view.weighting, view.rows) == (picked.weighting, picked.rows))
    parts = [f"rule {picked.rule} picks {picked.described}"]
    if choice.region is not None:
        low, high = view.pointing_ci95[picked.layer]
        parts.append(
            f"{view.pointing[picked.layer]:.1%} [{low:.1%}, {high:.1%}] of its weight on the asked region, equal weights"
            f" {choice.region.equal:.1%}"
        )
    if picked.runner_up is not None and not picked.separated:
        layer, weighting, rows = picked.runner_up
        parts.append(f"not separated from layer {layer}, {weighting}, {rows}")
    if view.equal[picked.layer]:
        parts.append(f"no attention left for {view.equal[picked.layer]} instruction(s), whose weights are equal")
    for background in choice.backgrounds:
        if background.rows == picked.rows and (sinks := background.sinks[picked.layer]):
            parts.append(f"{background.on_sinks[picked.layer]:.0%} of its attention on {len(sinks)} sink(s) whatever is asked")
    return ", ".join(parts)


def _overlays(tiling: Tiling, maps: AttentionMaps, backgrounds: dict[Rows, Tensor], picked: Picked, count: int) -> list[Path]:
    """Attention overlays of the first `count` sampled images, each with the two instructions of lowest attention cosine,
    among those with a known region if there are at least two."""
    from tqdm import tqdm

    from components.irs.overlays import overlay, peaks
    from components.irs.regions import preprocessed_image
    from components.models.image_processor import decode_first_image
    from components.report.figures import draw

    for stale in FOLDER.glob("overlay_*.png"):
        stale.unlink()
    if tiling.tokens is None or math.isqrt(tiling.tokens) ** 2 != tiling.tokens:
        print("search_layer: no overlays, for the teacher's visual tokens are no square grid that all images share")
        return []
    title = f"layer {picked.layer}, {'all rows' if picked.rows == 'all' else 'words'}"
    attention, background = maps.attention[picked.rows][picked.layer], backgrounds[picked.rows][picked.layer]
    examples_per_image = [
        _examples(tiling, samples, attention[index], background) for index, samples in enumerate(maps.samples[:count])
    ]
    peak = peaks(example for examples in examples_per_image for example in examples)
    paths: list[Path] = []
    for samples, examples in zip(maps.samples, tqdm(examples_per_image, desc="overlays", unit="image"), strict=False):
        paths.append(FOLDER / f"overlay_{len(paths) + 1}.png")
        write_bytes(
            paths[-1],
            draw(overlay, preprocessed_image(tiling.processor, decode_first_image(samples[0])), examples, peak, title),
        )
    return paths


def _examples(tiling: Tiling, samples: list[Sample], attention: Tensor, background: Tensor) -> list[AttentionExample]:
    """Attention maps of the two instructions of lowest cosine on one image; `attention` (I, Nv)."""
    from components.irs.centred import centred
    from components.irs.overlays import AttentionExample
    from components.irs.search import furthest_apart
    from components.models.image_processor import decode_first_image
    from components.models.rendered import question_of

    with_region = [i for i, sample in enumerate(samples) if sample.turns[0].boxes]
    candidates = with_region if len(with_region) > 1 else list(range(len(samples)))
    examples = []
    for i in (candidates[n] for n in furthest_apart(attention[candidates])):
        turn = samples[i].turns[0]
        region = tiling.region_mask(decode_first_image(samples[i]), turn.boxes) if turn.boxes else None
        weights = centred(attention[i], background)
        examples.append(AttentionExample(question_of(turn), turn.answer, attention[i].numpy(), weights.numpy(), region))
    return examples


if __name__ == "__main__":
    exit_from(main)
