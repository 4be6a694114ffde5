"""Run: studies, evaluation kits, and reproduced runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.config.names import check_arms, check_dump

app = typer.Typer()

study = typer.Typer(
    help="Many arms, as params/studies/NAME.yaml says (docs/study.md).", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(study, name="study")


@study.command("list")
def list_studies() -> None:
    """List the studies: how many arms each has, and what it is for."""
    from components.config.load import check_project
    from components.errors import InputError
    from components.study import expand

    check_project()
    problems = []
    for name in expand.names():
        try:
            typer.echo(f"{name:16} {len(expand.cells(name)):4} arms  {expand.read(name).about}")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


@study.command("expand")
def expand_study(name: str) -> None:
    """Put a study's arms into params/study.yaml; print what changed."""
    from components.config import recipes
    from components.study import expand
    from flows.jobs import check_idle

    texts = expand.merged(name)  # raises for an invalid study before anything is backed up
    if not texts:
        typer.echo(f"params/ say already what study {name} says.")
        return
    check_idle()
    if backup_message := recipes.back_up_own_values():
        typer.echo(backup_message)
    typer.echo(recipes.write(texts))


@study.command("run")
def run_study(
    name: str,
    parallel: int = typer.Option(None, min=1, help="Arms at a time; else one, or over the pool as many as workers take."),
    recipe: str = typer.Option(None, help="Put params/ to this recipe in the workspace; else as committed."),
    pool: bool = typer.Option(False, "--pool", help="Hand the arms out to the workers of the pool."),
) -> None:
    """Run what a study lacks, in a workspace of its own, and record it."""
    from components.config import recipes
    from components.study import expand
    from components.study.committed import check_committed
    from flows.servers import client_environment, prefect_failures, use_running

    expand.read(name)
    if recipe is not None:
        recipes.about(recipe)
    if files := check_committed(name, recipe):
        typer.echo(
            f"the study runs what is committed{f' with recipe {recipe}' if recipe else ''}, without the changes here of"
            f" {', '.join(files)}; commit them first for a study of these{'' if recipe else ', or give --recipe'}"
        )
    if pool:
        client_environment()  # raises if a server is down
    use_running()
    from flows.study import study as flow

    with prefect_failures():
        outcomes = flow(name, parallel, recipe, pool)
    typer.echo(f"study {name}: {len(outcomes)} arms run and recorded; `alignti compare {name}` says what they show.")


Kits = Annotated[list[str] | None, typer.Option(help="own, vlmeval or lm-eval; all of them if not given.")]
Arms = Annotated[list[str] | None, typer.Option(help="Arms, `teacher`, before-STUDENT; else the teacher and every arm.")]
Tasks = Annotated[list[str] | None, typer.Option(help="Tasks of the kit's own, or as docs/kits.md says; else our questions.")]


@app.command()
def evaluate(
    kit: Kits = None,
    arm: Arms = None,
    task: Tasks = None,
    blank: bool = typer.Option(False, "--blank", help="vlmeval's tasks with a plain grey image in each image's place."),
) -> None:
    """Measure students with the field's own kits, beside our own scores: reports/kits.md."""
    from components.evaluate.kits import table

    table.check(kit or ())
    check_arms(name for name in arm or () if not name.startswith("before-"))
    from components.evaluate.kits.command import evaluate as run

    run(kit or (), arm or (), task or (), blank)


@app.command()
def replay(dump: Path) -> None:
    """Rerun a step that stopped with a loss that was not finite, sample by sample, and say which sample's which term it is."""
    check_dump(dump)
    from components.distill.replay import replay as findings

    count = 0
    for count, finding in enumerate(findings(dump), 1):  # noqa: B007
        typer.echo(str(finding))
    if not count:
        typer.echo(f"{dump}: every term of every sample and every gradient is finite here, one sample at a time.")


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="Of a stage's run: MLflow's id, or a journal's name in .runs/journal.")],
    stage_only: Annotated[
        bool, typer.Option("--stage-only", help="Take what comes before the stage from DVC's cache, where it is there.")
    ] = False,
) -> None:
    """Run again what a run ran, in a worktree of its commit, and say whether the same bytes come out (exit code 1 if not)."""
    from components.config.load import load_settings
    from flows import reproduce as module
    from flows.servers import use_running

    use_running()
    settings = load_settings()
    record = module.find(run_id, settings)
    typer.echo(f"{record.stage} as of commit {record.commit[:12]}, with the params of run {record.run}")
    outcome = module.reproduce(record, settings, stage_only)
    typer.echo(f"{outcome}.")
    if not outcome.same:
        raise typer.Exit(1)
