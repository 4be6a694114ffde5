"""Hand on: export, serve, register and promote a trained student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.config.names import check_arms, check_models

app = typer.Typer()


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder (LoRA adapters too), or ORG/NAME of the hub.")],
    folder: Path,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; else as the weights are stored.")] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="The largest file of weights.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is at FOLDER.")] = False,
) -> None:
    """Write a model to FOLDER for others, with its full card, and read it back to see that it answers as before."""
    check_models(student)
    from components.release.arguments import check_export

    check_export(folder, dtype, max_shard_size, force)
    from components.config.load import load_settings
    from components.release.export import export as write

    typer.echo(str(write(student, folder, load_settings(), dtype, max_shard_size, force)))


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder of `alignti export`, or ORG/NAME of the hub.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME")],
    yes: Annotated[bool, typer.Option("--yes-upload", help="Upload; without it nothing leaves this machine.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository is private without it.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that holds files.")] = False,
) -> None:
    """Upload a model to the hub; without --yes-upload say what would go there, and what its licences leave open."""
    check_models(model)
    from components.release import push as hub

    hub.check_repo(repo)
    from components.config.load import load_settings
    from components.release.model import find  # heavy: after the checks of inputs

    upload = hub.plan(find(model, load_settings()).path, repo, private=not public)
    typer.echo(str(upload))
    if yes:
        typer.echo(f"uploaded: {hub.push(upload, update)}")
    else:
        typer.echo("Nothing was uploaded; add --yes-upload to do it.")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder, or ORG/NAME[@REVISION] of the hub.")],
    port: int = typer.Option(8000, min=1, max=65535, help="Where to listen."),
    host: str = typer.Option("127.0.0.1", help="An address of this machine; one that is open to others needs a key."),
) -> None:
    """Serve MODEL behind an OpenAI-compatible API until interrupted."""
    check_models(model)
    from components.config.load import load_settings
    from components.errors import TryAgainError
    from components.evaluate.kits.serve import check_address, last_line, served
    from components.records.paths import RUNS
    from components.release.model import find
    from components.runtime import prepare_torch

    check_address(host, port)
    log, settings = RUNS / "serve" / str(port) / "server.log", load_settings()
    device = prepare_torch(settings.runtime, seed=0)
    with served(find(model, settings).path, Path(model).resolve().name, device.type, log, host, port) as (endpoint, process):
        typer.echo(f"{endpoint.url}/v1 serves the model named {endpoint.model}; log: {log}; Ctrl-C ends it")
        process.wait()
    raise TryAgainError(f"the server ended with {process.returncode}: {last_line(log)} (all of it: {log})")


@app.command()
def register(
    arms: Annotated[list[str] | None, typer.Argument(help="Arms; all of params/study.yaml if not given.")] = None,
) -> None:
    """Register the students of this folder in MLflow, the best as the candidate; their weights stay with DVC."""
    check_arms(arms or (), teacher=False)
    from components.config.load import load_settings
    from flows import promote as module
    from flows.servers import use_running

    use_running()
    settings = load_settings()
    registered, sent = module.register(arms or list(settings.study.arms), settings)
    state = "in MLflow" if sent else "in the journal; `alignti sync` sends them to MLflow"
    typer.echo(f"{', '.join(registered) if registered else 'no student'} newly registered, {state}")


@app.command()
def promote(
    candidate: Annotated[str | None, typer.Argument(help="An arm of this folder, or a version's number.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Ask the champion today's questions if it was asked others.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The verdict as JSON.")] = False,
) -> None:
    """Make the candidate the champion if it is better beyond chance, and say why or why not."""
    if candidate is not None and not candidate.isdigit():
        check_arms([candidate], teacher=False)
    from components.config.load import load_settings
    from components.tracking.mlflow_client import check_recorded
    from flows.servers import use_running

    use_running()
    settings = load_settings()
    check_recorded(settings.runtime.tracking_uri)
    from flows import promote as module  # heavy: after the checks of inputs

    verdict = module.promote(candidate, settings, measure)
    typer.echo(verdict.model_dump_json(indent=2) if json else f"{verdict.model}: {verdict.why}.")
