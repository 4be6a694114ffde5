"""Markdown tables and number formats shared by all reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DASH = "\N{EN DASH}"  # in place of a number that was not measured


def table(header: Sequence[object], rows: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    """Markdown table with `text_columns` left-aligned columns first, then right-aligned numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows))


def counted(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def percent(share: float) -> str:
    """Percentage of a share (0..1) without the percent sign, for columns that name the unit."""
    return f"{100 * share:.1f}"


def signed(value: float, decimals: int = 1) -> str:
    """Signed number with a true minus (U+2212), and no sign on a rounded zero."""
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _cell(content: object) -> str:
    return str(content).replace("|", "\\|").replace("\n", " ")
