"""Multiple choice: which option an answer names, by ScienceQA's published rule; VLMEvalKit's is a scorer of the platform."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
