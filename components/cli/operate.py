"""Operate: servers, workers, resources leaked by dead runs, and journals."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command()
def up(
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; any but loopback needs ALIGNTI_SERVER_AUTH=user:password."
    ),
    mlflow_port: int = typer.Option(5000, min=1, max=65535),
    prefect_port: int = typer.Option(4200, min=1, max=65535),
    postgres: str = typer.Option(
        None, envvar="ALIGNTI_POSTGRES", show_envvar=True, help="postgresql://user:password@host:port, for a pool of machines."
    ),
) -> None:
    """Start the MLflow and Prefect servers of this folder, and wait until they answer."""
    from flows import servers

    started = servers.up(host, {"mlflow": mlflow_port, "prefect": prefect_port}, postgres, typer.echo)
    for server in started:
        typer.echo(f"{server.name}: {server.page}")
    typer.echo("`alignti deploy` and `alignti worker` find them by themselves. For other commands in this shell:")
    for name in ("ALIGNTI_TRACKING_URI", "PREFECT_API_URL"):
        typer.echo(f"  export {name}={servers.client_environment()[name]}")


@app.command()
def down() -> None:
    """Stop the workers and the servers of this folder, and all that they started."""
    from flows import pool, servers

    workers = ["the workers"] if pool.stop_workers() else []
    stopped = [*workers, *(server.name for server in servers.down())]
    typer.echo(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def status() -> None:
    """Say whether the servers of this folder run and answer."""
    from flows import servers

    for name, state in servers.report():
        typer.echo(f"{name:8} {state}")


@app.command()
def deploy(
    at_once: int = typer.Option(
        None, min=1, help="Flow runs at a time on this pool; else as many as this machine has devices."
    ),
) -> None:
    """Make the work pools, queues and limits, and the deployments of prefect.yaml, on the server that is up."""
    from flows import pool

    for line in pool.deploy(at_once):
        typer.echo(line)


@app.command()
def worker(count: int = typer.Option(None, min=1, help="How many; else one per GPU, or one without GPUs.")) -> None:
    """Run workers that take flow runs from the pool `gpu` (one per GPU) or `cpu`, until stopped with Ctrl-C."""
    from flows import pool

    pool.work(count, typer.echo)


@app.command()
def doctor(
    free_slots: bool = typer.Option(False, "--free-slots", help="Free them, too."),
    prune: int = typer.Option(None, min=0, metavar="DAYS", help="Delete the branches runs/... of flow runs older than that."),
) -> None:
    """List what dead flow runs still hold: slots of pools, queues and deployments, and worktrees."""
    from flows import cleanup_stale_runs, workspace

    if prune is not None:
        typer.echo(f"deleted {len(workspace.prune(prune))} branch(es) runs/... older than {prune} days")
    descriptions = list(cleanup_stale_runs.free() if free_slots else (leak.what for leak in cleanup_stale_runs.leaks()))
    for description in descriptions:
        typer.echo(f"{'freed' if free_slots else 'leaked'}: {description}")
    if not cleanup_stale_runs.reachable():
        typer.echo("No Prefect server is up here (`alignti up`), so only this folder was looked at.")
    if not descriptions:
        typer.echo("Nothing is held by a run that is dead.")
    elif not free_slots:
        typer.echo("`alignti doctor --free-slots` frees what leaked.")


@app.command()
def sync() -> None:
    """Send the run journals that MLflow has not taken yet."""
    from components.config.load import load_settings
    from components.errors import InputError
    from components.tracking.mlflow_client import asking
    from components.tracking.mlflow_sync import sync as send
    from components.tracking.stage_run import JOURNAL_ONLY

    uri = load_settings().runtime.tracking_uri
    if uri == JOURNAL_ONLY:
        raise InputError(
            "params/runtime.yaml: tracking_uri is `journal`; name an MLflow address there or in ALIGNTI_TRACKING_URI"
        )
    with asking("MLflow does not take the journals", "nothing is lost"):
        sent, open_journals = send(uri)
    typer.echo(f"{sent} journal(s) sent{f', {open_journals} still being written' if open_journals else ''}.")
