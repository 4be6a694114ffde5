"""Optional scorers beside exact match, chosen in params/evaluate.yaml: ANLS, relaxed accuracy, choice letters.

Rules as in the published benchmarks, with one reference per question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from unicodedata import normalize

from components.evaluate.metrics import fold_case, matches
from components.records.evaluate import Prediction

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
WORDS_AFTER = 5  # VLMEvalKit accepts a letter only among the last words
REFUSALS = (  # answers that match no option, whatever letter they contain
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# Option of a question ("A. cat", "(B) dog", "C: a bird"), on a line of its own or after another option.
OPTION = re.compile(r"(?:^|\s)\(?([A-Z])[.):]\s+(.+?)(?=\s+\(?[A-Z][.):]\s|\s*\n|\s*$)")


@dataclass(frozen=True)
class Scorer:
    title: str
    note: str  # scoring rule, for the report
    score: Callable[[Prediction], float]  # score of an answer, 0..1


def mean(scorer: str, predictions: Sequence[Prediction]) -> float:
    return fmean(SCORERS[scorer].score(p) for p in predictions)


def choice(prediction: Prediction) -> float:
    """1 if answer and reference name the same option of the question, else 0; without two options, exact match.

    The text of an option, word for word, names it. By the kit's rule alone "A dog" and "A bird" would both be option A.
    """
    options = dict(OPTION.findall(prediction.question))
    if len(options) < 2:
        return float(matches(prediction.answer, prediction.reference))
    answer, correct = (
        next((letter for letter, option in options.items() if matches(text, option)), None) or letter_vlmeval(text, options)
        for text in (prediction.answer, prediction.reference)
    )
    return float(correct is not None and answer == correct)


def anls(answer: str, reference: str) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - NL, 0 from NL = 0.5 on.

    Biten et al., Scene Text Visual Question Answering, ICCV 2019, equation 1: NL is the edit distance over the longer length.
    VLMEvalKit keeps a similarity of exactly 0.5, which the equation sets to 0; here the equation holds.
    """
    prediction, target = _normalise_space(answer), _normalise_space(reference)
    max_length = max(len(prediction), len(target))
    if not max_length:
        return 1.0
    if abs(len(prediction) - len(target)) >= ANLS_THRESHOLD * max_length:
        return 0.0  # lower bound from the lengths alone: skips the quadratic distance for an answer of 100 kB
    distance = edit_distance(prediction, target) / max_length
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def relaxed(answer: str, reference: str) -> float:
    """ChartQA: within 5% of a number, else equal to a text, case aside (Masry et al., Findings of ACL 2022, section 5.1).

    A percentage counts as its hundredth; 0 has no relative error, so it is compared as text (Pix2Struct's evaluator).
    """
    answer, reference = answer.strip(), reference.strip()
    prediction, target = _number(answer), _number(reference)
    if prediction is not None and target:
        return float(abs(prediction - target) / abs(target) <= RELAXED_TOLERANCE)
    return float(fold_case(answer) == fold_case(reference))


def letter_vlmeval(answer: str, options: Mapping[str, str]) -> str | None:
    """Option named by an answer, by VLMEvalKit's rule without a judge: one letter among the last words, else one option's text.

    Source: vlmeval/utils/matching_util.py, `can_infer`. None for a letter earlier in the sentence, two letters, or a text much
    longer than the options. In a short answer the article "A" counts as the letter, as in the kit.
    """
    if any(phrase in answer for phrase in REFUSALS):
        return None
    words = answer.translate(SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - WORDS_AFTER:
        return letters[0]
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    quoted = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return quoted[0] if len(quoted) == 1 else None


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _normalise_space(text: str) -> str:
    return " ".join(normalize("NFC", text).lower().split())


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


SCORERS = {
    "anls": Scorer(
        "ANLS",
        "1 less the edit distance to the reference over the longer length, 0 from a half on (Biten et al., ICCV 2019)",
        lambda p: anls(p.answer, p.reference),
    ),
    "relaxed_accuracy": Scorer(
        "relaxed accuracy",
        "within 5% of a number, else the same text, case aside (ChartQA)",
        lambda p: relaxed(p.answer, p.reference),
    ),
    "choice": Scorer(
        "choice letters",
        "answer and reference name the same option of the question, by its whole text, else read as VLMEvalKit does without a"
        " judge; a question without options is scored by exact match",
        choice,
    ),
}
