"""Overhead of flow, DVC and tracking: `python -m benchmarks.orchestration`

A study of 20 cells of 10 seconds, one at a time: components that sleep, and log as a training does (five points a second), run

- bare: one after the other, without DVC, Prefect or tracking;
- by one `dvc repro`, and by a `dvc repro --single-item` each, as a flow that spreads stages has to do: DVC's own cost;
- by the flow `alignti-pipeline`, tracked, with the real Prefect and MLflow servers up, its graph, gate and page included.

Sleeping cells take 10 seconds however busy the machine is; their overhead does not, so the processor time of all processes is
reported too, with the machine's load.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import measure, table
from components.tracking import mlflow_client
from components.tracking.stage_run import JOURNAL_ONLY
from flows import servers

ROOT = Path(__file__).parents[1]
CELLS, SECONDS, POINTS_PER_S = 20, 10.0, 5
PORTS: dict[servers.Name, int] = {"mlflow": 5970, "prefect": 5971}
TRACKED = "ALIGNTI_BENCHMARK_TRACKED"

PIPELINE = """
stages:
  cell:
    foreach: [{cells}]
    do:
      cmd: python cell.py ${{item}}
      deps: [cell.py]
      outs: ["out/${{item}}"]
"""

CELL = """
import contextlib, os, sys, time
from pathlib import Path
from components.tracking.journal import Run
from components.tracking.stage_run import stage_run
from components.config.load import load_settings
cell = sys.argv[1]
runtime = load_settings().runtime
tracked = stage_run("distill", cell, runtime=runtime, params={"cell": cell}) if "TRACKED" in os.environ else None
with tracked or contextlib.nullcontext(Run(None)) as run:
    until = time.monotonic() + SECONDS
    step = 0
    while (left := until - time.monotonic()) > 0:
        run.metrics({"loss/total": 1 / (1 + step), "loss/sft": 0.5}, step=step)
        step += 1
        time.sleep(min(left, 1 / POINTS))
Path("out").mkdir(exist_ok=True)
Path("out", cell).write_text(cell)
"""


def create_project(folder: Path, cells: int, seconds: float) -> None:
    """Create a DVC project with that many cells."""
    shutil.copytree(ROOT / "params", folder / "params")
    (folder / "dvc.yaml").write_text(PIPELINE.format(cells=", ".join(f"c{i}" for i in range(cells))))
    cell = CELL.replace("SECONDS", str(seconds)).replace("POINTS", str(POINTS_PER_S)).replace("TRACKED", TRACKED)
    (folder / "cell.py").write_text(cell)
    (folder / ".gitignore").write_text(".runs/\n.mlflow/\n.servers/\nout/\n")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def clear_outputs(folder: Path) -> None:
    """Remove outputs, lock and DVC's run cache."""
    for path in ("out", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(folder / path, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)


def run(cells: int = CELLS, seconds: float = SECONDS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        create_project(folder, cells, seconds)
        bin_dir = os.path.dirname(sys.executable)  # noqa: PTH120  (resolving the link would leave the virtual environment)
        base_env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
        base_env |= {"ALIGNTI_TRACKING_URI": JOURNAL_ONLY, "DVC_NO_ANALYTICS": "1"}

        def call(environment: Mapping[str, str], *args: str) -> None:
            process = subprocess.run([sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(f"{' '.join(args)} failed:\n{(process.stdout + process.stderr)[-3000:]}")

        def one_by_one(*args: str) -> None:
            for cell in tqdm(range(cells), desc=args[-1], unit="cell"):
                call(base_env, *(word.format(cell) for word in args))

        servers.up(ports=PORTS)
        try:
            tracking_env = servers.client_environment()
            flow_env = base_env | tracking_env | {TRACKED: "1"}
            works: dict[str, Callable[[], None]] = {
                "bare": lambda: one_by_one("cell.py", "c{}"),
                "dvc repro": lambda: call(base_env, "-m", "dvc", "repro"),
                "dvc repro per cell": lambda: one_by_one("-m", "dvc", "--wait-for-lock", "repro", "--single-item", "cell@c{}"),
                "flow, DVC, tracking": lambda: call(flow_env, "-m", "flows.pipeline"),
            }
            arms = {}
            for arm, work in works.items():
                clear_outputs(folder)
                arms[arm] = measure.children_cost(work) | {"load": os.getloadavg()[1]}  # over 5 minutes
            logged_runs = runs_in_mlflow(tracking_env["ALIGNTI_TRACKING_URI"])
        finally:
            servers.down()
    work_s = arms["bare"]["seconds"]
    dvc_arm, flow_arm = arms["dvc repro per cell"], arms["flow, DVC, tracking"]
    about = (
        f"{cells} cells that sleep {seconds:g} s and log {POINTS_PER_S} points a second, one at a time; {logged_runs} of them"
        " arrived in MLflow; load of the machine at the end of each in the last column"
    )
    return {
        **measure.result("orchestration", f"{cells} cells of {seconds:g} s", about, measure.prepare()),
        "clock": "wall time",
        "arms": arms,
        "ratios": {
            "orchestration_dvc": (dvc_arm["seconds"] - work_s) / work_s,
            "orchestration_beyond_dvc": (flow_arm["seconds"] - dvc_arm["seconds"]) / work_s,
            "orchestration_beyond_dvc_cpu": (flow_arm["cpu_seconds"] - dvc_arm["cpu_seconds"]) / work_s,
        },
    }


def runs_in_mlflow(address: str) -> int:
    client = mlflow_client.client(address)
    return len(client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.stage = 'distill'"))


def main() -> None:
    parser = table.arguments("orchestration", __doc__)
    parser.add_argument("--cells", type=int, default=CELLS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each cell")
    args = parser.parse_args()
    target = args.json.resolve() if args.json else None
    print(table.report(run(args.cells, args.seconds), target))


if __name__ == "__main__":
    main()
