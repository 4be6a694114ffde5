"""Secrets planted where a user may have some, markup in data, and pages elsewhere that talk to the servers.

No part of a secret may be in a run's files or output; nothing of the data may run on a page; a request from another
origin, or under another name of this machine, changes and reads nothing.
"""

from __future__ import annotations

import contextlib
import html.parser
import http.client
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows import servers
from tests import planted
from tests.campaign.kills import COMMANDS, DVC, Baseline, execute, run, some_stages
from tests.campaign.stored import run_forked

CLI = [sys.executable, "-m", "components.cli"]
PRINTING = ("plan", "check", "arms", "runs", "sync", "samples", "leaderboard", "doctor", "status", "export align_ti exported")
MARKUP = (
    "<script>ran()</script>",
    "<img src=x onerror=ran()>",
    '"><b onclick=ran()>',
    "{{ 77777 * 99991 }}",
    "</pre><script>ran()//",
)
PAGES = {
    "components.cli samples": ("artifacts/scores", "artifacts/dataset"),
    "components.cli leaderboard": ("artifacts/scores", "reports"),
    "components.cli preview": ("artifacts/dataset",),
    "components.evaluate.compare": ("artifacts/scores", "artifacts/teacher", "artifacts/irs", "artifacts/students"),
}
EVIL = "http://evil.example"
WRITES = {
    "mlflow": ["/api/2.0/mlflow/experiments/create", "/ajax-api/2.0/mlflow/experiments/create"],
    "prefect": ["/api/flows/", "/api/deployments/", "/api/block_types/", "/api/work_pools/"],
}
READS = {
    "mlflow": ["/api/2.0/mlflow/experiments/search?max_results=1", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"],
    "prefect": ["/api/csrf-token?client=x", "/api/admin/version", "/ui-settings"],
}


def secret(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """In the environment, in addresses of the tracker, of git's and DVC's remotes, and in params."""
    rng = random.Random(seed)
    stages = some_stages(baseline, rng)
    baseline.copy_without(stages, cwd)
    tracker = f"http://user:{planted.CANARY}-tracker@127.0.0.1:9/"
    run(["git", "remote", "set-url", "origin", f"https://user:{planted.CANARY}-git@127.0.0.1:9/x.git"], cwd)
    run([*DVC, "remote", "add", "--local", "pool", planted.REMOTE], cwd)
    runtime = cwd / "params/runtime.yaml"
    in_params = rng.random() < 0.5
    if in_params:
        runtime.write_text(yaml.safe_dump(yaml.safe_load(runtime.read_text()) | {"tracking_uri": tracker}))
    environment = planted.SECRETS | ({} if in_params else {"ALIGNTI_TRACKING_URI": tracker})
    command = rng.choice([COMMANDS["dvc repro"], COMMANDS["make repro"], [*CLI, *rng.choice(PRINTING).split()]])
    result = execute(command, cwd, environment)
    where = "params" if in_params else "environment"
    did = f"{' '.join(command[2:])} ({' and '.join(stages)}), {where}, exit code {result.returncode}"
    if planted.CANARY in (output := result.stdout + result.stderr):
        return did, f"said: {[line for line in output.splitlines() if planted.CANARY in line][:3]}"
    leaks = [
        path
        for path in planted.leaks(cwd, (".git/config", ".dvc/config.local", "params/runtime.yaml"))
        if not path.startswith("tests/")  # this code, which spells the secrets
    ]
    return did, f"written to {leaks[:5]}" if leaks else None


def markup(baseline: Baseline, seed: str, cwd: Path) -> tuple[str, str | None]:
    """HTML and templates in the texts that pages are made of."""
    rng = random.Random(seed)
    command = rng.choice(sorted(PAGES))
    baseline.copy_without([], cwd)
    files = sorted(f for root in PAGES[command] for f in (cwd / root).rglob("*.json*") if f.is_file())
    changed = rng.sample(files, min(len(files), rng.choice([1, 1, 3])))
    for file in changed:
        _mark(file, rng)
    code, output = run_forked(["-m", *command.split()], cwd)
    did = f"{command} after markup in {', '.join(str(f.relative_to(cwd)) for f in changed)}, exit code {code}"
    if code not in ("0", "2"):
        return did, " ".join(output.split())[-700:]
    for page in (cwd / "reports").rglob("*.html"):
        parser = _Scripts()
        parser.feed(text := page.read_text())
        if parser.code or "7777000007" in text:
            return did, f"{page.name}: {parser.code[:3] or 'a template was filled in'}"
    return did, None


class _Scripts(html.parser.HTMLParser):
    """A parser that collects the code of a page that came from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.code: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script"
        self.code += [f"<{tag} {name}={value}>" for name, value in attrs if name.startswith("on") and "ran()" in (value or "")]

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip().startswith("ran()"):
            self.code.append(f"<script>{data[:50]}")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False


def _mark(file: Path, rng: random.Random) -> None:
    """Markup after some of the texts of a JSON file, or of each of its lines."""

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(inside) for key, inside in value.items()}
        if isinstance(value, list):
            return [marked(inside) for inside in value]
        return value + rng.choice(MARKUP) if isinstance(value, str) and rng.random() < share else value

    share = rng.choice([0.05, 0.3])
    with contextlib.suppress(ValueError):
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(marked(json.loads(line))) + "\n" for line in file.read_text().splitlines()))
        else:
            file.write_text(json.dumps(marked(json.loads(file.read_text()))))


@contextlib.contextmanager
def up(folder: Path) -> Iterator[dict[str, servers.Server]]:
    """The two servers as `alignti up` starts them."""
    folder.mkdir()
    ports = {"mlflow": 30000 + os.getpid() % 10000, "prefect": 30001 + os.getpid() % 10000}
    command = [*CLI, "up", "--mlflow-port", str(ports["mlflow"]), "--prefect-port", str(ports["prefect"])]
    (folder / "params").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        with contextlib.chdir(folder):
            yield {server.name: server for server in servers.started()}
    finally:
        subprocess.run([*CLI, "down"], cwd=folder, env=environment, check=True, capture_output=True)


def stranger(running: dict[str, servers.Server], seed: str, _cwd: Path) -> tuple[str, str | None]:
    """A request as a page of another origin, or one whose host name was rebound to this machine, sends it."""
    rng = random.Random(seed)
    server = running[rng.choice(sorted(running))]
    writes = rng.random() < 0.6
    path = rng.choice((WRITES if writes else READS)[server.name])
    rebound = rng.random() < 0.5
    kind = rng.choice(["application/json", "text/plain", "application/x-www-form-urlencoded"])
    host = f"{server.host}:{server.port}"
    sent = {"Host": f"evil.example:{server.port}" if rebound else host, "Origin": EVIL, "Content-Type": kind}
    if rebound:
        sent["Origin"] = f"{EVIL}:{server.port}"
    name = f"stranger-{rng.randrange(10**9)}"
    if server.name == "prefect" and rebound and writes:  # such a page may read, and so have a token
        _, _, token = _call(server, "GET", "/api/csrf-token?client=stranger", {"Host": sent["Host"]})
        with contextlib.suppress(ValueError):
            sent |= {"Prefect-Csrf-Token": json.loads(token)["token"], "Prefect-Csrf-Client": "stranger"}
    status, headers, _ = _call(server, "POST" if writes else "GET", path, sent, json.dumps({"name": name}) if writes else None)
    did = f"{server.name}: {'POST' if writes else 'GET'} {path} as {kind} from {sent['Origin']} to {sent['Host']}: {status}"
    allowed = headers.get("access-control-allow-origin")
    if writes and status < 400:
        return did, "it was taken"
    if (rebound and status < 400) or allowed in ("*", sent["Origin"]):
        return did, f"it may read the answer ({allowed})"
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    open_to = {c.laddr.ip for proc in family for c in proc.net_connections() if c.status == psutil.CONN_LISTEN} - {"127.0.0.1"}
    return did, f"listens on {open_to}" if open_to else None


def _call(
    server: servers.Server, method: str, path: str, headers: dict[str, str], body: str | None = None
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode(errors="replace")
