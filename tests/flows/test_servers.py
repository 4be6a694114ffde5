"""The servers themselves: a pair of real ones for the session, and what is refused before any is started."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.exceptions import ObjectNotFound

from components.errors import InputError, TryAgainError
from flows import server_setup, servers
from flows.servers import Server

pytestmark = pytest.mark.live


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(servers.AUTH, raising=False)
    return tmp_path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box"])
def test_an_address_that_lets_others_in_is_refused_without_a_password(cwd: Path, host: str) -> None:
    with pytest.raises(InputError, match="ALIGNTI_SERVER_AUTH=user:password"):
        servers.up(host)
    assert not (cwd / ".servers").exists()


@pytest.mark.parametrize("weak", ["nobody", "user:short", ":a-long-enough-password"])
def test_a_weak_password_is_refused(cwd: Path, weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.AUTH, weak)
    with pytest.raises(InputError, match="12 or more characters"):
        servers.up("0.0.0.0")


def test_mlflow_with_a_password_answers_to_any_name_and_to_its_own_pages(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it answers 403 to `http://gpu-box:5000`, and to the requests of its own pages at any but loopback."""
    monkeypatch.setattr(server_setup, "find_spec", lambda name: name)  # its extra `auth`

    def allowed(auth: str | None) -> list[str | None]:
        environment = server_setup.mlflow("0.0.0.0", 5000, "postgresql+psycopg2://nowhere/alignti_mlflow", auth)[1]
        return [environment.get(name) for name in ("MLFLOW_SERVER_ALLOWED_HOSTS", server_setup.ORIGINS)]

    assert allowed(None) == [None, None]
    hosts, origins = allowed("user:a-long-password")
    assert hosts == "*" and origins is not None
    assert {f"http://{socket.gethostname()}:5000", "http://127.0.0.1:5000"} <= set(origins.split(","))
    assert "*" not in origins  # a page of another origin would write with the login that a browser keeps
    monkeypatch.setenv(server_setup.ORIGINS, "https://mlflow.lab")
    assert allowed("user:a-long-password") == ["*", "https://mlflow.lab"]


def test_a_taken_port_is_refused_by_name_and_holder(cwd: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"mlflow cannot listen on 127.0.0.1:{taken}.*--mlflow-port"):
            servers.up(ports={"mlflow": taken, "prefect": 1})
    assert servers.started() == []


def test_of_two_that_start_them_at_once_one_does(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def start(name: servers.Name, host: str, port: int, *_: object) -> Server:
        begun.append(name)
        time.sleep(0.2)
        server = Server(name, os.getpid(), psutil.Process().create_time(), host, port)
        (servers.HOME / f"{name}.pid").write_text(json.dumps(server.__dict__))
        return server

    for name, stub in {"_start": start, "_wait": lambda _: None, "_check_port_free": lambda *_: None}.items():
        monkeypatch.setattr(servers, name, stub)
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(lambda _: servers.up(), range(2))
    assert begun == list(servers.NAMES)
    assert first == second


def test_two_servers_on_one_port_are_refused(cwd: Path) -> None:
    port = free_port()
    with pytest.raises(InputError, match=f"both servers would listen on port {port}"):
        servers.up(ports={"mlflow": port, "prefect": port})


@pytest.mark.parametrize("url", ["mysql://u@h/", "postgresql://u:p@h:5432/one", "sqlite:///x.db"])
def test_postgres_wants_a_server_not_a_database(cwd: Path, url: str) -> None:
    with pytest.raises(InputError, match="without a database"):
        servers.up(ports={"mlflow": free_port(), "prefect": free_port()}, postgres=url)


def test_a_server_that_ends_is_told_with_its_log_and_the_other_is_stopped(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeper(*_: object) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", "import time; time.sleep(600)"], {}

    def broken(*_: object) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", "raise SystemExit('no such table: runs')"], {}

    monkeypatch.setattr(server_setup, "prefect", sleeper)
    monkeypatch.setattr(server_setup, "mlflow", broken)
    born: list[Server] = []
    start = servers._start
    monkeypatch.setattr(servers, "_start", lambda *words: born.append(start(*words)) or born[-1])
    with pytest.raises(TryAgainError, match="mlflow ended while it started; its log:\nno such table: runs"):
        servers.up(ports={"mlflow": free_port(), "prefect": free_port()})
    assert [server.name for server in born] == ["mlflow", "prefect"]
    assert not any(server.alive() for server in born)
    assert servers.started() == []


def test_what_a_server_started_is_stopped_with_it_willing_or_not(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "GRACE_S", 1)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}]).wait()"
    monkeypatch.setattr(server_setup, "prefect", lambda *_: ([sys.executable, "-c", code], {}))
    server = servers._start("prefect", "127.0.0.1", free_port(), "", None)
    while b"\n" not in server.log.read_bytes():
        assert server.alive()
    (child,) = psutil.Process(server.pid).children()
    assert servers.down() == [server]
    assert not servers._is_alive(child) and not server.alive()


ASK = """
import sys, components, httpx, requests
from flows.servers import Server
url = f"http://127.0.0.1:{sys.argv[1]}/health"
assert Server("mlflow", 0, 0.0, "127.0.0.1", int(sys.argv[1])).healthy()
assert requests.get(url).status_code == httpx.get(url).status_code == 200
"""


@pytest.mark.parametrize("direct", [{}, {"no_proxy": "example.org"}, {"NO_PROXY": "127.0.0.1"}, {"no_proxy": "*"}])
def test_a_proxy_is_not_asked_for_servers_of_this_machine(direct: dict[str, str]) -> None:
    """However a client reads it: urllib here, requests in MLflow, httpx in Prefect."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever).start()
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
        bare = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
        subprocess.run([sys.executable, "-c", ASK, str(server.server_port)], env=bare | proxies | direct, check=True)
        server.shutdown()


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert [Server("prefect", 0, 0.0, host, 4200).url for host in ("::1", "::", "gpu-box")] == [
        "http://[::1]:4200", "http://127.0.0.1:4200", "http://gpu-box:4200",
    ]  # fmt: skip


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    "begin",
    ["servers.end_temporary_prefect()", "servers.prefect_failures().__enter__()\nwhile not servers._waiting: time.sleep(0.1)"],
)
def test_the_temporary_server_of_a_killed_flow_ends_with_it(begin: str) -> None:
    """Before the flow begins too, while Prefect waits for its server."""
    code = (
        "import subprocess, sys, time\nfrom flows import servers\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', servers.PREFECT_APP]).pid)\n"
        f"time.sleep(0.2)\n{begin}\nprint(flush=True)\ntime.sleep(60)"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert flow.stdout is not None
    server = psutil.Process(int(flow.stdout.readline()))
    flow.stdout.readline()
    assert server.status() != psutil.STATUS_ZOMBIE
    flow.kill()
    flow.wait()
    server.wait(20)


def test_a_child_that_has_ended_is_no_server() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until it is reaped
    servers.end_temporary_prefect()
    child.wait()


def test_a_pid_that_another_process_has_now_is_left_alone(cwd: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        pid_file = cwd / ".servers/prefect.pid"
        pid_file.parent.mkdir()
        born = psutil.Process(other.pid).create_time() - 100
        pid_file.write_text(json.dumps(Server("prefect", other.pid, born, "127.0.0.1", 4200).__dict__))
        assert dict(servers.report())["prefect"].startswith("ended by itself")
        assert servers.down() == []
        assert other.poll() is None and not pid_file.exists()
    finally:
        other.kill()
        other.wait()


def test_a_real_pair_answers_is_hardened_and_ends_whole(pair: Path) -> None:
    mlflow, prefect = (servers.running(name) for name in servers.NAMES)
    assert servers.up() == [mlflow, prefect]  # a second time: nothing to do
    for server in (mlflow, prefect):
        assert f"up at {server.url}" in dict(servers.report())[server.name]
        listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1"}
    environment = psutil.Process(mlflow.pid).environ()
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == environment["DO_NOT_TRACK"] == "true"

    search = f"{mlflow.url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert answer(search) == 200
    assert answer(search, Host="evil.example") == 403  # a page that has its name point here
    assert answer(f"{prefect.url}/api/admin/version") == 200
    assert answer(f"{prefect.url}/api/admin/version", Host="evil.example") == 400
    assert answer(f"{prefect.url}/api/flows/", data=b'{"name": "x"}') == 403  # a page elsewhere has no CSRF token
    with urllib.request.urlopen(f"{prefect.url}/ui-settings", timeout=30) as response:
        assert json.load(response)["api_url"] == "/api"  # the page asks the server that it came from
    family = [psutil.Process(s.pid) for s in (mlflow, prefect)]
    family += [child for parent in family for child in parent.children(recursive=True)]
    assert servers.down() == [mlflow, prefect]
    assert not any(servers._is_alive(process) for process in family)
    assert dict(servers.report()) == {"mlflow": "not started", "prefect": "not started"}


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL of this test's own, with a password."""
    initdb = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not initdb or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs Debian's package postgresql, and psycopg2: pip install -e '.[postgres]'")
    user = "postgres" if os.getuid() == 0 else None  # it does not run as root; the package makes this user
    home = Path(tempfile.mkdtemp(prefix="alignti-postgres-"))
    (home / "password").write_text("a-secret")
    for path in (home, home / "password"):
        shutil.chown(path, user or os.getuid())
    data, port, programs = home / "data", free_port(), initdb[-1].parent
    words = ["-D", str(data), "-U", "pool", "--auth", "scram-sha-256", "--pwfile", str(home / "password")]
    subprocess.run([programs / "initdb", *words], user=user, check=True, capture_output=True, cwd=home)
    options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1"
    control = [str(programs / "pg_ctl"), "-D", str(data), "-w", "-t", "120"]
    subprocess.run(
        [*control, "-l", str(home / "log"), "-o", options, "start"], user=user, check=True, stdout=subprocess.DEVNULL, cwd=home
    )
    try:
        yield f"postgresql://pool:a-secret@127.0.0.1:{port}"
    finally:
        subprocess.run([*control, "-m", "fast", "stop"], user=user, check=True, stdout=subprocess.DEVNULL, cwd=home)
        shutil.rmtree(home)


def test_a_pool_keeps_its_tables_in_postgresql(cwd: Path, postgres: str) -> None:
    import psycopg2

    ports: dict[servers.Name, int] = {"mlflow": free_port(), "prefect": free_port()}
    mlflow, prefect = servers.up(ports=ports, postgres=postgres)
    try:
        assert answer(f"{prefect.url}/api/admin/version") == 200
        experiment = json.dumps({"name": "in-postgres"}).encode()
        assert answer(f"{mlflow.url}/api/2.0/mlflow/experiments/create", data=experiment) == 200
    finally:
        servers.down()
    for name, table in (("mlflow", "experiments"), ("prefect", "flow_run")):
        with contextlib.closing(psycopg2.connect(f"{postgres}/alignti_{name}")) as connection, connection.cursor() as cursor:
            cursor.execute(f"select count(*) from {table}")
            assert cursor.fetchone()[0] == {"mlflow": 2, "prefect": 0}[name]
    assert not list(cwd.rglob("*.db"))
    with pytest.raises(TryAgainError, match="PostgreSQL does not answer"):
        servers.up(ports=ports, postgres=postgres.replace("a-secret", "another"))


def answer(url: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def pair(cwd: Path) -> Iterator[Path]:
    """Both servers, real, from nothing."""
    servers.up(ports={"mlflow": free_port(), "prefect": free_port()})
    yield cwd
    servers.down()


def test_commands_find_the_servers_by_themselves(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="`alignti up` starts it"):
        servers.client_environment()
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")  # as on another machine of a pool
    monkeypatch.setenv("ALIGNTI_TRACKING_URI", "http://elsewhere:5000")
    assert servers.client_environment()["PREFECT_API_URL"] == "http://elsewhere:4200/api"
    me = psutil.Process(os.getpid())
    for name, port in servers.PORTS.items():
        (cwd / ".servers").mkdir(exist_ok=True)
        server = Server(name, me.pid, me.create_time(), "0.0.0.0", port)
        (cwd / f".servers/{name}.pid").write_text(json.dumps(server.__dict__))
    monkeypatch.setenv(servers.AUTH, "user:a-long-password")
    environment = servers.client_environment()
    assert environment["ALIGNTI_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert environment["PREFECT_API_AUTH_STRING"] == "user:a-long-password"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "a-long-password"


def test_a_server_of_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--host` with an address of the network, which `no_proxy` does not name."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    monkeypatch.setattr(urllib.request, "_opener", None)  # made once, of the environment at that time
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert Server("mlflow", os.getpid(), 0.0, "127.0.0.1", server.server_port).healthy()
        server.shutdown()


def test_a_flow_that_its_server_fails_is_to_be_tried_again() -> None:
    for error in (httpx.ConnectError("refused"), ObjectNotFound(Exception("no such run"))):
        with pytest.raises(TryAgainError, match="what its stages made stands"), servers.prefect_failures():
            raise error
    with pytest.raises(TryAgainError), servers.prefect_failures():
        exec(compile("b'\\x8b'.decode()", "site-packages/prefect/client/orchestration/client.py", "exec"))  # noqa: S102
    with pytest.raises(TryAgainError, match="PREFECT_HOME"), servers.prefect_failures():  # as on a read-only home
        raise RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")
    for error in (InputError("a stage's own error passes"), ValueError("and a fault of this code"), RuntimeError("another")):
        with pytest.raises(type(error)), servers.prefect_failures():
            raise error
