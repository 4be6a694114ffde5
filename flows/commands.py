"""Commands of `alignti` about the champion and about rerunning what was run. Heavy imports stand inside them."""

from __future__ import annotations

from typing import Annotated

import typer


def register(
    arms: Annotated[list[str] | None, typer.Argument(help="Arms; all of params/study.yaml if not given.")] = None,
) -> None:
    """Register the students of this folder in MLflow, the best as the candidate; their weights stay with DVC."""
    from components.config.load import load_settings
    from components.errors import unknown
    from flows import promote as module
    from flows.servers import use_running

    use_running()
    settings = load_settings()
    for arm in arms or ():
        if arm not in settings.study.arms:
            raise unknown("arm", arm, settings.study.arms)
    told, sent = module.register(arms or list(settings.study.arms), settings)
    state = "in MLflow" if sent else "in the journal; `alignti sync` sends them to MLflow"
    typer.echo(f"{', '.join(told) if told else 'no student'} newly registered, {state}")


def promote(
    candidate: Annotated[str | None, typer.Argument(help="An arm of this folder, or a version's number.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Ask the champion today's questions if it was asked others.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The verdict as JSON.")] = False,
) -> None:
    """Make the candidate the champion if it is better beyond chance, and say why or why not."""
    from components.config.load import load_settings
    from flows import promote as module
    from flows.servers import use_running

    use_running()
    verdict = module.promote(candidate, load_settings(), measure)
    typer.echo(verdict.model_dump_json(indent=2) if json else f"{verdict.model}: {verdict.why}.")


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
    recorded = module.find(run_id, settings)
    typer.echo(f"{recorded.stage} as of commit {recorded.commit[:12]}, with the params of run {recorded.run}")
    outcome = module.reproduce(recorded, settings, stage_only)
    typer.echo(f"{outcome}.")
    if not outcome.same:
        raise typer.Exit(1)
