"""`alignti use | plan | check | sync | serve | evaluate`. Heavy imports stand inside the commands: `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.errors import exit_from

app = typer.Typer(
    help="Distil a multimodal model with Align-TI. `make repro` runs the whole job; these commands prepare and explain it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the start-up time
)


@app.command()
def use(recipe: str) -> None:
    """Merge params/recipes/RECIPE.yaml into params/ and print what changed."""
    from components import recipes

    diff = recipes.use(recipe)
    for line in diff.splitlines():
        colour = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}.get(line[:1])
        typer.secho(line, fg=colour, bold=line.startswith(("+++", "---")))
    about = recipes.about(recipe)
    typer.echo(
        f"params/ {'now say' if diff else 'said already'} what recipe {recipe} says. On {about.hardware} the whole job takes"
        f" {about.time}: `make repro`, or `alignti plan` to see it first."
    )


@app.command()
def plan() -> None:
    """Say for each stage whether it would run, why, and how long that takes."""
    from components.settings import load_settings
    from flows.plan import plan as make_plan

    load_settings()
    steps, basis = make_plan()
    width = max(len(step.stage) for step in steps)
    for step in steps:
        state = typer.style("would run" if step.reasons else "cached   ", fg=typer.colors.YELLOW if step.reasons else None)
        time = f"{step.seconds:6.0f} s" if step.reasons and step.seconds is not None else " " * 8
        typer.echo(f"{step.stage:{width}}  {state} {time}  {'; '.join(step.reasons)}".rstrip())
    running = [step for step in steps if step.reasons]
    if not running:
        typer.echo("Nothing to do: `make repro` would run no stage.")
        return
    total = sum(step.seconds or 0 for step in running)
    unknown = [step.stage for step in running if step.seconds is None]
    but = f", not counting {', '.join(unknown)}: never timed" if unknown else ""
    typer.echo(f"{len(running)} of {len(steps)} stages would run: about {total / 60:.1f} min, one at a time{but}.")
    typer.echo(f"Times: {basis}. DVC restores a stage at once instead if it has run on the same inputs before.")


@app.command()
def check(
    all_recipes: bool = typer.Option(False, "--all-recipes", help="Also merge each recipe into these params and check that."),
) -> None:
    """Check params/: every problem of every file at once; exit code 2 if there is one."""
    from components import recipes
    from components.errors import SettingsError
    from components.settings import load_settings

    problems = []
    checks = {"params/": lambda: load_settings()}
    if all_recipes:
        checks |= {f"recipe {name}": lambda name=name: recipes.merged(name) for name in recipes.names()}  # type: ignore[misc]
    for what, run in checks.items():
        try:
            run()
        except SettingsError as error:
            problems.append(str(error))
        else:
            typer.echo(f"{what}: fine")
    if problems:
        raise SettingsError("\n".join(problems))


@app.command()
def sync() -> None:
    """Send the run journals that MLflow has not taken yet."""
    from components.errors import InputError, TryAgainError
    from components.mirror import sync as send
    from components.settings import load_settings
    from components.tracking import JOURNAL_ONLY

    uri = load_settings().runtime.tracking_uri
    if uri == JOURNAL_ONLY:
        raise InputError(
            "params/runtime.yaml: tracking_uri is `journal`; name an MLflow address there or in ALIGNTI_TRACKING_URI"
        )
    try:
        sent, live = send(uri)
    except ImportError:
        raise InputError("MLflow is not installed here: pip install -c constraints.txt -e '.[pipeline]'") from None
    except Exception as error:  # MLflow, its server and its database raise all sorts
        raise TryAgainError(
            f"MLflow does not take the journals ({' '.join(str(error).split())[:300]}); nothing is lost"
        ) from error
    typer.echo(f"{sent} journal(s) sent{f', {live} still being written' if live else ''}.")


@app.command()
def serve(
    model: Path,
    port: int = typer.Option(8000, help="Where to listen."),
    host: str = typer.Option("127.0.0.1", help="An address of this machine; one that is open to others needs a key."),
) -> None:
    """Serve the checkpoint folder MODEL behind an OpenAI-compatible API until interrupted."""
    import signal

    from components.artifacts import RUNS
    from components.evaluate.kits.serve import served
    from components.runtime import prepare_torch
    from components.settings import load_settings

    log = RUNS / "serve" / f"{port}.log"
    device = prepare_torch(load_settings().runtime, seed=0)
    with served(model, device.type, log, host, port) as endpoint:
        typer.echo(f"{endpoint.url}/v1 serves the model named {endpoint.model}; log: {log}; Ctrl-C ends it")
        signal.pause()


Kits = Annotated[list[str] | None, typer.Option(help="own, vlmeval or lm-eval; all of them if not given.")]
Arms = Annotated[list[str] | None, typer.Option(help="Arms, `teacher`, before-STUDENT; every arm of the study if not given.")]
Tasks = Annotated[list[str] | None, typer.Option(help="Tasks of the kit's own, or .tsv files for vlmeval; else our questions.")]


@app.command()
def evaluate(kit: Kits = None, arm: Arms = None, task: Tasks = None) -> None:
    """Measure students with the field's own kits, beside our own scores: reports/kits.md."""
    from components.evaluate.kits.command import evaluate as run

    run(kit or (), arm or (), task or ())


def main() -> None:
    exit_from(lambda: app(windows_expand_args=False))


if __name__ == "__main__":
    main()
