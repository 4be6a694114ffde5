"""VQA accuracy: an answer is worth as much as people gave it.

With ten human answers, acc = mean over them of min(1, matches among the other nine / 3): 0.3, 0.6, 0.9 and then 1 for an answer
that 1, 2, 3 or more people gave (Antol et al., ICCV 2015, section 4; https://visualqa.org/evaluation.html).

Both normalisations are the published ones, oddities included, since a score is comparable only under its own: `normalise` of
the official evaluator (GT-Vision-Lab/VQA, which VLMEvalKit uses) and `normalise_m4c` of Pythia's evaluator for TextVQA, used by
LLaVA-1.5 and the paper; it first drops commas and question marks and parts "'s" from its word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from components.errors import DataError

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0", **{word: str(value) for value, word in enumerate(NUMBERS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # the period of "3.5" stays
MOST_PERIODS = 32  # the official evaluator hands a flag to `sub` where the count belongs: it drops 32 at most

# Written without one of its apostrophes, each is mended: "dont" to "don't", "shouldnt've" to "shouldn't've".
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word for word in CONTRACTED.split() for index, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one that the official table takes apart


def accuracy(answer: str, references: Sequence[str], normalise: Callable[[str], str]) -> float:
    """The answer's worth, 0..1, given all human answers; one alone is worth 1 or 0, as there is no other to agree with.

    Raises DataError if there is no reference.
    """
    if not references:
        raise DataError("VQA accuracy needs a human answer to compare with, and there is none")
    normalised = normalise(answer)
    equal = [normalise(reference) == normalised for reference in references]
    if len(equal) == 1:
        return float(equal[0])
    return sum(min(1.0, (sum(equal) - match) / 3) for match in equal) / len(equal)


def normalise(text: str) -> str:
    """As GT-Vision-Lab/VQA does: punctuation, then digits for number words, no articles, apostrophes mended."""
    return _words(without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalise_m4c(text: str) -> str:
    """As Pythia's EvalAIAnswerProcessor does."""
    parted = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(parted)


def without_punctuation(text: str) -> str:
    """Each mark is dropped where a space is beside it somewhere, or a number holds a comma; else it becomes a space."""
    in_number = COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        dropped = in_number or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if dropped else " ")
    return PERIOD.sub("", stripped, count=MOST_PERIODS)


def _words(text: str) -> str:
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
