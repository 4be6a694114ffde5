"""Image marks: one in a question for each image of a row, none of another code, and where an unmarked image stands."""

from __future__ import annotations

import re
from dataclasses import replace

from components.dataset.changes import Changes
from components.dataset.media import ANY_MARK, MEDIA_MARK, VIDEO
from components.dataset.shards import IMAGE as MARK
from components.dataset.shards import Turn
from components.errors import Refusal

BOX_MARK = re.compile(r"<bbox>|<ref-object>")  # ms-swift's placeholders for entries of `objects`


def refuse_foreign(turns: list[Turn], images: int, objects: bool) -> None:
    """Raises Refusal (video, image_marks, boxes) for another code's mark. `objects`: whether the row has that key."""
    marks = MEDIA_MARK if not images or any(MARK in turn.question for turn in turns) else ANY_MARK
    for turn in turns:
        if mark := marks.search(turn.question):
            what = "video" if VIDEO.search(mark[0]) else "image_marks"
            raise Refusal(what, f"a question holds {mark[0].strip()[:80]!r}, another code's mark of a medium")
        if objects and (mark := BOX_MARK.search(turn.question + turn.answer)):
            raise Refusal("boxes", f"{mark[0]} stands for what 'objects' holds, which is not read")


def match_marks(
    turns: list[Turn], images: int, dropped: tuple[int, int], independent: bool, changes: Changes
) -> tuple[list[Turn], bool]:
    """Turns with one mark per image or none, all in questions, and whether they still are independent pairs.

    `dropped`: marks in the questions and the answers that were left out. Raises Refusal image_marks for any other count.
    """
    first = turns[0].question.count(MARK)
    in_questions = dropped[0] + sum(turn.question.count(MARK) for turn in turns)
    in_answers = dropped[1] + sum(turn.answer.count(MARK) for turn in turns)
    if independent and in_questions > first and (images == 1 or (images and in_questions != images)):
        changes.rules["stray_marks"] = f"{in_questions - first} {MARK} beyond the first question were taken out"
        turns = [turns[0]] + [replace(turn, question=turn.question.replace(MARK, "").strip()) for turn in turns[1:]]
        in_questions = first
    if images and (in_questions, in_answers) == (0, 0):
        if null := changes.rules.get("null_image"):
            raise Refusal("image_marks", f"{null}, and no {MARK} says which is meant")
        stand = "the image stands: it was" if images == 1 else f"the {images} images stand: they were"
        changes.rules["image_first"] = f"no {MARK} said where {stand} put first"
    elif (in_questions, in_answers) != (images, 0):
        where = f"{in_questions} {MARK} in questions and {in_answers} in answers"
        raise Refusal(
            "image_marks", f"{where}, for {images or 'no'} image{'s' * (images > 1)}: one in a question for each, or none"
        )
    return turns, independent and in_questions == first


def place_marks(turns: list[Turn], images: int, marked: bool, changes: Changes) -> list[Turn]:
    """Turns with image marks: unmarked images open the first question, a single image opens its question, as in LLaVA."""
    if not images or (marked and images > 1):
        return turns
    place = next((index for index, turn in enumerate(turns) if MARK in turn.question), None) if marked else 0
    if place is None:
        return turns
    question = turns[place].question
    if marked and question.removeprefix(changes.system).partition(MARK)[0].strip():
        changes.rules["image_moved"] = f"the only {MARK} was put before its question: {question[:60]!r}"
    words = re.sub(rf"(?<=\S){MARK}(?=\S)", " ", question).replace(MARK, "").strip()
    opened = replace(turns[place], question=f"{MARK}\n" * images + words)
    return [*turns[:place], opened, *turns[place + 1 :]]
