"""A finished study on real servers: what a person sees of it in a real browser, and that no secret was written anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.tracking import mlflow_client, outcome
from flows import servers
from tests.browser import CHROMIUM, MISSING, Page, browser
from tests.flows.conftest import ROOT, lay_out
from tests.flows.test_servers import free_port
from tests.flows.test_study import STAGE, commit
from tests.planted import CANARY, REMOTE, SECRETS, leaks

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
ARMS = ("tpa0-seed1", "tpa1-seed1")
SCORED = STAGE.replace('"exact_match": 0.5', '"exact_match": 0.75 if "tpa1" in arm[0] else 0.5')


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Real servers that hold a study of two arms, run as `alignti study run` does; its MLflow runs by name."""
    cwd = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.delenv("ALIGNTI_TRACKING_URI")
        lay_out(cwd)
        commit(SCORED)
        Path(".dvc/config.local").write_text(f"['remote \"theirs\"']\n    url = {REMOTE}\n")
        servers.up(ports={"mlflow": free_port(), "prefect": free_port()})
        try:
            command = [sys.executable, "-m", "components.cli", "study", "run", "mine"]
            with_login = servers.running("mlflow").url.replace("//", f"//user:{CANARY}-tracking@")
            environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT), "ALIGNTI_TRACKING_URI": with_login}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
            (cwd / "said.log").write_text(result.stdout + result.stderr)
            client = mlflow_client.client(servers.running("mlflow").url)
            experiment = client.get_experiment_by_name("align-ti").experiment_id
            runs = client.search_runs([experiment])
            yield {"experiment": experiment, **{run.info.run_name: run.info.run_id for run in runs}}
        finally:
            servers.down()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as tab:
        yield tab


@in_a_browser
def test_the_flow_run_page_shows_the_arms_and_what_became_of_them(finished: dict[str, str], page: Page) -> None:
    page.open(f"{servers.running('prefect').url}/runs")
    page.wait_for("alignti-study")
    page.open(page.evaluate("document.querySelector('a[href*=\"/flow-run/\"]').href"))
    page.wait_for("Completed", "alignti-study")
    page.click("Task Runs")
    page.wait_for("first", *ARMS)
    page.click("Artifacts")
    page.wait_for("arms-progress", "2 of 2 arms done", "mlflow-run")


@in_a_browser
def test_the_comparison_page_draws_the_arms_and_lists_their_artifacts(finished: dict[str, str], page: Page) -> None:
    mlflow, experiment = servers.running("mlflow").url, finished["experiment"]
    page.open(outcome.page(mlflow, [finished[arm] for arm in ARMS], experiment))
    _shows_weights_against_score(page)
    page.open(f"{mlflow}/#/experiments/{experiment}/runs/{finished[ARMS[1]]}/artifacts")
    page.wait_for(ARMS[1], "predictions.jsonl", "scores.json")


@in_a_browser
def test_three_clicks_lead_from_the_experiments_page_to_weights_against_score(finished: dict[str, str], page: Page) -> None:
    page.open(f"{servers.running('mlflow').page}".replace("experiments", f"experiments/{finished['experiment']}"))
    page.wait_for(*ARMS, "study-mine", 'tags.stage = "arm"')
    page.evaluate("document.querySelector('input[aria-label=\"Select all runs\"]').click()")
    above = "[...document.querySelectorAll('.ag-row')].find(row => row.innerText.includes('study-mine'))"
    page.evaluate(f"{above}.querySelector('input[type=checkbox]').click()")
    page.click("Compare", among="button")
    _shows_weights_against_score(page)


def _shows_weights_against_score(page: Page) -> None:
    page.wait_for("Comparing 2 Runs", "Parallel Coordinates Plot", *ARMS, "weights.tpa", "exact_match", "0.75")
    page.wait_until("document.querySelectorAll('.js-plotly-plot .parcoords').length > 0")


def test_no_secret_is_in_any_log_database_journal_or_artifact(finished: dict[str, str]) -> None:
    """The servers' logs and databases too, and the address of MLflow held a password: the page links to it without."""
    cwd = Path.cwd()
    assert (cwd / ".mlflow/mlflow.db").exists() and list((cwd / ".servers").rglob("prefect.db"))
    assert list((cwd / ".runs/journal").glob("*.sent")) and (cwd / "said.log").exists()
    assert leaks(cwd, but=(".dvc/config.local",)) == []
