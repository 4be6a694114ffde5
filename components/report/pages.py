"""Template, style and inline images that the HTML pages share."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from components.errors import DataError


def templates(folder: Path) -> Environment:
    """The `*.html.j2` of `folder`, and page.html.j2 that they extend; text is escaped, and an unknown name is an error."""
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_uri(content: bytes) -> str:
    """An encoded image as a data URI; its type is read from its content. Raises DataError if it is no image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = Image.MIME[str(image.format)]
    except OSError as error:
        raise DataError(f"an image of the report does not decode: {error}; `dvc repro` makes it anew") from None
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail(content: bytes, longest_px: int) -> bytes:
    """The image with its longest side at most `longest_px`; a smaller one is returned as it is."""
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) <= longest_px:
            return content
        image.thumbnail((longest_px, longest_px))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
