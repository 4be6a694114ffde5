"""The whole pipeline, every stage real, on the recipe `smoke`: through `dvc repro` and through the Prefect flow.

The tests of this file go on from one another, in order: each changes the workspace that the first one made.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from components.config import recipes
from tests.planted import CANARY, REMOTE, SECRETS, leaks

ROOT = Path(__file__).parents[2]
STAGES = {
    "prepare",
    "check_rows",
    "obtain_models",
    "select_teacher",
    "search_layer",
    "cache_teacher",
    "write_answers",
    "terms",
    *(f"{stage}@{arm}" for stage in ("distill", "evaluate") for arm in ("sft", "align_ti")),
    "evaluate_teacher",
    "compare",
}


def call(root: Path, *command: str) -> str:
    """Its output. Fails with it, too."""
    environment = {**os.environ, **SECRETS, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert CANARY not in done.stdout
    return done.stdout


def dvc(root: Path, *words: str) -> str:
    return call(root, sys.executable, "-m", "dvc", *words)


def processor_time() -> float:
    """Seconds, of all processes that were waited for: what a repro takes on an idle machine, on a busy one too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ran(output: str) -> set[str]:
    return set(re.findall(r"^Running stage '(.+)':", output, re.MULTILINE))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds, with the recipe `smoke` in use and its data pulled."""
    root = tmp_path_factory.mktemp("clone")
    for name in call(ROOT, "git", "ls-files", "-z", "--cached").split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    call(root, "git", "init", "--quiet")
    recipes.use("smoke", root)
    dvc(root, "pull", "--quiet", "data.dvc")
    dvc(root, "remote", "add", "--quiet", "--local", "theirs", REMOTE)
    return root


@pytest.fixture(scope="module")
def done(workspace: Path) -> Path:
    """The workspace after `dvc repro`."""
    assert ran(dvc(workspace, "--wait-for-lock", "repro")) == STAGES
    return workspace


def test_the_report_holds_what_it_must(done: Path) -> None:
    compared = json.loads((done / "reports/compare.json").read_text())
    assert 0 <= compared["teacher"]["exact_match"] <= 1
    assert set(compared["arms"]) == {"sft", "align_ti"}
    for arm in compared["arms"].values():
        low, high = arm["ci95"]
        assert 0 <= low <= arm["exact_match"] <= high <= 1
        assert arm["train_seconds"] > 0
    report = (done / "reports/report.html").read_text()
    assert "align_ti" in report
    beside = set(re.findall(r'(?:src|href)="(?!data:|#|https?://)([^"]*)', report))
    assert beside <= {"samples.html", "controls.html", "leaderboard.html"}, "links to pages of their own, and no file it needs"
    with Image.open(done / "reports/irs/curve.png") as curve:
        curve.verify()


def test_all_stages_are_tracked_under_one_parent(done: Path) -> None:
    starts = [json.loads(journal.open().readline()) for journal in (done / ".runs/journal").glob("*.jsonl")]
    tracked = STAGES - {"terms"}  # it hashes files, and has nothing to tell
    assert {start["tags"]["DVC_STAGE"] for start in starts} == tracked
    outcomes = [start["name"] for start in starts if start["tags"]["stage"] == "arm"]
    assert sorted(outcomes) == ["align_ti", "sft"], "what stands, under no parent"
    assert len({start["parent"]["id"] for start in starts if start["parent"]}) == 1
    assert len([start for start in starts if not start["parent"]]) == len(outcomes)
    assert {path.stem for path in (done / ".runs/last").glob("*.json")} == tracked


def test_a_second_repro_runs_nothing_soon(done: Path) -> None:
    began = processor_time()
    output = dvc(done, "--wait-for-lock", "repro")
    assert ran(output) == set()
    assert "Data and pipelines are up to date." in output
    assert processor_time() - began < 10


def test_dvc_shows_metrics_and_plots(done: Path) -> None:
    metrics = json.loads(dvc(done, "metrics", "show", "--json"))[""]["data"]
    assert list(metrics) == ["reports/metrics.json"] and "exact_match" in metrics["reports/metrics.json"]["data"]["teacher"]
    plots = json.loads(dvc(done, "plots", "show", "--json"))["data"]
    assert plots["reports/scores.csv"] and plots["reports/losses.csv"]
    assert plots["reports/irs/curve.json"]
    assert any(name.endswith("losses.png") for name in plots)


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_runs_what_repro_left_to_do_and_leaves_it_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import dvc, dvc_repro
    from flows.pipeline import pipeline

    monkeypatch.chdir(done)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    study = done / "params/study.yaml"
    study.write_text(study.read_text().replace("iva: 1.0, tpa: 1.0", "iva: 0.5, tpa: 1.0"))
    changed = {"terms", "distill@align_ti", "evaluate@align_ti", "compare"}
    assert pipeline(parallel=2) == {stage: "ran" if stage in changed else "unchanged" for stage in STAGES}
    assert dvc_repro.reproduce_all() == "unchanged"
    assert dvc.status() == {}


def test_no_secret_of_the_environment_was_written_by_repro_or_flow(done: Path) -> None:
    """Journals, checkpoints, artifacts, reports, dvc.lock, DVC's cache; tests/flows/test_finished_study.py has the servers."""
    assert (done / ".dvc/config.local").read_text().count(CANARY) == 1
    assert leaks(done, but=(".dvc/config.local",)) == []
