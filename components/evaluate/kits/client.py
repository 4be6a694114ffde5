"""OpenAI-compatible client of a served student. Standard library only."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

KEY = "ALIGNTI_SERVE_KEY"  # environment variable with the server's bearer token
MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
DIRECT = build_opener(ProxyHandler({}))  # no proxy: the server is on loopback


class Endpoint(NamedTuple):
    """OpenAI-compatible server: base URL, model name and system prompt."""

    url: str  # without /v1
    model: str
    system: str = ""  # for chat templates with a system role; that of `style: vicuna` has it built in


class RequestRejected(Exception):
    """Request rejected by the server, or a malformed response; the message holds the server's text."""


def chat_completion(endpoint: Endpoint, parts: Sequence[str | bytes], max_new_tokens: int, timeout_s: float = 600) -> str:
    """Greedy answer, stripped, to interleaved text and images. Raises RequestRejected for an HTTP error or a malformed
    response, OSError for no server."""
    content: list[dict[str, Any]] = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    messages: list[dict[str, Any]] = [{"role": "system", "content": endpoint.system}] if endpoint.system else []
    messages.append({"role": "user", "content": content})
    body = {"model": endpoint.model, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
    headers = {"Content-Type": "application/json"}
    if KEY in os.environ:
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    status, response = _exchange(Request(f"{endpoint.url}/v1/chat/completions", json.dumps(body).encode(), headers), timeout_s)
    if status != 200:
        raise RequestRejected(f"HTTP {status}: {response[:500].decode(errors='replace')}")
    try:
        return str(json.loads(response)["choices"][0]["message"].get("content") or "").strip()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestRejected(f"an answer of another shape: {type(error).__name__}: {error}") from None


def healthy(url: str) -> bool:
    """Readiness of the server, by its /health endpoint."""
    try:
        return _exchange(Request(f"{url}/health"), timeout_s=5)[0] == 200
    except OSError:  # refused, reset, timed out, or no HTTP: not ready
        return False


def data_url(image: bytes) -> str:
    mime = next((name for magic, name in MIME.items() if image.startswith(magic)), "application/octet-stream")
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def _exchange(request: Request, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the response. Raises OSError for no server, and for one that does not speak HTTP."""
    try:
        with DIRECT.open(request, timeout=timeout_s) as response:
            return response.status, response.read()
    except HTTPError as error:
        return error.code, error.read()
    except HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
