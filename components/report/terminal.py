"""Text of models and data on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text with control characters escaped, so that the terminal does not act on them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
