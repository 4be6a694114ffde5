"""MLflow and Prefect servers of this working folder: `alignti up`, `alignti down`, `alignti status`.

Each runs in its own session, with data, log and pid file under `.servers/`; MLflow's runs are in `.mlflow/`, where stages write
without a server too. Start-up options are in `server_setup.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from components.errors import AlignTIError, InputError, TryAgainError, first_line
from components.evaluate.kits.client import DIRECT
from components.io import write_text
from components.process import locked
from components.tracking.outcome import TRAINING
from flows import QUIET, server_setup
from flows.server_setup import AUTH, HOME, LOOPBACK, NAMES, Name

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

STARTUP_S = 180  # timeout: migrations of a first start, on a busy machine
GRACE_S = 10  # between SIGTERM and SIGKILL of a server
PORTS: dict[Name, int] = {"mlflow": 5000, "prefect": 4200}
PREFECT_APP = "prefect.server.api.server:create_app"  # in the command line of Prefect's temporary server
HEALTH: dict[Name, str] = {"mlflow": "/health", "prefect": "/api/health"}

_waiting: dict[int, subprocess.Popen[bytes]] = {}  # pid of a server -> what waits to end it, on a pipe of this process
_flow_began = threading.Event()  # set when Prefect's temporary server, if there is one, is up


@dataclass(frozen=True)
class Server:
    """Server started here. `born`, its start time, rules out a later process with the same pid."""

    name: Name
    pid: int
    born: float
    host: str
    port: int

    @property
    def url(self) -> str:
        host = LOOPBACK if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{server_setup.in_url(host)}:{self.port}"

    @property
    def page(self) -> str:
        """URL to open in a browser."""
        return f"{self.url}/#/experiments?{TRAINING}" if self.name == "mlflow" else self.url

    @property
    def log(self) -> Path:
        return HOME / f"{self.name}.log"

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return False
        return abs(process.create_time() - self.born) < 1 and _is_alive(process)

    def healthy(self) -> bool:
        try:
            with DIRECT.open(self.url + HEALTH[self.name], timeout=5) as response:
                return bool(response.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 401  # up, and requires a login
        except OSError:
            return False


def up(
    host: str = LOOPBACK,
    ports: Mapping[Name, int] = PORTS,
    postgres: str | None = None,
    echo: Callable[[str], None] = print,
) -> list[Server]:
    """Start the missing servers and wait until both answer. If one does not, those started here are stopped again.

    Concurrent calls take turns: a second would take the first's answer for that of its own process, which found the port taken.

    `postgres`: postgresql://user:password@host:port; missing databases alignti_mlflow and alignti_prefect are created.

    Raises:
        InputError: a port is taken, or the address would be open to others without a password.
        TryAgainError: a server ended or did not answer in time; the message quotes its log.
    """
    auth = server_setup.password(host)
    with locked(HOME / "up.lock"):
        running = {server.name: server for server in started() if server.alive()}
        missing = [name for name in NAMES if name not in running]
        if len({ports[name] for name in missing}) < len(missing):
            raise InputError(f"both servers would listen on port {ports[missing[0]]}: give one another port")
        for name in missing:
            _check_port_free(host, ports[name], name)
        databases = server_setup.databases(postgres)
        new_servers: list[Server] = []
        try:
            for name in missing:
                new_servers.append(_start(name, host, ports[name], databases[name], auth))
            for server in new_servers:
                echo(f"{server.name}: starting at {server.url}, log in {server.log}")
            for server in new_servers:
                _wait(server)
        except BaseException:
            for server in new_servers:
                _stop(server)
            raise
    running |= {server.name: server for server in new_servers}
    return [running[name] for name in NAMES]


def down() -> list[Server]:
    """Stop both, with every process under them. Returns those that were running."""
    stopped = [server for server in started() if server.alive()]
    for server in started():
        _stop(server)
    return stopped


def started() -> list[Server]:
    """Servers with a pid file, alive or not."""
    files = [HOME / f"{name}.pid" for name in NAMES]
    return [Server(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists()]


def running(name: Name) -> Server:
    """Running server `name`. Raises InputError if it is not up."""
    for server in started():
        if server.name == name and server.alive():
            return server
    raise InputError(f"the {name} server is not running here; `alignti up` starts it")


def client_environment() -> dict[str, str]:
    """Environment variables for clients of the servers that are up here, or else of those that the environment names.

    Raises InputError if there are neither.
    """
    remote_variables = ("ALIGNTI_TRACKING_URI", "PREFECT_API_URL")
    if not started() and all(name in os.environ for name in remote_variables):  # as for a worker of a pool on another machine
        environment = {name: os.environ[name] for name in remote_variables}
    else:
        environment = {"ALIGNTI_TRACKING_URI": running("mlflow").url, "PREFECT_API_URL": running("prefect").url + "/api"}
    environment["PREFECT_HOME"] = str((HOME / "prefect-home").resolve())
    if auth := os.environ.get(AUTH):
        user, _, password = auth.partition(":")
        environment |= {
            "PREFECT_API_AUTH_STRING": auth,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }
    return environment


@contextlib.contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """Client of the Prefect server. Raises TryAgainError if it is unreachable or fails, InputError if it rejects a request of
    the block."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPError as error:
        rejected = isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error
        fault = "refuses" if rejected else "does not answer"
        message = f"the Prefect server at {os.environ['PREFECT_API_URL']} {fault}: {first_line(error)}"
        raise (InputError if rejected else TryAgainError)(message) from None


@contextlib.contextmanager
def prefect_failures() -> Iterator[None]:
    """Raises TryAgainError for what Prefect's server does to a flow of the block: what its stages made stands."""
    import httpx
    from prefect.exceptions import PrefectException

    threading.Thread(target=_end_temporary_prefect_from_its_start, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if "ephemeral" not in str(error):
            raise
        raise TryAgainError(
            f"Prefect's temporary server did not start ({first_line(error)}); `alignti up` starts one that stays; PREFECT_HOME"
            " names a folder for its data where ~/.prefect cannot be written"
        ) from None
    except (httpx.HTTPError, PrefectException, ValueError) as error:
        in_client = any("prefect/client/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        if isinstance(error, ValueError) and not in_client:  # half an answer of the server is no text, JSON or record
            raise
        raise TryAgainError(
            f"Prefect's server failed this flow ({type(error).__name__}: {first_line(error)}); what its stages made stands, so"
            " run the same command to go on"
        ) from None


def _end_temporary_prefect_from_its_start() -> None:
    """Prefect waits for its server, seconds or minutes, before a flow begins: a kill meanwhile would leave it alone."""
    while not _flow_began.wait(0.1):
        _tie_temporary_prefect()


def end_temporary_prefect() -> None:
    """End the server that Prefect started for this flow, if it did, with this process, in whatever way that ends."""
    _flow_began.set()
    _tie_temporary_prefect()


def _tie_temporary_prefect() -> None:
    """Start `sh` for it, which waits for the end of a pipe that this process alone holds."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if PREFECT_APP in child.cmdline() and child.pid not in _waiting:
                command = ["sh", "-c", f"read -r _; kill {child.pid}"]
                _waiting[child.pid] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
                )


def use_running() -> None:
    """Add `client_environment`, if there are servers, to this process's environment; variables that are set win."""
    with contextlib.suppress(InputError):
        for name, value in client_environment().items():
            os.environ.setdefault(name, value)


def _check_port_free(host: str, port: int, name: Name) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{name} cannot listen on {host}:{port} ({error.strerror}{_holder(port)}); choose another with --{name}-port"
            ) from None


def _holder(port: int) -> str:
    """`: held by process 12 (python)`; "" if that cannot be determined."""
    try:
        listeners = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
        pid = next((connection.pid for connection in listeners if connection.pid), None)
        return f": held by process {pid} ({psutil.Process(pid).name()})" if pid else ""
    except psutil.Error:
        return ""


def _start(name: Name, host: str, port: int, database: str, auth: str | None) -> Server:
    setup = server_setup.mlflow if name == "mlflow" else server_setup.prefect
    command, environment = setup(host, port, database, auth)
    HOME.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_")) and k != AUTH}
    with (HOME / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=inherited | QUIET | environment,
        )
    server = Server(name, process.pid, psutil.Process(process.pid).create_time(), host, port)
    write_text(HOME / f"{name}.pid", json.dumps(server.__dict__) + "\n")
    return server


def _wait(server: Server) -> None:
    deadline = time.monotonic() + STARTUP_S
    while not server.healthy():
        ended = not server.alive()
        if ended or time.monotonic() > deadline:
            fault = "ended while it started" if ended else f"did not answer at {server.url} in {STARTUP_S} s"
            log_tail = server.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise TryAgainError("\n".join([f"{server.name} {fault}; its log:", *log_tail]))
        time.sleep(0.2)


def _stop(server: Server) -> None:
    """Stop the server and its child processes, by SIGTERM, then SIGKILL; remove its pid file."""
    if server.alive():
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        for process in _survivors(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if survivors := _survivors(processes):
            raise AlignTIError(
                f"{server.name}: process(es) {', '.join(str(p.pid) for p in survivors)} do not end, not even killed"
            )
    (HOME / f"{server.name}.pid").unlink(missing_ok=True)


def _survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of `processes` that outlive the grace period."""
    deadline = time.monotonic() + GRACE_S
    while (survivors := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return survivors


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def report() -> Iterator[tuple[str, str]]:
    """(server, status) for each; `alignti status`."""
    recorded = {server.name: server for server in started()}
    for name in NAMES:
        server = recorded.get(name)
        if server is None:
            yield name, "not started"
        elif not server.alive():
            yield name, f"ended by itself; its log: {server.log}"
        else:
            state = "up" if server.healthy() else "does not answer"
            yield name, f"{state} at {server.url}, process {server.pid}, log {server.log}"
