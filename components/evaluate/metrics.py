"""Metrics of an answer: normalised exact match, token F1, and POPE-style figures for the yes/no kinds.

Normalisation: case folding, Unicode NFC, runs of white space to one space, final punctuation (`.,;:!?` and its wide forms)
dropped, unless there is nothing else. Exact match: the normalised answer equals the normalised reference.

Token F1 is SQuAD's (Rajpurkar et al., EMNLP 2016) over lower-case words, each counted as often as it occurs; articles count.
It gives partial credit for an answer of several parts.

Yes/no figures follow POPE (Li et al., EMNLP 2023), "yes" being the positive class. An answer is yes if "yes" is among its
words and "no" is not, and vice versa. An answer with neither, or both, is wrong whatever the reference, and counts as
"no" in the yes ratio. A ratio whose denominator is zero is 0.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from unicodedata import category, normalize

from components.dataset.shards import Sample
from components.errors import DataError
from components.records.evaluate import Prediction, Scores, YesNo

FINAL = ".,;:!? \u3002\uff0c\uff1b\uff1a\uff01\uff1f"  # final punctuation; after the space the fullwidth forms


def fold_case(text: str) -> str:
    """Canonical caseless form, equal for canonically equal texts: the Unicode Standard, section 3.13, D145."""
    return normalize("NFC", normalize("NFD", text).casefold())


def normalise(text: str) -> str:
    words = " ".join(fold_case(text).split())
    return words.rstrip(FINAL) or words


def matches(answer: str, reference: str) -> bool:
    return normalise(answer) == normalise(reference)


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words; 1 if answer and reference have none."""
    answer_words, reference_words = Counter(_words(answer)), Counter(_words(reference))
    total = answer_words.total() + reference_words.total()
    return 2 * (answer_words & reference_words).total() / total if total else 1.0


def _words(text: str) -> list[str]:
    """Runs of letters, digits and the marks combined with them, such as the vowels of Devanagari."""
    return "".join(c if c.isalnum() or c == "_" or category(c).startswith("M") else " " for c in fold_case(text)).split()


def predictions(samples: Iterable[Sample], answers: Iterable[str]) -> list[Prediction]:
    """Predictions: each sample's first question with its reference, the answer, and whether they match."""
    return [
        Prediction(
            id=sample.id,
            image_id=sample.image_id,
            kind=sample.kind,
            question=sample.turns[0].question,
            reference=sample.turns[0].answer,
            answer=answer,
            correct=matches(answer, sample.turns[0].answer),
        )
        for sample, answer in zip(samples, answers, strict=True)
    ]


def score(arm: str, predictions: Sequence[Prediction]) -> Scores:
    """Scores of one arm; kinds in alphabetical order. A yes/no kind is one whose references are all yes or no.

    Raises DataError if there are no predictions.
    """
    if not predictions:
        raise DataError(f"{arm}: there are no answers to score")
    kinds: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        kinds[prediction.kind].append(prediction)
    yes_no_kinds = {kind: group for kind, group in sorted(kinds.items()) if _is_yes_no(group)}
    pairs = {kind: [(p.answer, p.reference) for p in group] for kind, group in yes_no_kinds.items()}
    return Scores(
        arm=arm,
        samples=len(predictions),
        exact_match=_share(p.correct for p in predictions),
        per_kind={kind: _share(p.correct for p in group) for kind, group in sorted(kinds.items())},
        yes_no={kind: yes_no(pairs[kind]) for kind in pairs},
        yes_no_overall=yes_no(chain.from_iterable(pairs.values())) if pairs else None,
        token_f1=_mean_f1(predictions),
        token_f1_per_kind={kind: _mean_f1(group) for kind, group in sorted(kinds.items())},
    )


def yes_no(pairs: Iterable[tuple[str, str]]) -> YesNo:
    """POPE's figures over (answer, reference) pairs, each reference being yes or no."""
    verdicts = [(_verdict(answer), _verdict(reference)) for answer, reference in pairs]
    predicted_yes = sum(answer == "yes" for answer, _ in verdicts)
    actual_yes = sum(reference == "yes" for _, reference in verdicts)
    hits = verdicts.count(("yes", "yes"))
    return YesNo(
        samples=len(verdicts),
        accuracy=_ratio(hits + verdicts.count(("no", "no")), len(verdicts)),
        precision=_ratio(hits, predicted_yes),
        recall=_ratio(hits, actual_yes),
        f1=_ratio(2 * hits, predicted_yes + actual_yes),
        yes_ratio=_ratio(predicted_yes, len(verdicts)),
    )


def _is_yes_no(group: Sequence[Prediction]) -> bool:
    return all(normalise(p.reference) in ("yes", "no") for p in group)


def _verdict(text: str) -> str | None:
    """ "yes", "no", or None for an answer with neither or both."""
    words = {"yes", "no"} & set(re.findall(r"\w+", text.casefold()))
    return words.pop() if len(words) == 1 else None


def _mean_f1(group: Sequence[Prediction]) -> float:
    return sum(token_f1(p.answer, p.reference) for p in group) / len(group)


def _share(correct: Iterable[bool]) -> float:
    marks = list(correct)
    return _ratio(sum(marks), len(marks))


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0
