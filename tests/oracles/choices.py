"""Multiple choice: which option an answer names, by two published rules."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
