"""OpenAI-compatible client of a served student. Standard library only."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from threading import local
from typing import Any, NamedTuple
from urllib.parse import urlsplit

KEY = "ALIGNTI_SERVE_KEY"  # in the environment: the bearer token that the server asks for
MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


class Endpoint(NamedTuple):
    """An OpenAI-compatible server, the name under which it knows its model, and what that is told before every question."""

    url: str  # without /v1
    model: str
    system: str = ""  # for chat templates that have a place for it; that of `style: vicuna` has it built in


class Refused(Exception):
    """The server is there and does not answer this request; the message is the server's."""


def ask(endpoint: Endpoint, question: str, images: Sequence[bytes], max_new_tokens: int, timeout_s: float = 600) -> str:
    """The greedy answer, stripped. Raises Refused for an HTTP error or an answer of another shape, OSError for no server."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content.append({"type": "text", "text": question})
    messages: list[dict[str, Any]] = [{"role": "system", "content": endpoint.system}] if endpoint.system else []
    messages.append({"role": "user", "content": content})
    body = {"model": endpoint.model, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
    headers = {"Content-Type": "application/json"}
    if KEY in os.environ:
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    status, told = _post(endpoint.url, json.dumps(body).encode(), headers, timeout_s)
    if status != 200:
        raise Refused(f"HTTP {status}: {told[:500].decode(errors='replace')}")
    try:
        return str(json.loads(told)["choices"][0]["message"].get("content") or "").strip()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Refused(f"an answer of another shape: {type(error).__name__}: {error}") from None


def healthy(url: str) -> bool:
    """Whether a server there says that it is ready."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):  # refused, reset, timed out, or no HTTP: not yet
        return False
    finally:
        connection.close()


def data_url(image: bytes) -> str:
    mime = next((name for magic, name in MIME.items() if image.startswith(magic)), "application/octet-stream")
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


class _Kept(local):
    """Open connections of this thread by server: opening one for each question would cost as much as asking it."""

    def __init__(self) -> None:
        self.by_url: dict[str, HTTPConnection] = {}


_KEPT = _Kept()


def _post(url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the answer, from the server itself: a proxy of the environment is not for loopback."""
    kept = _KEPT.by_url.pop(url, None)
    if kept is not None:
        try:
            return _exchange(url, kept, body, headers)
        except TimeoutError:
            raise
        except OSError:  # the server has closed it meanwhile; if it is gone, a new connection says so
            pass
    return _exchange(url, HTTPConnection(urlsplit(url).netloc, timeout=timeout_s), body, headers)


def _exchange(url: str, connection: HTTPConnection, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        told = response.read()
    except (OSError, HTTPException) as error:
        connection.close()
        raise error if isinstance(error, OSError) else ConnectionError(f"{type(error).__name__}: {error}") from error
    _KEPT.by_url[url] = connection
    return response.status, told
