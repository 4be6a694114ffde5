"""Start: recipes, settings, own data and models, and the stages that would run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.process import announce_loading

if TYPE_CHECKING:
    from components.config.distill import DistillSettings
    from components.config.study import Arm

app = typer.Typer()

LONG_S = 3 * 3600


@app.command()
def use(recipe: str) -> None:
    """Merge params/recipes/RECIPE.yaml into params/ and print what changed."""
    from components.config import recipes
    from flows.jobs import check_idle

    texts = recipes.merged(recipe)  # raises for an invalid recipe before anything is backed up
    check_idle()  # later stages of a running job still read params/
    backup_message = recipes.back_up_own_values() if texts else ""
    diff = recipes.write(texts)
    for line in diff.splitlines():
        colour = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}.get(line[:1])
        typer.secho(line, fg=colour, bold=line.startswith(("+++", "---")))
    about = recipes.about(recipe)
    duration = f"On {about.hardware} the whole job takes {about.time}" if about.time else "How long it takes was never measured"
    typer.echo(
        f"params/ {'now say' if diff else 'said already'} what recipe {recipe} says. {duration}: `make repro`, or"
        " `alignti plan` to see it first."
    )
    if backup_message:
        typer.echo(backup_message)
    if phases := recipes.phases(recipe) if "/" not in recipe else []:
        typer.echo(f"Before it, in this order: {', '.join(f'`alignti use {recipe}/{phase}`' for phase in phases)}.")


@app.command()
def init(
    data: Annotated[Path, typer.Option(help="Your rows: JSON or JSONL (docs/data.md).")],
    images: Annotated[Path, typer.Option(help="The folder that their images are in.")],
    teacher: Annotated[str, typer.Option(help="A checkpoint folder, or ORG/NAME@COMMIT of the hub.")],
    student: Annotated[str, typer.Option(help="Likewise.")],
    name: Annotated[str, typer.Option(help="Of the recipe that is made.")] = "own",
) -> None:
    """Look at your data and models, and make a recipe and params/ for them: what was chosen, and why."""
    from components.own_data.options import InitOptions

    request = InitOptions(data, images, teacher, student, name)
    request.check()
    from components.config.load import load_settings

    request.check_rows(load_settings().data)

    from components.config import recipes
    from components.config.local_paths import missing_paths
    from components.dataset.__main__ import unseen_by_dvc
    from components.errors import SettingsError
    from components.own_data.init import init as init_recipe
    from flows.jobs import check_idle

    check_idle()
    announce_loading()
    observations, choices = init_recipe(request)
    for line in (*observations, "", *choices):
        typer.echo(line)
    if backup_message := recipes.back_up_own_values():
        typer.echo(backup_message)
    recipes.use(name)
    settings = load_settings()
    if missing := missing_paths(settings):
        raise SettingsError(f"params/ name what is not here: {', '.join(missing)}")
    for warning in unseen_by_dvc(settings):
        typer.secho(warning, fg=typer.colors.YELLOW)
    from flows import raw_data

    if new_files := raw_data.complete():  # stage `prepare` depends on data/, wherever the rows are
        raw_data.record(new_files)
    typer.echo(
        f"\nparams/ now say what {request.recipe} says: `alignti preview` shows what is trained on, `dvc repro` runs it all."
    )


@app.command()
def check(
    all_recipes: bool = typer.Option(False, "--all-recipes", help="Also merge each recipe into these params and check that."),
    data: bool = typer.Option(False, "--data", help="Also try every row of the data as the stages will; writes nothing."),
) -> None:
    """Check params/, and that the data and models they name are here: every problem at once; exit code 2 if there is one."""
    from importlib.util import find_spec

    from components.config import recipes
    from components.config.load import load_settings
    from components.config.local_paths import missing_paths, soft_capped_models
    from components.digits import raw
    from components.errors import DataError, SettingsError

    def check_params() -> None:
        settings = load_settings()
        if missing := missing_paths(settings):
            raise SettingsError(f"params/ name what is not here: {', '.join(missing)}")
        if settings.data.source == "digits" and raw.RAW.is_dir():
            raw.read()
        elif settings.data.source == "digits":
            typer.echo("data/ is not here yet: `make data` restores it, as `make repro` does", err=True)
        if absent := [name for name in settings.runtime.trackers if find_spec(name) is None]:
            raise SettingsError(
                f"params/runtime.yaml: trackers: not installed: pip install {' '.join(absent)}, or leave it out"
            )
        relation_arms = [name for name, arm in settings.study.arms.items() if "relation" in arm.weights]
        if relation_arms and (capped := soft_capped_models(settings.models.members)):
            raise SettingsError(
                f"params/study.yaml: arms {', '.join(relation_arms)}: relation takes a linear head, and the logits of"
                f" {', '.join(capped)} are soft-capped; leave the term out"
            )

    problems = []
    checks = {"params/": check_params}
    if all_recipes:
        checks |= {f"recipe {name}": lambda name=name: recipes.merged(name) for name in recipes.names()}  # type: ignore[misc]
    for label, check_one in checks.items():
        try:
            check_one()
        except (DataError, SettingsError) as error:
            problems.append(str(error))
        else:
            typer.echo(f"{label}: fine")
    if problems:
        raise SettingsError("\n".join(problems))
    if data:
        announce_loading()
        from components.own_data import check as data_check
        from components.own_data.available_models import available_models

        settings = load_settings()
        folders, missing = available_models(settings.models)
        result = data_check.try_data(settings, folders.values(), settings.runtime.workers)
        for line in data_check.report(result, settings, folders, missing):
            typer.echo(line)
        data_check.accept(result, settings)
        typer.echo("data: fine")


@app.command()
def preview(each: int = typer.Option(2, min=1, help="Samples of each kind.")) -> None:
    """Show samples as the student reads them, with what is trained on in colour: here, and as reports/preview.html."""
    from components.config.load import load_settings
    from components.config.local_paths import missing_paths
    from components.errors import InputError
    from components.own_data.available_models import available_models

    settings = load_settings()
    if missing := missing_paths(settings):
        raise InputError(f"params/ name what is not here: {', '.join(missing)}")
    folders, _ = available_models(settings.models)
    if not folders:
        raise InputError(
            "no model is here whose tokenizer could read the samples; `dvc repro obtain_models` brings them (in a fresh clone"
            " `make data` before)"
        )
    announce_loading()
    from components.own_data import preview as page  # heavy: after the checks of inputs

    preview_data = page.preview(settings, folders, each)
    for line in page.lines(preview_data):
        typer.echo(line)
    typer.echo(f"-> {page.write_page(preview_data)}")


@app.command()
def plan(verbose: bool = typer.Option(False, "-v", "--verbose", help="All that changed, not the first of it alone.")) -> None:
    """Say for each stage whether it would run, why, and how long that takes."""
    from components.config.load import load_settings
    from components.config.local_paths import missing_paths
    from flows.plan import plan as make_plan

    settings = load_settings()
    steps, basis, recipe = make_plan(settings)
    width = max(len(step.stage) for step in steps)
    for step in steps:
        state = typer.style("would run" if step.reasons else "cached   ", fg=typer.colors.YELLOW if step.reasons else None)
        time = _duration(step.seconds) if step.reasons and step.seconds is not None else " " * 8
        why = step.reasons if verbose or len(step.reasons) < 2 else [f"{step.reasons[0]}, and {len(step.reasons) - 1} more"]
        typer.echo(f"{step.stage:{width}}  {state} {time}  {'; '.join(why)}".rstrip())
    running = [step for step in steps if step.reasons]
    if not running:
        typer.echo("Nothing to do: `make repro` would run no stage.")
        return
    total = sum(step.seconds or 0 for step in running)
    untimed = [step.stage for step in running if step.seconds is None]
    note = f", not counting {', '.join(untimed)}: never timed" if untimed else ""
    duration = f"{total / 60:.1f} min" if total < LONG_S else f"{total / 3600:,.0f} h"
    estimate = f"about {duration}, one at a time{note}" if len(untimed) < len(running) else "how long was never timed"
    typer.echo(f"{len(running)} of {len(steps)} stages would run: {estimate}.")
    times = f"Times: {basis}. " if len(untimed) < len(running) else ""
    typer.echo(f"{times}DVC restores a stage at once instead if it has run on the same inputs before.")
    if missing := missing_paths(settings):
        typer.secho(f"Not here, so it would fail: {', '.join(missing)}.", fg=typer.colors.RED)
    if recipe is not None and settings.models.family == "pretrained":
        from flows import cost_report

        cost_report.show(recipe, settings)


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:4.0f} s  "
    return f"{seconds / 60:4.0f} min" if seconds < LONG_S else f"{seconds / 3600:4,.0f} h  "


@app.command()
def arms() -> None:
    """List the arms: student, seed, weights, options beside params/distill.yaml's, and the score of those that have one."""
    from components.config.load import load_settings
    from components.records.evaluate import Scores
    from components.records.paths import SCORES
    from components.tracking import provenance

    settings = load_settings()
    arms = settings.study.arms
    scored = {name: Scores.read(file) for name in arms if (file := SCORES / name / "scores.json").is_file()}
    stale_stages = provenance.of_other_params(f"evaluate@{name}" for name in scored)
    for name, arm in arms.items():
        weights = " ".join(f"{term} {weight:g}" for term, weight in dict(arm.weights).items() if weight)
        mark = "*" if f"evaluate@{name}" in stale_stages else ""
        score = f"{scored[name].exact_match:.1%}{mark}" if name in scored else "-"
        options = options_of(arm, settings.distill)
        typer.echo(f"{name:20} {score:>6}  {arm.student:12} seed {arm.seed:<4} {weights} {options}".rstrip())
    if stale_stages:
        typer.echo("* of a run with other params than those of now; `alignti plan` says what would run")


def options_of(arm: Arm, distill: DistillSettings) -> str:
    """Options of an arm's blocks that differ from `params/distill.yaml`'s, as key=value."""
    from components.tracking.journal import flatten

    values = dict(flatten(arm.model_dump(mode="json", exclude_none=True, exclude={"weights", "student", "seed"})))
    shared = dict(flatten(distill.model_dump(mode="json")))
    return " ".join(f"{key}={value}" for key, value in values.items() if shared.get(key) != value)
