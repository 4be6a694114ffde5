"""MLflow and Prefect servers of this working folder: `alignti up`, `alignti down`, `alignti status`.

Each runs in a session of its own, with its data, log and pid file under `.servers/`; MLflow's runs are in `.mlflow/`, the place
that stages write to without a server too. On a shared PostgreSQL each has a database of its own: both keep their schema's
version in a table of the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import psutil

from components.errors import AlignTIError, InputError, TryAgainError, first_line
from components.io import write_text
from components.process import locked
from components.tracking import mlflow_sync
from components.tracking.outcome import TRAINING
from flows import QUIET

HOME = Path(".servers")
MLFLOW_HOME = Path(".mlflow")
STARTUP_S = 180  # migrations of a first start, on a busy machine
GRACE_S = 10  # from asking a server to stop until it is killed
LOOPBACK = "127.0.0.1"
AUTH = "ALIGNTI_SERVER_AUTH"  # user:password, for a server that others may reach
SHORTEST_PASSWORD = 12  # MLflow's rule

Name = Literal["mlflow", "prefect"]
NAMES: tuple[Name, ...] = ("mlflow", "prefect")
PORTS: dict[Name, int] = {"mlflow": 5000, "prefect": 4200}
HEALTH: dict[Name, str] = {"mlflow": "/health", "prefect": "/api/health"}


@dataclass(frozen=True)
class Server:
    """One that was started here. `born` tells its process from a later one with the same pid."""

    name: Name
    pid: int
    born: float
    host: str
    port: int

    @property
    def url(self) -> str:
        reached_at = LOOPBACK if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{reached_at}:{self.port}"

    @property
    def page(self) -> str:
        """What to open in a browser."""
        return f"{self.url}/#/experiments?{TRAINING}" if self.name == "mlflow" else self.url

    @property
    def log(self) -> Path:
        return HOME / f"{self.name}.log"

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return False
        return abs(process.create_time() - self.born) < 1 and _lives(process)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + HEALTH[self.name], timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 401  # it is up, and asks who we are
        except OSError:
            return False


def up(
    host: str = LOOPBACK,
    ports: Mapping[Name, int] = PORTS,
    postgres: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Server]:
    """Start what is not running and wait until both answer. If one does not, those started here are stopped again.

    One at a time: of two, the second would take the first's answer for that of its own process, which found the port taken.

    `postgres`: postgresql://user:password@host:port; the databases alignti_mlflow and alignti_prefect are made if missing.

    Raises:
        InputError: a port is taken, or the address would be open to others without a password.
        TryAgainError: a server ended or did not answer in time; the message quotes its log.
    """
    auth = _auth(host)
    with locked(HOME / "up.lock"):
        return _up(host, ports, postgres, auth, say)


def _up(
    host: str, ports: Mapping[Name, int], postgres: str | None, auth: str | None, say: Callable[[str], None]
) -> list[Server]:
    running = {server.name: server for server in started() if server.alive()}
    missing = [name for name in NAMES if name not in running]
    for name in missing:
        _port_free(host, ports[name], name)
    databases = _databases(postgres)
    fresh: list[Server] = []
    try:
        for name in missing:
            fresh.append(_start(name, host, ports[name], databases[name], auth))
            running[name] = fresh[-1]
        for server in fresh:
            say(f"{server.name}: starting at {server.url}, log in {server.log}")
        for server in fresh:
            _wait(server)
    except BaseException:
        for server in fresh:
            _stop(server)
        raise
    return [running[name] for name in NAMES]


def down() -> list[Server]:
    """Stop both, with every process under them. Returns those that were running."""
    stopped = [server for server in started() if server.alive()]
    for server in started():
        _stop(server)
    return stopped


def started() -> list[Server]:
    """Those that have a pid file, alive or not."""
    files = [HOME / f"{name}.pid" for name in NAMES]
    return [Server(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists()]


def running(name: Name) -> Server:
    """Raises InputError if it is not up."""
    for server in started():
        if server.name == name and server.alive():
            return server
    raise InputError(f"the {name} server is not running here; `alignti up` starts it")


def client_environment() -> dict[str, str]:
    """What makes this project's commands talk to the servers that are up here, or else to those that the environment names.

    Raises InputError if there are neither.
    """
    environment = {
        **(_named() or {"ALIGNTI_TRACKING_URI": running("mlflow").url, "PREFECT_API_URL": running("prefect").url + "/api"}),
        "PREFECT_HOME": str((HOME / "prefect-home").resolve()),
    }
    if given := os.environ.get(AUTH):
        user, _, password = given.partition(":")
        environment |= {
            "PREFECT_API_AUTH_STRING": given,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }
    return environment


def _named() -> dict[str, str] | None:
    """The servers of another machine, as a worker of a pool finds them."""
    names = ("ALIGNTI_TRACKING_URI", "PREFECT_API_URL")
    if started() or not all(name in os.environ for name in names):
        return None
    return {name: os.environ[name] for name in names}


@contextlib.contextmanager
def asking_prefect() -> Iterator[None]:
    """Raises TryAgainError if the Prefect server that the block asks is away or fails, InputError if it refuses."""
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        refused = isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error
        how = "refuses" if refused else "does not answer"
        told = f"the Prefect server at {os.environ['PREFECT_API_URL']} {how}: {first_line(error)}"
        raise (InputError if refused else TryAgainError)(told) from None


def use_running() -> bool:
    """Let this process talk to the servers of this folder, if they are up and nobody has said otherwise."""
    try:
        environment = client_environment()
    except InputError:
        return False
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return True


def _auth(host: str) -> str | None:
    """user:password, if there is one. Raises InputError if `host` is open to others and there is none, or a weak one."""
    from components.evaluate.kits.serve import is_loopback

    given = os.environ.get(AUTH)
    if given is None and not is_loopback(host):
        raise InputError(
            f"--host {host} lets others in, and anyone who reaches Prefect may run code here: set {AUTH}=user:password, and put"
            f" a proxy with TLS before both servers. Without --host they listen on {LOOPBACK} alone."
        )
    if given is not None:
        user, _, password = given.partition(":")
        if not user or len(password) < SHORTEST_PASSWORD:
            raise InputError(f"{AUTH} must be user:password, with {SHORTEST_PASSWORD} or more characters of password")
    return given


def _port_free(host: str, port: int, name: Name) -> None:
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
    """`: held by process 12 (python)`, as far as we may know."""
    try:
        held = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
        pid = next((connection.pid for connection in held if connection.pid), None)
        return f": held by process {pid} ({psutil.Process(pid).name()})" if pid else ""
    except psutil.Error:
        return ""


def _start(name: Name, host: str, port: int, database: str, auth: str | None) -> Server:
    command, environment = (_mlflow if name == "mlflow" else _prefect)(host, port, database, auth)
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


def _mlflow(host: str, port: int, database: str, auth: str | None) -> tuple[list[str], dict[str, str]]:
    artifacts = (MLFLOW_HOME / "artifacts").resolve()
    artifacts.mkdir(parents=True, exist_ok=True)
    if database.startswith(mlflow_sync.LOCAL):
        mlflow_sync.make_database(Path(database.removeprefix(mlflow_sync.LOCAL)))  # stages that start now find it whole
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    if database.startswith("sqlite"):  # one machine: stages may write there with or without the server
        command += ["--workers", "1", "--no-serve-artifacts", "--default-artifact-root", artifacts.as_uri()]
    else:
        command += ["--workers", "2", "--artifacts-destination", artifacts.as_uri()]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": database,  # not an argument: it may hold a password, and command lines are public
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    if auth is not None:
        settings, secret = _mlflow_auth(auth, database)
        command += ["--app-name", "basic-auth"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": secret}
    return command, environment


def _mlflow_auth(auth: str, database: str) -> tuple[Path, str]:
    """MLflow's file of who may do what, and the key that it signs with. Raises InputError without its extra `auth`."""
    from importlib.util import find_spec

    if find_spec("flask_wtf") is None:
        raise InputError("MLflow asks for passwords only with its extra `auth`: pip install -c constraints.txt 'mlflow[auth]'")
    user, _, password = auth.partition(":")
    users = f"sqlite:///{(MLFLOW_HOME / 'users.db').resolve()}" if database.startswith("sqlite") else database
    file, key = (HOME / "mlflow-auth.ini").resolve(), HOME / "mlflow-auth.key"
    HOME.mkdir(exist_ok=True)
    for private in (file, key):
        private.touch(mode=0o600)
    if not key.read_text():
        key.write_text(secrets.token_hex(32))
    escaped = {k: v.replace("%", "%%") for k, v in {"user": user, "password": password, "users": users}.items()}
    file.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"database_uri = {escaped['users']}\nadmin_username = {escaped['user']}\nadmin_password = {escaped['password']}\n"
    )
    return file, key.read_text()


def _prefect(host: str, port: int, database: str, auth: str | None) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "flows.prefect_server", "--host", host, "--port", str(port)]
    environment = {
        "PREFECT_HOME": str((HOME / "prefect-home").resolve()),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{port},http://localhost:{port}",
        "PREFECT_SERVER_UI_API_URL": "/api",  # wherever the page came from; its own guess is port 4200
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }
    return command, environment | ({"PREFECT_SERVER_API_AUTH_STRING": auth} if auth else {})


def _databases(postgres: str | None) -> dict[Name, str]:
    """Where each server keeps its tables, as SQLAlchemy writes addresses."""
    if postgres is None:
        MLFLOW_HOME.mkdir(exist_ok=True)
        HOME.mkdir(exist_ok=True)
        return {
            "mlflow": f"sqlite:///{(MLFLOW_HOME / 'mlflow.db').resolve()}",
            "prefect": f"sqlite+aiosqlite:///{(HOME / 'prefect.db').resolve()}",
        }
    address = urlsplit(postgres)
    if address.scheme not in ("postgresql", "postgres") or address.path not in ("", "/"):
        raise InputError(
            "--postgres must be postgresql://user:password@host:port, without a database: each server gets its own"
        )
    _make_databases(postgres)
    return {
        "mlflow": urlunsplit(address._replace(scheme="postgresql+psycopg2", path="/alignti_mlflow")),
        "prefect": urlunsplit(address._replace(scheme="postgresql+asyncpg", path="/alignti_prefect")),
    }


def _make_databases(postgres: str) -> None:
    from importlib.util import find_spec

    if find_spec("psycopg2") is None:
        raise InputError("MLflow reaches PostgreSQL through psycopg2: pip install -c constraints.txt -e '.[postgres]'")
    import psycopg2

    try:
        with contextlib.closing(psycopg2.connect(urlunsplit(urlsplit(postgres)._replace(path="/postgres")))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("select datname from pg_database")
                there = {row[0] for row in cursor.fetchall()}
                for name in NAMES:
                    if f"alignti_{name}" not in there:
                        cursor.execute(f"create database alignti_{name}")
    except psycopg2.OperationalError as error:
        raise TryAgainError(f"PostgreSQL does not answer: {' '.join(str(error).split())}") from None


def _wait(server: Server) -> None:
    until = time.monotonic() + STARTUP_S
    while not server.healthy():
        ended = not server.alive()
        if ended or time.monotonic() > until:
            how = "ended while it started" if ended else f"did not answer at {server.url} in {STARTUP_S} s"
            last = server.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise TryAgainError("\n".join([f"{server.name} {how}; its log:", *last]))
        time.sleep(0.2)


def _stop(server: Server) -> None:
    """Ask, then kill, the server and all that it started; then forget it."""
    if server.alive():
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        for process in _left(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if left := _left(family):
            raise AlignTIError(f"{server.name}: process(es) {', '.join(str(p.pid) for p in left)} do not end, not even killed")
    (HOME / f"{server.name}.pid").unlink(missing_ok=True)


def _left(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of `family` that live on after the time of grace."""
    until = time.monotonic() + GRACE_S
    while (left := [process for process in family if _lives(process)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def report() -> Iterator[tuple[str, str]]:
    """(server, how it is) for each; `alignti status`."""
    known = {server.name: server for server in started()}
    for name in NAMES:
        server = known.get(name)
        if server is None:
            yield name, "not started"
        elif not server.alive():
            yield name, f"ended by itself; its log: {server.log}"
        else:
            yield (
                name,
                f"{'up' if server.healthy() else 'does not answer'} at {server.url}, process {server.pid}, log {server.log}",
            )
