"""Jinja environment and inline images shared by the HTML pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from components.errors import DataError


def templates(folder: Path) -> Environment:
    """Jinja environment over the `*.html.j2` of `folder` and the base page.html.j2; autoescaped, undefined names raise."""
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_uri(content: bytes) -> str:
    """Data URI of an encoded image, its type read from the content. Raises DataError if it does not decode."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = Image.MIME[str(image.format)]
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"an image of the report does not decode: {error}; `dvc repro` makes it anew") from None
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail(content: bytes, longest_px: int) -> bytes:
    """JPEG of an image with its longest side at most `longest_px`; a smaller image is returned unchanged."""
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) <= longest_px:
            return content
        image.thumbnail((longest_px, longest_px))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
