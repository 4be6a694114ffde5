"""Patches of `transformers serve`: one model name, HTTP 400 for invalid requests, answers cut at the context length, images
decoded and special tokens in texts read as for training.

As released, /v1/models lists the hub's cache and fails without one, answers are of NAME@main, a wrong request is a 500
without a word, `max_tokens` has no bound, though every request waits for the one before, what is transparent in an image is
black, and a text that spells `</s>` ends its turn.
"""

from __future__ import annotations

import base64
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import torch
from fastapi import HTTPException
from PIL import UnidentifiedImageError
from tokenizers import normalizers
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from components.dataset.images import READ, decode
from components.errors import first_line
from components.models.chat_template import special_tokens

DROPPED = "\U000f0002"  # private-use character
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
Handle = Callable[[Any, dict[str, Any], str], Awaitable[Any]]


def patch(name: str) -> None:
    """Change the server of this process, which serves the model `name`."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "alignti"}]
    resolve = BaseHandler._resolve_model

    def resolve_and_check(handler: Any, body: dict[str, Any]) -> tuple[str, Any, Any]:
        _, model, processor = resolve(handler, body)
        check(body, getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
        divide_special_tokens(body, getattr(processor, "tokenizer", processor))
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
            if type(length) is not int or length < 1:
                raise HTTPException(400, f"{key} is {length!r}: it is a number of tokens, 1 or more")
            body[key] = min(length, context)
    for part, key in _texts(body, ("image_url", "image", "url", "path")):
        part[key] = _as_stored(part[key])
    if body.get("generation_config") is not None:  # would have any length
        raise HTTPException(
            400, "generation_config is not taken; temperature, top_p, seed and the length have keys of their own"
        )


def divide_special_tokens(body: dict[str, Any], tokenizer: Any) -> None:
    """Put a character that the tokenizer drops into each special token that a request's texts spell: no text opens or ends a
    turn, as in training (components/models/plain.py)."""
    spelling = re.compile("|".join(map(re.escape, sorted(special_tokens(tokenizer), key=len, reverse=True))) or "(?!)")
    for part, key in _texts(body, ("content", "text", "input", "instructions")):
        part[key] = spelling.sub(lambda match: match[0][0] + DROPPED + match[0][1:], part[key].replace(DROPPED, ""))
    backend = tokenizer.backend_tokenizer
    if DROPPED not in str(backend.normalizer):
        after = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Replace(DROPPED, ""), *after])


def _texts(body: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Objects of a request's messages, input or instructions that hold a text under one of `keys`, each with its key."""
    parts: list[Any] = [body]
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if part is body and key not in ("messages", "input", "instructions"):
                continue
            if isinstance(value, dict | list):
                parts.append(value)
            elif key in keys and isinstance(value, str):
                yield part, key


def _as_stored(address: str) -> str:
    """Data URL of the image as `prepare` stores it."""
    if address[:5].lower() != "data:":
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
