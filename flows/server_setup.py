"""Start-up of the MLflow and Prefect servers of this folder: password, databases, command line, environment.

On a shared PostgreSQL each has a database of its own: both keep their schema version in a table of the same name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import psutil

from components.errors import InputError, TryAgainError
from components.tracking import mlflow_client

HOME = Path(".servers")
MLFLOW_HOME = Path(".mlflow")
LOOPBACK = "127.0.0.1"
AUTH = "ALIGNTI_SERVER_AUTH"  # user:password, for a server that others can reach
ORIGINS = "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"  # of pages that may write, by commas
MIN_PASSWORD_CHARS = 12  # MLflow's rule

Name = Literal["mlflow", "prefect"]
NAMES: tuple[Name, ...] = ("mlflow", "prefect")


def password(host: str) -> str | None:
    """user:password from the environment, or None. Raises InputError if it is weak, or missing with a `host` open to others."""
    from components.evaluate.kits.serve import is_loopback

    auth = os.environ.get(AUTH)
    if auth is None and not is_loopback(host):
        raise InputError(
            f"--host {host} lets others in, and anyone who reaches Prefect may run code here: set {AUTH}=user:password, and put"
            f" a proxy with TLS before both servers. Without --host they listen on {LOOPBACK} alone."
        )
    if auth is not None:
        user, _, password = auth.partition(":")
        if not user or len(password) < MIN_PASSWORD_CHARS:
            raise InputError(f"{AUTH} must be user:password, with {MIN_PASSWORD_CHARS} or more characters of password")
    return auth


def in_url(host: str) -> str:
    """Host as URLs and Host headers have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def databases(postgres: str | None) -> dict[Name, str]:
    """SQLAlchemy URL of each server's database; missing databases of PostgreSQL are created."""
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
    _create_databases(postgres)
    return {
        "mlflow": urlunsplit(address._replace(scheme="postgresql+psycopg2", path="/alignti_mlflow")),
        "prefect": urlunsplit(address._replace(scheme="postgresql+asyncpg", path="/alignti_prefect")),
    }


def mlflow(host: str, port: int, database: str, auth: str | None) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server; passwords are in the environment, since command lines are public."""
    artifacts = (MLFLOW_HOME / "artifacts").resolve()
    artifacts.mkdir(parents=True, exist_ok=True)
    if database.startswith(mlflow_client.LOCAL):
        mlflow_client.make_database(Path(database.removeprefix(mlflow_client.LOCAL)))  # complete before stages open it
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
        environment |= {  # by default those of loopback: 403 to workers, and to its own pages elsewhere
            "MLFLOW_SERVER_ALLOWED_HOSTS": "*",  # a page of a rebound name has no login
            ORIGINS: os.environ.get(ORIGINS) or ",".join(_origins(port)),
        }
    return command, environment


def _origins(port: int) -> list[str]:
    """Origins of pages at the names and addresses of this machine."""
    addresses = {
        address.address.partition("%")[0]
        for of_interface in psutil.net_if_addrs().values()
        for address in of_interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    return [f"http://{in_url(name)}:{port}" for name in sorted({socket.gethostname(), socket.getfqdn(), *addresses})]


def _mlflow_auth(auth: str, database: str) -> tuple[Path, str]:
    """MLflow's configuration of permissions, and its signing key. Raises InputError without its extra `auth`."""
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
    settings = (
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"database_uri = {users}\nadmin_username = {user}\nadmin_password = {password}\n"
    )
    file.write_text(settings.replace("%", "%%"))  # MLflow reads it with interpolation
    return file, key.read_text()


def prefect(host: str, port: int, database: str, auth: str | None) -> tuple[list[str], dict[str, str]]:
    """As `mlflow`."""
    command = [sys.executable, "-m", "flows.prefect_server", "--host", host, "--port", str(port)]
    environment = {
        "PREFECT_HOME": str((HOME / "prefect-home").resolve()),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{port},http://localhost:{port}",
        "PREFECT_SERVER_UI_API_URL": "/api",  # relative to the page; the default is port 4200
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }
    return command, environment | ({"PREFECT_SERVER_API_AUTH_STRING": auth} if auth else {})


def _create_databases(postgres: str) -> None:
    if find_spec("psycopg2") is None:
        raise InputError("MLflow reaches PostgreSQL through psycopg2: pip install -c constraints.txt -e '.[postgres]'")
    import psycopg2

    try:
        with contextlib.closing(psycopg2.connect(urlunsplit(urlsplit(postgres)._replace(path="/postgres")))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("select datname from pg_database")
                existing = {row[0] for row in cursor.fetchall()}
                for name in NAMES:
                    if f"alignti_{name}" not in existing:
                        cursor.execute(f"create database alignti_{name}")
    except psycopg2.OperationalError as error:
        raise TryAgainError(f"PostgreSQL does not answer: {' '.join(str(error).split())}") from None
