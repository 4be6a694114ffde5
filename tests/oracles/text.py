"""Scores of one answer against reference texts: exact, contained, near (ANLS), and near as a number (relaxed accuracy)."""

from __future__ import annotations

import math
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def exact(answer: str, references: Sequence[str]) -> float:
    """GQA as LLaVA-1.5 scores it: case, outer white space and a final period aside, the answer is the reference."""
    return float(any(_plain(answer) == _plain(reference) for reference in references))


def contained(answer: str, references: Sequence[str]) -> float:
    """OCRBench: a reference stands somewhere in the answer, case and line breaks aside (Liu et al., SCIS 2024)."""
    said = answer.lower().strip().replace("\n", " ")
    return float(any(reference.lower().strip().replace("\n", " ") in said for reference in references))


def contained_formula(answer: str, references: Sequence[str]) -> float:
    """OCRBench's handwritten formulas: the same, with case kept and all spaces dropped."""
    said = answer.strip().replace("\n", " ").replace(" ", "")
    return float(any(reference.strip().replace("\n", " ").replace(" ", "") in said for reference in references))


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best of 1 - NL over the references, 0 from NL = 0.5 on.

    Biten et al., Scene Text Visual Question Answering, ICCV 2019, equation 1: NL is the edit distance over the longer length.
    VLMEvalKit keeps a similarity of exactly 0.5, which the equation sets to 0; here the equation holds.
    """
    return max(_similarity(_spaced(answer), _spaced(reference)) for reference in references)


def relaxed(answer: str, references: Sequence[str]) -> float:
    """ChartQA: within 5% of a number, else equal to a text, case aside (Masry et al., Findings of ACL 2022, section 5.1).

    A percentage counts as its hundredth; 0 has no relative error, so it is compared as text (Pix2Struct's evaluator).
    """
    return float(any(_relaxed(answer.strip(), reference) for reference in references))


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(answer: str, reference: str) -> float:
    longest = max(len(answer), len(reference))
    if not longest:
        return 1.0
    if abs(len(answer) - len(reference)) >= ANLS_THRESHOLD * longest:
        return 0.0  # their lengths alone put them that far apart: an answer of 100 kB costs nothing
    distance = edit_distance(answer, reference) / longest
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _relaxed(answer: str, reference: str) -> bool:
    said, true = _number(answer), _number(reference)
    if said is not None and true:
        return abs(said - true) / abs(true) <= RELAXED_TOLERANCE
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
