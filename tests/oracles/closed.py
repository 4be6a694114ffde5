"""Yes/no answers as three protocols read them. They differ on verbose answers, so a score names its reader."""

from __future__ import annotations

from tests.oracles.vqa import without_punctuation


def verdict_vlmeval(answer: str) -> str | None:
    """VLMEvalKit (`YOrN_Extraction`): "yes" or "no" if exactly one of them is a word of the answer, else None."""
    words = {"yes", "no"} & set(without_punctuation(answer.lower()).split())
    return words.pop() if len(words) == 1 else None


def verdict_pope(answer: str) -> str:
    """POPE as its authors and LLaVA-1.5 read it (`eval_pope.py`): "no" if the first sentence holds No, no or not, else "yes".

    So silence, and any language other than English, says yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def verdict_mme(answer: str) -> str | None:
    """MME's own tool (`calculation.py`): the answer, or else its first four letters, must hold "yes" or "no"."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None
