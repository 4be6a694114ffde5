"""Parallel pipeline by DVC alone, independent stages at the same time: `python -m flows.parallel [--jobs N] [-v]`.

N workers walk DVC's graph, each a `dvc repro --single-item STAGE`, so that `dvc.lock` afterwards is that of a plain `dvc
repro`. Only stale stages, and those after a stage that was run, are started.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, nullcontext
from graphlib import TopologicalSorter

from components.config.load import load_settings
from components.config.runtime import RuntimeSettings
from components.config.settings import Settings
from components.errors import InputError
from components.process import cores, exit_from
from components.tracking import outcome
from components.tracking.stage_run import PARENT, stage_run
from flows import devices, dvc, dvc_repro, servers, stage_output
from flows.dvc_repro import Outcome, StageFailed
from flows.jobs import check_idle


def repro(jobs: int, run: Callable[[str], Outcome]) -> dict[str, Outcome]:
    """Bring every stage up to date with `run`, `jobs` at a time; returns the outcome per stage.

    Raises StageFailed of the first failure, after the stages beside it have ended; no stage starts after it.
    """
    needs, stale = dvc.graph(), dvc.status()
    order, outcomes = TopologicalSorter(needs), dict[str, Outcome]()
    order.prepare()
    running: dict[Future[Outcome], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while order.is_active():
                for stage in order.get_ready():
                    if stage in stale or any(outcomes[upstream] != "unchanged" for upstream in needs[stage]):
                        running[pool.submit(run, stage)] = stage
                    else:
                        outcomes[stage] = "unchanged"
                        order.done(stage)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future)
                    outcomes[stage] = future.result()
                    order.done(stage)
        except StageFailed:
            for future in running:
                future.cancel()
            raise
        except BaseException:  # Ctrl-C reaches this thread alone
            dvc_repro.stop_all()
            raise
    return outcomes


def workers(runtime: RuntimeSettings) -> int:
    """Number of workers: one per GPU, else one per `runtime.threads` cores; 1 on MPS or if a training takes several devices."""
    if runtime.devices > 1 or runtime.device == "mps":
        return 1
    gpus = 0 if runtime.device == "cpu" else len(devices.gpus())
    return gpus or max(1, cores() // runtime.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run stale stages, independent ones at the same time.")
    parser.add_argument("--jobs", type=int, help="stages at a time; as many as there are GPUs, or else cores")
    parser.add_argument("-v", "--verbose", action="store_true", help="all that stages and DVC say, not the last line alone")
    args, settings = parser.parse_args(), load_settings()
    runtime = settings.runtime
    jobs = workers(runtime) if args.jobs is None else args.jobs
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: how many stages at a time, 1 or more")

    check_idle()
    if not dvc.status():
        print("Nothing to do: every stage is up to date.")
        return
    with stage_run("repro", runtime=runtime, metered=False) as parent:

        def run(stage: str) -> Outcome:
            alone = jobs == 1 or runtime.device == "cpu"  # one stage at a time has all devices, or none
            device_lock: AbstractContextManager[dict[str, str]] = nullcontext({}) if alone else devices.lock_gpu()
            with device_lock as device, closing(stage_output.Labelled(stage, args.verbose)) as printer:
                return dvc_repro.reproduce(stage, {PARENT: parent.id, **device}, on_line=printer)

        outcomes = repro(jobs, run)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).items())
    print(f"{len(outcomes)} stages, {jobs} at a time: {summary}.")
    print_comparison_url(settings)


def print_comparison_url(settings: Settings) -> None:
    """Print the URL of MLflow's comparison page for the arms; nothing if they were not sent."""
    mlflow = next((server.url for server in servers.started() if server.name == "mlflow" and server.alive()), None)
    address = mlflow or f"http://{servers.LOOPBACK}:{servers.PORTS['mlflow']}"
    if page := outcome.comparison(outcome.current_outcomes(settings), address):
        print(f"The arms compared in MLflow{'' if mlflow else ', once `alignti up` has started it'}: {page}")


if __name__ == "__main__":
    exit_from(main)
