"""Multiple choice: which option an answer names, and the orders in which options are shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

import numpy as np

SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
WORDS_AFTER = 5  # VLMEvalKit takes a letter for the answer only if it is among the last words
REFUSALS = (  # no option, whatever letter they hold
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
STATED = re.compile(r"The answer is ([A-Z]).")


def letter_scienceqa(answer: str, options: Mapping[str, str]) -> str | None:
    """As the paper's ScienceQA script reads it: the letter alone, `A. ...`, or once `The answer is A.`; nothing else counts.

    Source: eval_science_qa.py of LLaVA-1.5, and the same file in the authors' release.
    """
    if answer in options:
        return answer
    if len(answer) >= 3 and answer[0] in options and answer[1:3] == ". ":
        return answer[0]
    stated = STATED.findall(answer)
    return stated[0] if len(stated) == 1 and stated[0] in options else None


def letter_vlmeval(answer: str, options: Mapping[str, str]) -> str | None:
    """As VLMEvalKit reads it without a judge (`exact_matching`): one letter among the last words, else one option's text.

    Source: vlmeval/utils/matching_util.py, `can_infer`. A letter earlier in the sentence, two letters, or a text much longer
    than the options name nothing. An article "A" among few words is taken for the letter, as the kit does.
    """
    if any(phrase in answer for phrase in REFUSALS):
        return None
    words = answer.translate(SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - WORDS_AFTER:
        return named[0]
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    quoted = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return quoted[0] if len(quoted) == 1 else None


def rotations(options: Sequence[str]) -> list[list[str]]:
    """Every order of circular evaluation: the options moved on by 0, 1, ... places (Liu et al., MMBench, ECCV 2024).

    A question counts as right only if it is answered right in every order.
    """
    return [[*options[start:], *options[:start]] for start in range(len(options))]


def shuffled(options: Sequence[str], seed: int) -> list[str]:
    """The options in an order drawn by `seed`: what a model that favours a letter loses by."""
    return [options[place] for place in np.random.default_rng(seed).permutation(len(options))]


def lettered(options: Sequence[str]) -> dict[str, str]:
    """A, B, C, ... for the options in order."""
    return dict(zip(ascii_uppercase, options, strict=False))
