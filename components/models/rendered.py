"""Rendered samples: text in parts, with the spans of answers, questions and images; a question's texts and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from components.dataset.shards import IMAGE, Turn


class Part(NamedTuple):
    text: str
    template: bool  # template text, with special tokens; else text of the data, which is plain
    response: bool = False  # text of an answer, from the space before it to its EOS, inclusive
    image: bool = False  # placeholder of an image


@dataclass(frozen=True)
class Rendered:
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def response_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans of the answers in `text`, each with its EOS."""
        return self._spans(lambda part: part.response)

    @property
    def question_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans of the questions' texts in `text`, without template text."""
        return self._spans(lambda part: not (part.template or part.response))

    @property
    def image_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans of the image placeholders in `text`."""
        return self._spans(lambda part: part.image)

    def _spans(self, predicate: Callable[[Part], bool]) -> tuple[tuple[int, int], ...]:
        """Spans of the runs of adjacent parts that match `predicate`. Template text, perhaps empty, separates any two questions
        or images."""
        spans, end = [], 0
        for matches, run in groupby(self.parts, predicate):
            start, end = end, end + sum(len(part.text) for part in run)
            if matches:
                spans.append((start, end))
        return tuple(spans)


def question_of(turn: Turn) -> str:
    """Question without its image marks."""
    return turn.question.replace(IMAGE, "").strip()


def pieces(question: str) -> list[str | None]:
    """Texts of a question, at least one, and its images, as None, in order. White space around the question, and after images
    that open it, is stripped."""
    first, *others = question.strip().split(IMAGE)
    parts: list[str | None] = [first] if first else []
    for text in others:
        text = text if any(parts) else text.lstrip()
        parts += [None, text] if text else [None]
    return parts if any(parts) else [*parts, ""]


def with_marks(question: str) -> str:
    """Question text without the marks of images that open it; all marks are kept if one is among the words."""
    parts = pieces(question)
    words = [IMAGE if piece is None else piece for piece in parts]
    return "".join(words if None in parts[parts.index(next(filter(None, parts), "")) :] else filter(None, parts)).strip()
