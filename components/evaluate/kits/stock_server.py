"""Patches of `transformers serve`: one model name, HTTP 400 for invalid requests, answers cut at the context length, images
decoded as for training.

As released, /v1/models lists the hub's cache and fails without one, answers are of NAME@main, a wrong request is a 500
without a word, `max_tokens` has no bound, though every request waits for the one before, and what is transparent in an image
is black.
"""

from __future__ import annotations

import base64
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import torch
from fastapi import HTTPException
from PIL import UnidentifiedImageError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from components.dataset.images import READ, decode
from components.errors import first_line

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
Handle = Callable[[Any, dict[str, Any], str], Awaitable[Any]]


def patch(name: str) -> None:
    """Change the server of this process, which serves the model `name`."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "alignti"}]
    resolve = BaseHandler._resolve_model

    def resolve_and_check(handler: Any, body: dict[str, Any]) -> tuple[str, Any, Any]:
        _, model, processor = resolve(handler, body)
        check(body, getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
        return name, model, processor

    ModelManager.get_gen_models = staticmethod(lambda: models)  # type: ignore[assignment, method-assign]
    BaseHandler._resolve_model = resolve_and_check  # type: ignore[assignment, method-assign]
    for kind in (ChatCompletionHandler, CompletionHandler, ResponseHandler):
        kind.handle_request = _with_error_response(kind.handle_request)  # type: ignore[assignment, method-assign]


def check(body: dict[str, Any], context: int) -> None:
    """Cut the asked length of the answer to `context` tokens, and make images the RGB that `prepare` stores.

    Raises HTTPException (400) for no messages, no length, an unreadable image, or one that is no data URL: the server would
    open any file of this machine, and any address, for whoever asks.
    """
    if not body.get("messages", True):
        raise HTTPException(400, "messages is empty: nothing is asked")
    for key in LENGTHS:
        if (length := body.get(key)) is not None:
            if not isinstance(length, int) or length < 1:
                raise HTTPException(400, f"{key} is {length!r}: it is a number of tokens, 1 or more")
            body[key] = min(length, context)
    for part, key in _images([body.get("messages"), body.get("input")]):
        part[key] = _as_stored(part[key])
    if body.get("generation_config") is not None:  # would have any length
        raise HTTPException(
            400, "generation_config is not taken; temperature, top_p, seed and the length have keys of their own"
        )


def _images(part: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects of a request that hold an image's address, each with its key."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key in ("image_url", "image", "url", "path") and isinstance(value, str):
            yield part, key
        else:
            yield from _images(value)


def _as_stored(address: str) -> str:
    """Data URL of the image as `prepare` stores it."""
    if not address.startswith("data:"):
        raise HTTPException(400, f"an image comes as a data URL, not from {address[:80]}")
    header, _, encoded = address.partition(",")
    try:
        picture = decode(base64.b64decode(encoded), "an image")
    except UnidentifiedImageError:
        raise HTTPException(400, f"an image cannot be read: it is none of {', '.join(READ)}") from None
    except Exception as error:  # decoders may raise anything on invalid bytes
        raise HTTPException(400, f"an image cannot be read: {first_line(error)}") from None
    return f"{header},{base64.b64encode(picture.content).decode()}"


def _with_error_response(handle: Handle) -> Handle:
    """Handler that maps errors to HTTP 400: weights and code are the same for all requests, so the request is the cause."""

    async def handle_request(handler: Any, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await handle(handler, body, request_id)
        except (HTTPException, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            traceback.print_exc()  # to the server's log
            raise HTTPException(400, f"{type(error).__name__}: {first_line(error)}") from error

    return handle_request
