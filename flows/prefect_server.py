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
from flows.server_setup import in_url


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    allowed_hosts = [in_url(args.host), "localhost", "127.0.0.1"] if is_loopback(args.host) else ["*"]
    app = TrustedHostMiddleware(create_app(final=True), allowed_hosts=allowed_hosts)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
