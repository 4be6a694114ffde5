"""Asks a served student one question, as any OpenAI client would. Standard library only."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

KEY = "ALIGNTI_SERVE_KEY"  # in the environment: the bearer token that the server asks for
MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


class Endpoint(NamedTuple):
    """An OpenAI-compatible server and the name under which it knows its model."""

    url: str  # without /v1
    model: str


class Refused(Exception):
    """The server is there and does not answer this request; the message is the server's."""


def ask(endpoint: Endpoint, question: str, images: Sequence[bytes], max_new_tokens: int, timeout_s: float = 600) -> str:
    """The greedy answer, stripped. Raises Refused for an HTTP error or an answer of another shape, OSError for no server."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content.append({"type": "text", "text": question})
    message = {"role": "user", "content": content}
    body = {"model": endpoint.model, "messages": [message], "temperature": 0, "max_tokens": max_new_tokens}
    headers = {"Content-Type": "application/json"}
    if KEY in os.environ:
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    request = urllib.request.Request(f"{endpoint.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with _DIRECT.open(request, timeout=timeout_s) as response:
            answered = json.load(response)
        return str(answered["choices"][0]["message"].get("content") or "").strip()
    except urllib.error.HTTPError as error:
        raise Refused(f"HTTP {error.code}: {error.read(500).decode(errors='replace')}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Refused(f"an answer of another shape: {type(error).__name__}: {error}") from None


def healthy(url: str) -> bool:
    """Whether a server there says that it is ready."""
    try:
        with _DIRECT.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:  # refused, reset, timed out, or an HTTP error: not yet
        return False


def data_url(image: bytes) -> str:
    mime = next((name for magic, name in MIME.items() if image.startswith(magic)), "application/octet-stream")
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is not for loopback
