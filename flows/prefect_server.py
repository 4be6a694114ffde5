"""Prefect server with a Host header check: `python -m flows.prefect_server --host HOST --port PORT`.

Prefect itself accepts any Host header. By DNS rebinding a foreign page has the same origin as this server: it reads a CSRF
token and all else, and write access to Prefect is code execution. A server open to others has a password instead
(`servers.up`), and accepts any name.
"""

from __future__ import annotations

import argparse

import uvicorn
from prefect.server.api.server import create_app
from starlette.middleware.trustedhost import TrustedHostMiddleware

from components.evaluate.kits.serve import is_loopback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    asked = parser.parse_args()
    names = [asked.host, "localhost", "127.0.0.1"] if is_loopback(asked.host) else ["*"]
    app = TrustedHostMiddleware(create_app(final=True), allowed_hosts=names)
    uvicorn.run(app, host=asked.host, port=asked.port, log_level="warning")


if __name__ == "__main__":
    main()
