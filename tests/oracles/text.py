"""Scores of one answer against reference texts: exact, and contained."""

from __future__ import annotations

from collections.abc import Sequence


def exact(answer: str, references: Sequence[str]) -> float:
    """GQA as LLaVA-1.5 scores it: case, outer white space and a final period aside, the answer is the reference."""
    return float(any(_plain(answer) == _plain(reference) for reference in references))


def contained(answer: str, references: Sequence[str]) -> float:
    """OCRBench: a reference stands somewhere in the answer, case and line breaks aside (Liu et al., SCIS 2024)."""
    normalised = answer.lower().strip().replace("\n", " ")
    return float(any(reference.lower().strip().replace("\n", " ") in normalised for reference in references))


def contained_formula(answer: str, references: Sequence[str]) -> float:
    """OCRBench's handwritten formulas: the same, with case kept and all spaces dropped."""
    normalised = answer.strip().replace("\n", " ").replace(" ", "")
    return float(any(reference.strip().replace("\n", " ").replace(" ", "") in normalised for reference in references))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
