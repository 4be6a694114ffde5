"""Results of the stages before `compare`, loaded and checked: every arm answered the same questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from components.dataset.shards import Samples
from components.errors import DataError
from components.models.template import IMAGE
from components.records.distill import Cost
from components.records.evaluate import Fingerprint, Likelihood, Prediction, Scores, YesNo
from components.records.paths import DATASET, SCORES, STUDENTS, TEACHER_ARM, Split
from components.records.record import parsed_lines

Losses = dict[str, list[dict[str, float]]]  # arm -> one row per logged step


@dataclass(frozen=True)
class Outcomes:
    """Results per trained student, in the order of the study; all but `costs` and `losses` include the teacher."""

    predictions: dict[str, list[Prediction]]  # all arms: the same questions in the same order
    likelihoods: dict[str, list[Likelihood]]  # same order
    yes_no: dict[str, dict[str, YesNo]]
    fingerprints: dict[str, Fingerprint | None]
    costs: dict[str, Cost]
    losses: Losses


def read(arms: Iterable[str]) -> Outcomes:
    """Outcomes of all arms. Raises DataError if a file is missing or malformed, or if the arms' samples differ."""
    arms = list(arms)
    scores = {arm: Scores.read(SCORES / arm / "scores.json") for arm in [TEACHER_ARM, *arms]}
    predictions = {arm: Prediction.read_lines(SCORES / arm / "predictions.jsonl") for arm in scores}
    if not predictions[TEACHER_ARM]:
        raise DataError(f"{SCORES / TEACHER_ARM}/predictions.jsonl is empty: nothing to compare")
    aligned = _aligned(predictions)
    return Outcomes(
        predictions=aligned,
        likelihoods={arm: _likelihoods(arm, found) for arm, found in aligned.items()},
        yes_no={arm: found.yes_no for arm, found in scores.items()},
        fingerprints={arm: found.fingerprint for arm, found in scores.items()},
        costs={arm: Cost.read(STUDENTS / arm / "cost.json") for arm in arms},
        losses={arm: parsed_lines(STUDENTS / arm / "losses.jsonl") for arm in arms},
    )


def images_of(asked: Sequence[Prediction], split: Split) -> dict[str, tuple[bytes, ...]]:
    """Sample id -> images of the question. Raises DataError if the data set lacks one."""
    stored = Samples(DATASET, split).images_of({p.image_id for p in asked})
    if missing := [p.image_id for p in asked if p.image_id not in stored]:
        raise DataError(f"{DATASET} has no image {missing[0]!r} in split {split}; `dvc repro` evaluates anew")
    return {p.id: stored[p.image_id][: p.question.count(IMAGE)] for p in asked}


def _likelihoods(arm: str, predictions: list[Prediction]) -> list[Likelihood]:
    """Likelihoods in the order of `predictions`. Raises DataError unless the samples agree and a student's have their KL."""
    path = SCORES / arm / "likelihoods.jsonl"
    by_id = {one.id: one for one in Likelihood.read_lines(path)}
    if by_id.keys() != {p.id for p in predictions}:
        raise DataError(
            f"{path} is of other samples than predictions.jsonl; `python -m components.evaluate --arm {arm}` makes both"
        )
    if arm != TEACHER_ARM and any(one.kl is None for one in by_id.values()):
        raise DataError(f"{path} was made without a teacher; `python -m components.evaluate --arm {arm}` makes it anew")
    return [by_id[p.id] for p in predictions]


def _aligned(predictions: dict[str, list[Prediction]]) -> dict[str, list[Prediction]]:
    """Every arm's predictions in the teacher's order of samples. Raises DataError unless all answered the same questions."""
    asked = {arm: {p.id: (p.image_id, p.kind, p.question, p.reference) for p in found} for arm, found in predictions.items()}
    teachers = asked[TEACHER_ARM]
    aligned = {}
    for arm, answers in predictions.items():
        by_id = {p.id: p for p in answers}
        if len(by_id) != len(answers):
            twice = next(id_ for id_, count in Counter(p.id for p in answers).items() if count > 1)
            raise DataError(f"{SCORES / arm}: sample {twice!r} is scored more than once; evaluate {arm} anew")
        if odd := sorted(id_ for id_ in by_id.keys() | teachers.keys() if asked[arm].get(id_) != teachers.get(id_)):
            raise DataError(
                f"{arm} and the teacher were scored on different samples ({len(odd)} differ, first {odd[0]!r}), so their scores"
                f" cannot be compared; `dvc repro` evaluates both on one split"
            )
        aligned[arm] = [by_id[id_] for id_ in teachers]
    return aligned
