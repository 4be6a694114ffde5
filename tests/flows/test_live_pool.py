"""A Prefect server, workers, DVC and a training as they are, killed and cancelled in turn; then `alignti doctor`.

The training counts, a checkpoint each step, and what it makes is a hash over all its steps: the same for every way there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelling

from components.errors import AlignTIError
from flows import cleanup_stale_runs, dvc_repro, pool, server_setup, servers
from flows.study import study
from tests.flows import test_study as study_of
from tests.flows.conftest import ROOT, git, ran
from tests.flows.test_servers import free_port

pytestmark = pytest.mark.live

STEPS = 8
ON = STEPS + 1
PATIENCE_S = 120

TRAINER = (
    f"STEPS = {STEPS}"
    + """
import hashlib, os, time
from pathlib import Path
from components.errors import Interrupted
from components.process import exit_from
here = Path(".runs").resolve()  # of the clone, wherever this workspace is
def main():
    state = here / "step"
    step, digest = state.read_text().split() if state.exists() else ("0", "")
    (here / "log").open("a").write(f"from {step}\\n")
    (here / "trainer.pid").write_text(str(os.getpid()))
    try:
        for step in range(int(step) + 1, STEPS + 1):
            digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
            save(state, f"{step} {digest}")
            while step >= int((here / "goal").read_text()):
                time.sleep(0.02)
    except Interrupted:
        (here / "log").open("a").write("interrupted\\n")
        raise
    Path("out").mkdir(exist_ok=True)
    Path("out/student").write_text(digest)
    state.unlink()
def save(path, text):
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)
exit_from(main)
"""
)
PIPELINE = """
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    outs: [out/student]
"""


def expected_digest() -> str:
    digest = ""
    for step in range(1, STEPS + 1):
        digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
    return digest


class Clone:
    """A git clone with a stage that trains, and the files in which the training records its progress."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / ".runs"
        (folder / "dvc.yaml").write_text(PIPELINE)
        (folder / "train.py").write_text(TRAINER)
        (folder / ".gitignore").write_text(".runs\n.mlflow\n.servers\nout\n.dvc/tmp\n.dvc/cache\n.dvc/config.local\n")
        (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
        git("init", "--quiet")
        git("add", "--all")
        git("commit", "--quiet", "-m", "a stage")
        self.runs.mkdir()
        self.let(ON)

    def let(self, goal: int) -> None:
        """The training may go on to step `goal`, and waits there."""
        _write(self.runs / "goal", str(goal))

    def step(self) -> int:
        state = self.runs / "step"
        return int(state.read_text().split()[0]) if state.exists() else 0

    def training(self, step: int) -> psutil.Process:
        """The process that trains, once it has reached `step`."""
        until(lambda: self.step() == step and (self.runs / "trainer.pid").exists())
        return psutil.Process(int((self.runs / "trainer.pid").read_text()))

    def log(self) -> list[str]:
        return (self.runs / "log").read_text().splitlines()


def _write(path: Path, text: str) -> None:
    """At once: a training reads it meanwhile."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


@pytest.fixture
def clone(project: Path) -> Clone:
    return Clone(project)


def until(condition: Callable[[], object]) -> None:
    """Poll; a timeout names the last value."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain; last seen: {value!r}"
        time.sleep(0.1)


def have_ended(*processes: psutil.Process) -> bool:
    return not any(servers._is_alive(process) for process in processes)


def ancestors(training: psutil.Process) -> tuple[psutil.Process, psutil.Process]:
    """The DVC that runs it, and the flow that runs that."""
    above = next(parent for parent in training.parents() if "dvc" in parent.cmdline())
    flow = above.parent()
    assert flow is not None
    return above, flow


@pytest.mark.parametrize("victim", ["trainer", "dvc"])
def test_after_kill_9_the_next_run_goes_on_to_the_same_hash(clone: Clone, victim: str) -> None:
    code = "from flows import dvc_repro; dvc_repro.reproduce('train')"
    clone.let(3)
    flow = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    training = clone.training(step=3)
    above, _ = ancestors(training)
    (training if victim == "trainer" else above).kill()
    assert flow.wait(PATIENCE_S) != 0  # it says so,
    until(lambda: have_ended(training, above))  # and no other is left
    assert clone.step() == 3
    clone.let(ON)
    assert dvc_repro.reproduce("train", {"PYTHONPATH": str(ROOT)}) == "ran"
    assert clone.log() == ["from 0", *(["interrupted"] if victim == "dvc" else []), "from 3"]
    assert Path("out/student").read_text() == expected_digest()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server with our pools and deployments; yields the environment of its clients."""
    home, original, environment = tmp_path_factory.mktemp("server"), Path.cwd(), dict(os.environ)
    os.chdir(home)
    # The night's limit of one run at a time, on the pipeline alone: no champion is needed here. Without its schedule, which at
    # 2:00 starts a run beside these.
    night = (ROOT / "prefect.yaml").read_text().replace("flows.nightly.nightly", "flows.pipeline.pipeline")
    night = night.replace("active: true", "active: false")
    (home / "prefect.yaml").write_text(night)
    prefect = servers._start("prefect", "127.0.0.1", free_port(), server_setup.databases(None)["prefect"], None)
    talk = {"PREFECT_API_URL": f"{prefect.url}/api", "PREFECT_HOME": str(home / "prefect-home"), "PYTHONPATH": str(ROOT)}
    patch = pytest.MonkeyPatch()
    patch.setattr(servers, "client_environment", lambda: talk)
    try:
        servers._wait(prefect)
        # No log to the server from here: it would be sent on, in vain and for a minute, once the server is gone.
        with temporary_settings({PREFECT_API_URL: talk["PREFECT_API_URL"], PREFECT_LOGGING_TO_API_ENABLED: False}):
            list(pool.deploy(at_once=2))
            os.chdir(original)
            yield talk
    finally:
        os.chdir(home)
        servers._stop(prefect)
        patch.undo()
        os.chdir(original)
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def client(server: dict[str, str]) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as api:
        yield api


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def worker(server: dict[str, str]) -> Iterator[Start]:
    """Starts a worker of this clone, or another; those that still live are stopped at the end, and end by themselves."""
    started: list[subprocess.Popen[bytes]] = []
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script

    def start(clone: Path | None = None) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **server, "PREFECT_WORKER_QUERY_SECONDS": "1", pool.ROOT: str(clone or Path.cwd())}
        started.append(pool._start("cpu", str(len(started)), 1, environment))
        return started[-1]

    try:
        yield start
        living = [process for process in started if process.poll() is None]
        pool._stop(started)
        assert [process.returncode for process in living] == [0] * len(living)  # -9: the signal was ignored
    finally:
        signal.signal(signal.SIGINT, handler)


def submit(client: SyncPrefectClient, deployment: str = "nightly") -> UUID:
    target = client.read_deployment_by_name(f"alignti-pipeline/{deployment}")
    return client.create_flow_run_from_deployment(target.id, parameters={"own_workspace": True}).id


def state(client: SyncPrefectClient, run: UUID) -> str:
    flow_run: FlowRun = client.read_flow_run(run)
    assert flow_run.state is not None
    return flow_run.state.name


def slots(client: SyncPrefectClient, deployment: str = "nightly") -> int:
    limit = client.read_deployment_by_name(f"alignti-pipeline/{deployment}").global_concurrency_limit
    assert limit is not None
    return limit.active_slots


@pytest.mark.timeout(900)
def test_whatever_ends_a_run_leaves_its_checkpoint_and_no_process_and_no_slot(
    clone: Clone, worker: Start, client: SyncPrefectClient
) -> None:
    # kill -9 of the worker: flow, DVC and training end, the run says so, and its slot is free
    clone.let(2)
    killed, run = worker(), submit(client)
    training = clone.training(step=2)
    above, flow = ancestors(training)
    assert state(client, run) == "Running" and slots(client) == 1
    killed.kill()
    until(lambda: have_ended(training, above, flow))
    until(lambda: slots(client) == 0)
    assert state(client, run) == "Crashed"
    assert clone.step() == 2 and clone.log() == ["from 0", "interrupted"]

    # kill -9 of worker and flow at once: nobody is left to tell the server, until the doctor comes
    clone.let(4)
    killed, run = worker(), submit(client)
    training = clone.training(step=4)
    above, flow = ancestors(training)
    assert flow.ppid() == killed.pid
    killed.kill()
    flow.kill()
    until(lambda: have_ended(training, above, flow))
    assert state(client, run) == "Running" and slots(client) == 1
    name = client.read_flow_run(run).name
    assert [leak.what for leak in cleanup_stale_runs.leaks()] == [
        f"flow run {name} says Running, but its process is gone: its slot of pool cpu, queue default",
        f"worktree .runs/workspaces/{name} of a run that died",
    ]
    assert len(list(cleanup_stale_runs.free())) == 2
    assert state(client, run) == "Crashed" and slots(client) == 0 and cleanup_stale_runs.leaks() == []
    assert clone.log()[2:] == ["from 2", "interrupted"]

    # a run that lives is none of the doctor's business; cancelled as the UI does it, it ends whole
    clone.let(6)
    worker()
    run = submit(client)
    training = clone.training(step=6)
    above, flow = ancestors(training)
    assert list(cleanup_stale_runs.free()) == [] and state(client, run) == "Running" and slots(client) == 1
    client.set_flow_run_state(run, Cancelling())
    until(lambda: state(client, run) == "Cancelled" and slots(client) == 0)
    until(lambda: have_ended(training, above, flow))
    assert clone.log()[4:] == ["from 4", "interrupted"]

    # and the next makes what an undisturbed one makes
    clone.let(ON)
    run = submit(client)
    until(lambda: state(client, run) == "Completed")
    assert clone.log()[6:] == ["from 6"]
    assert dvc_repro.reproduce("train") == "restored"  # from the cache that the clone shares with its workspaces
    assert Path("out/student").read_text() == expected_digest()
    assert cleanup_stale_runs.leaks() == []

    # a slot that the server counts and no run holds, as after a restart of the server
    limit = client.read_deployment_by_name("alignti-pipeline/nightly").global_concurrency_limit
    assert limit is not None
    client.increment_concurrency_slots([limit.name], 1, "concurrency")
    assert list(cleanup_stale_runs.free()) == ["1 slot(s) of deployment nightly that no run holds"]
    assert slots(client) == 0


MEETING = """
from time import sleep
if stage == "distill":  # until another arm's has begun too: two are trained at once, or this waits in vain
    meeting = Path(MEETING)
    (meeting / name).touch()
    while len(list(meeting.iterdir())) < 2:
        sleep(0.05)
"""


@pytest.mark.timeout(900)
def test_two_clones_share_out_a_study_and_do_again_only_what_is_missing(
    project: Path, tmp_path_factory: pytest.TempPathFactory, worker: Start
) -> None:
    meeting, remote, other = (tmp_path_factory.mktemp(name) for name in ("meeting", "remote", "other"))
    study_of.commit(study_of.STAGE)
    code = (project / "stage.py").read_text()
    head, mark, tail = code.partition('if stage == "first"')
    (project / "stage.py").write_text(head + MEETING.replace("MEETING", repr(str(meeting))) + mark + tail)
    study_of.declare(grid={"weights.tpa": [0.0, 0.5, 1.0], "seed": [1]})
    git("clone", "--quiet", str(project), str(other))
    for clone in (project, other):  # what the one makes, the other has of the remote: each has a cache of its own
        (clone / ".dvc/config.local").write_text(f"['remote \"pool\"']\n    url = {remote}\n")
        (clone / "fail-distill-tpa1-seed1").touch()
        worker(clone)
    git("commit", "--quiet", "--allow-empty", "-m", "the other clone has yet to fetch this")

    with pytest.raises(AlignTIError, match=r"1 of 3 arms of study mine are missing(.|\n)*tpa1-seed1: .*exit code 2"):
        study("mine", over_pool=True)
    assert study_of.records().keys() == {"tpa0-seed1", "tpa0_5-seed1"}
    done = [*ran(project), *ran(other)]
    assert sorted(done) == [
        "distill-tpa0-seed1",
        "distill-tpa0_5-seed1",
        "distill-tpa1-seed1",
        "evaluate-tpa0-seed1",
        "evaluate-tpa0_5-seed1",
        "first",
    ]

    for clone in (project, other):
        (clone / "fail-distill-tpa1-seed1").unlink()
    assert study("mine", over_pool=True) == {"tpa0-seed1": "restored", "tpa0_5-seed1": "restored", "tpa1-seed1": "ran"}
    assert sorted([*ran(project), *ran(other)]) == ["compare", "distill-tpa1-seed1", "evaluate-tpa1-seed1"]
    assert [left for clone in (project, other) for left in (clone / ".runs/workspaces").iterdir()] == []


GATE = """
from os import getpid
from time import sleep
if stage == "distill":
    (main / "training.pid").write_text(str(getpid()))
    sleep(600)
"""


@pytest.mark.timeout(900)
def test_a_killed_study_leaves_its_arms_to_the_next_and_a_cancelled_one_takes_them_along(
    project: Path, server: dict[str, str], worker: Start, client: SyncPrefectClient
) -> None:
    head, mark, tail = study_of.STAGE.partition('if stage == "first"')
    study_of.commit(head + GATE + mark + tail)
    study_of.declare(grid={"weights.tpa": [0.0, 1.0], "seed": [7]})  # arms that no other test orders of this server
    arms = ["tpa0-seed7", "tpa1-seed7"]

    def start() -> subprocess.Popen[str]:
        code = "from components.process import exit_from; from flows.study import study"
        code += "; exit_from(lambda: study('mine', over_pool=True))"
        command, environment = [sys.executable, "-u", "-c", code], {**os.environ, **server}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ordered() -> list[str]:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(any_=[f"mine/{arm}" for arm in arms]))
        )
        return sorted(run.state_name or "" for run in runs)

    worker()
    killed = start()
    until(lambda: (project / "training.pid").exists())  # one arm is trained; the other waits for the worker
    training = psutil.Process(int((project / "training.pid").read_text()))
    until(lambda: len(ordered()) == 2)
    killed.kill()
    killed.wait()

    again = start()
    assert again.stdout is not None
    for _ in arms:  # it says of each arm that it waits for what was ordered before; if it never does, its output ends
        assert any("ordered before" in line for line in again.stdout)
    assert not have_ended(training) and len(ordered()) == 2  # it ordered none again
    again.terminate()
    again.communicate(timeout=PATIENCE_S)
    assert again.returncode != 0
    until(lambda: have_ended(training))
    until(lambda: ordered() == ["Cancelled", "Cancelled"])

    freed = list(cleanup_stale_runs.free())
    assert [line for line in freed if "says Running, but its process is gone" in line] == freed  # the killed study itself
    assert cleanup_stale_runs.leaks() == [] and list((project / ".runs/workspaces").iterdir()) == []
