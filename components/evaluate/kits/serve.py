"""OpenAI-compatible server of a student: vLLM where installed, else `transformers serve`.

Images are sent as data URLs; the folder's chat template renders the prompt, as in training.
`transformers serve` answers vision-language requests one at a time (its continuous batching is for text models); vLLM batches.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from components.errors import InputError, TryAgainError
from components.evaluate.kits.client import KEY, Endpoint, healthy
from components.models.checkpoint_folder import weight_files

LOOPBACK = "127.0.0.1"
START_S = 900  # timeout of the start: a large model's weights take minutes to read
STOP_S = 20
DTYPE = "float32"  # dtype of the stage `evaluate`, so that answers are the same

TRANSFORMERS = """
import os, sys
from components.process import end_with_parent
end_with_parent()
from components.evaluate.kits import stock_server
os.chdir(sys.argv.pop(1))
stock_server.patch(sys.argv[2])
from transformers.cli.transformers import main
main()
"""


def command(model: Path, host: str, port: int, device: str) -> list[str]:
    """Command line that serves `model` under its folder's name. Raises InputError if no server is installed, or for a
    non-loopback bind without an API key."""
    if find_spec("vllm"):
        if not is_loopback(host) and KEY not in os.environ:
            raise InputError(f"{host} is open to others: set {KEY} to what they have to know, or serve on {LOOPBACK}")
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        argv += ["--served-model-name", model.name, "--generation-config", "vllm"]
    else:
        missing = [name for name in ("openai", "uvicorn", "fastapi") if not find_spec(name)]
        if missing:
            raise InputError(f"{missing[0]} is not installed, which serving needs: `make kits`")
        if not is_loopback(host):
            raise InputError(
                f"{host} is open to others, and `transformers serve` asks nobody for a key: serve on {LOOPBACK}, with a proxy"
                f" that asks before it, or install vLLM and set {KEY}"
            )
        argv = [sys.executable, "-c", TRANSFORMERS, str(model.parent), "serve", model.name, "--device", device]
    return [*argv, "--dtype", DTYPE, "--host", host, "--port", str(port)]


def check_address(host: str, port: int) -> None:
    """Raises InputError if a server cannot listen there: the port is taken, or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot listen on port {port} of {host} ({error.strerror or error}): choose another --port or --host"
        ) from None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # any other name may resolve to any address


@contextmanager
def served(
    model: Path, name: str, device: str, log: Path, host: str = LOOPBACK, port: int | None = None
) -> Iterator[tuple[Endpoint, subprocess.Popen[bytes]]]:
    """Context manager of a ready server for `model`, and its process, terminated on exit; its output goes to `log`.

    Args:
        name: model name in requests, with `-` for each `@` and `:`, which the server would read as a revision and a file.
        device: "cpu", "cuda" or "mps".
        port: a free one if None.

    Raises:
        ModelError: the folder is no complete checkpoint.
        InputError: see `command`; or the server needs torchvision, and has none.
        TryAgainError: the server exited or was not ready in 15 minutes; ends with the tail of its log.
    """
    model = model.resolve()
    weight_files(model)
    port = port or _free_port()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    endpoint = Endpoint(f"http://{address}", re.sub("[@:]", "-", name))
    environment = dict(os.environ)
    if KEY in environment:
        environment["VLLM_API_KEY"] = environment.pop(KEY)  # not on the command line, which every user of the machine can read
    link = log.parent / "model" / endpoint.model
    if link.parent.exists():
        shutil.rmtree(link.parent)  # `transformers serve` loads whatever model it finds there on request
    link.parent.mkdir(parents=True)
    link.symlink_to(model)
    argv = command(link, host, port, device)
    with log.open("w") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait(endpoint, process, log)
        yield endpoint, process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(endpoint: Endpoint, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    with tqdm(desc="server starting", unit="s", bar_format="{desc}: {elapsed}") as bar:
        while not healthy(endpoint.url):
            exit_code = process.poll()
            if exit_code is not None or time.monotonic() > deadline:
                if "video processor" in last_line(log):
                    raise InputError(
                        "this model's processor has a video part, which the server builds with torchvision alone: install the"
                        f" extra `vision` (docs/families.md, With and without torchvision); all that it said: {log}"
                    )
                reason = f"was not ready in {START_S // 60} minutes" if exit_code is None else f"ended with {exit_code}"
                raise TryAgainError(f"the server {reason}: {last_line(log)} (all of it: {log})")
            time.sleep(0.2)
            bar.update()


def last_line(log: Path) -> str:
    """Last non-empty line of a log, cut to 300 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
