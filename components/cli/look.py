"""Look: results of runs, and answers of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.config.names import check_arms, check_file, check_models
from components.process import announce_loading

app = typer.Typer()


@app.command()
def runs(last: int = typer.Option(40, "--last", min=1, help="As many, the latest.")) -> None:
    """List the runs of this folder, the latest last: name, status, recipe and commit; `alignti reproduce` takes the name."""
    from components.config.load import check_project
    from components.tracking import history

    check_project()
    records = list(history.recorded())
    if not records:
        typer.echo("no runs yet: `make repro`, `dvc repro` and `alignti study run` record theirs here")
        return
    if len(records) > last:
        typer.echo(f"the last {last} of {len(records):,} runs; --last {len(records)} shows all")
    rows = [(run.name, run.status, run.recipe or "-", run.commit[:10]) for run in records[-last:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def compare(
    study: str,
    csv: Annotated[list[Path] | None, typer.Option(help="Runs of earlier compare.csv files, in place of MLflow's.")] = None,
) -> None:
    """Say what a study shows, from its runs in MLflow: reports/studies/STUDY/compare.{md,csv,html}."""
    from components.study import expand

    plan = expand.read(study)
    for file in csv or ():
        check_file("--csv", file)
    from components.config.load import load_settings
    from components.errors import without_login
    from components.tracking.mlflow_client import check_recorded
    from components.tracking.outcome import page
    from flows.servers import use_running

    use_running()
    settings = load_settings()
    tracking_uri = settings.runtime.tracking_uri
    if not csv:
        check_recorded(tracking_uri)
    from components.study import compare as comparison  # heavy: after the checks of inputs
    from components.study import report
    from components.study.runs import load_runs, read_csv

    earlier = [run for file in csv or () for run in read_csv(file)]
    runs = earlier or load_runs(tracking_uri, settings.runtime.experiment, study)
    cells = expand.cells(study)
    families = expand.families(plan, cells)
    result = comparison.compare(study, runs, [cell.name for cell in cells], families, settings.evaluate.confidence)
    paths = report.write(result, plan.about, settings.evaluate.confidence)
    typer.echo(report.standing(result))
    typer.echo(f"-> {', '.join(map(str, paths))}")
    tracking_url = without_login(tracking_uri)
    if not csv and tracking_url.startswith("http"):
        typer.echo(f"in MLflow: {page(tracking_url, [run.id for run in result.runs], result.runs[0].experiment)}")


@app.command()
def leaderboard(
    measure: bool = typer.Option(
        False, "--measure", help="First time every model's answers: tokens/s, time to first token, memory."
    ),
) -> None:
    """Write reports/leaderboard.*: our students and their teacher beside the published rows."""
    from components.config.load import load_settings
    from components.records.compare import Comparison
    from components.records.models import ModelIndex
    from components.records.paths import MODELS, REPORTS, STUDENTS, TEACHER, TEACHER_ARM
    from components.records.teacher import TeacherChoice

    settings = load_settings()
    comparison = Comparison.read(REPORTS / "compare.json")
    index, teacher = ModelIndex.read(MODELS / "index.json"), TeacherChoice.read(TEACHER / "choice.json")
    from components.evaluate import leaderboard as board  # heavy: after the checks of inputs
    from components.evaluate import speed
    from components.evaluate.kits import table
    from components.evaluate.kits.command import current

    if measure:
        from components.runtime import prepare_torch

        models = [(TEACHER_ARM, Path(teacher.path)), *((arm, STUDENTS / arm / "model") for arm in comparison.arms)]
        speed.measure(models, settings, prepare_torch(settings.runtime, seed=0)).write(speed.SPEED)
    vlmeval_figures = {
        key.removeprefix("vlmeval/"): task.figures for key, task in table.read(current).tasks.items() if "vlmeval/" in key
    }
    speeds = speed.read(current)
    paths = board.write(board.build(comparison, index, teacher, settings.study.arms, speeds, vlmeval_figures))
    typer.echo(f"leaderboard: {len(comparison.arms)} arms beside the published rows -> {', '.join(map(str, paths))}")


@app.command()
def samples(
    max_samples: int = typer.Option(2000, "--most", min=1, help="Samples on the page; the first ones of the evaluated split."),
) -> None:
    """Write reports/samples.html: each image and question with all answers, and where the teacher looked."""
    from components.config.load import load_settings
    from components.records.compare import Comparison
    from components.records.irs import LayerChoice
    from components.records.paths import DATASET, REPORTS, TEACHER, TEACHER_ARM
    from components.records.teacher import TeacherChoice

    settings = load_settings()
    comparison, searched = Comparison.read(REPORTS / "compare.json"), LayerChoice.read_if_searched()
    layer = None if searched is None else searched.picked.layer
    choice = TeacherChoice.read(TEACHER / "choice.json")
    announce_loading()
    from components.dataset.shards import Samples  # heavy: after the checks of inputs
    from components.evaluate import samples as page
    from components.evaluate.load_results import read
    from components.models.load import load
    from components.runtime import prepare_torch

    predictions = read(comparison.arms).predictions
    teacher = load(Path(choice.path), prepare_torch(settings.runtime, seed=0))
    entries = predictions[TEACHER_ARM][:max_samples]
    maps = page.attention_maps(teacher, Samples(DATASET, comparison.split), entries, layer, settings)
    path = page.write(comparison, predictions, maps, layer, max_samples)
    if unknown := sum(grid is None for grids in maps.values() for grid in grids):
        typer.echo(f"samples: {unknown:,} looks are not drawn: the places of the teacher's visual tokens are not known")
    typer.echo(f"samples: {len(entries):,} questions with every answer, {path.stat().st_size / 2**20:.1f} MiB -> {path}")


@app.command()
def controls(
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms, or `teacher`; all without it.")] = None,
) -> None:
    """Write reports/controls.*: every model without its image, and what the test split shares with the training data."""
    check_arms(arm or ())
    from components.config.load import load_settings
    from components.records.paths import STUDENTS, TEACHER, TEACHER_ARM
    from components.records.teacher import TeacherChoice

    settings = load_settings()
    folders = {TEACHER_ARM: Path(TeacherChoice.read(TEACHER / "choice.json").path)}
    folders |= {name: STUDENTS / name / "model" for name in settings.study.arms}
    announce_loading()
    from components.evaluate import blind_baselines  # heavy: after the checks of inputs

    report = blind_baselines.measure([(name, folders[name]) for name in arm or folders], settings)
    paths = blind_baselines.write(report)
    blind = ", ".join(f"{name} {max(m.blank, m.other):.1%} of {m.seeing:.1%}" for name, m in report.models.items())
    duplicates = report.contamination.exact + report.contamination.near
    typer.echo(f"controls: right without the image {blind}; {duplicates} test images have a twin in training -> {paths[1]}")


@app.command()
def benchmarks(name: Annotated[str | None, typer.Argument(help="One of them, with its prompt.")] = None) -> None:
    """List the benchmarks: what each asks, how it is scored, where to get it, and what is not verified."""
    from components.errors import unknown
    from components.evaluate.benchmarks import BENCHMARKS
    from components.evaluate.statistics import noise_unpaired

    if name is not None and name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    for key in [name] if name else BENCHMARKS:
        entry = BENCHMARKS[key]
        items = f"{entry.items:,} questions" if entry.items else "number of questions not verified"
        typer.secho(f"{key}: {entry.title}, {entry.split}, {items}{' (paper)' if entry.in_paper else ''}", bold=True)
        typer.echo(f"  score    {entry.metric}: {entry.rule}")
        typer.echo(f"  licence  {entry.licence or 'not verified'}")
        if entry.independent:
            gap = 100 * noise_unpaired(0.5, entry.independent, 0.95)
            typer.echo(f"  noise    two scores less than {gap:.1f} points apart may differ by chance (unpaired, 95%, near 50)")
        typer.echo(f"  get      {entry.get}")
        for point in entry.open_points:
            typer.echo(f"  open     {point}")
        if name is not None:
            typer.echo("  prompt   " + entry.prompt.replace("\n", "\n           "))


@app.command("try")
def try_model(
    student: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder, or ORG/NAME[@REVISION] of the hub.")],
    question: str,
    image: Annotated[
        list[Path], typer.Option(help="What the question is about: JPEG, PNG, WebP, GIF, BMP or TIFF. Again for another.")
    ],
    vs: Annotated[str | None, typer.Option(help="Another model, to answer beside it.")] = None,
    look: Annotated[bool, typer.Option("--look", help="Write a picture of where each looked.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="An answer is cut there.")] = 256,
) -> None:
    """Ask a model a question about images, each where <image> stands in it or first: its answer as it comes, with timings."""
    for path in image:
        check_file("--image", path)
    models = [student] if vs is None else [student, vs]
    check_models(*models)
    from components.config.load import load_settings
    from components.release.arguments import sample_of

    settings = load_settings()
    sample_of(image, question, settings.data.limits)  # raises for an invalid question; the import below takes seconds
    announce_loading()
    from components.release.generate import run

    run(models, image, question, settings, max_new_tokens, look)
