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
    yes_no: dict[str, dict[str, YesNo]]  # by kind
    yes_no_overall: dict[str, YesNo | None]
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
    aligned = _align(predictions)
    return Outcomes(
        predictions=aligned,
        likelihoods={arm: _likelihoods(arm, results) for arm, results in aligned.items()},
        yes_no={arm: results.yes_no for arm, results in scores.items()},
        yes_no_overall={arm: results.yes_no_overall for arm, results in scores.items()},
        fingerprints={arm: results.fingerprint for arm, results in scores.items()},
        costs={arm: Cost.read(STUDENTS / arm / "cost.json") for arm in arms},
        losses={arm: parsed_lines(STUDENTS / arm / "losses.jsonl") for arm in arms},
    )


def images_of(questions: Sequence[Prediction], split: Split) -> dict[str, tuple[bytes, ...]]:
    """Sample id -> images of the question. Raises DataError if the data set lacks one."""
    stored = Samples(DATASET, split).images_of({p.image_id for p in questions})
    if missing := [p.image_id for p in questions if p.image_id not in stored]:
        raise DataError(f"{DATASET} has no image {missing[0]!r} in split {split}; `dvc repro` evaluates anew")
    return {p.id: stored[p.image_id][: p.question.count(IMAGE)] for p in questions}


def _likelihoods(arm: str, predictions: list[Prediction]) -> list[Likelihood]:
    """Likelihoods in the order of `predictions`. Raises DataError unless the samples agree and a student's have their KL."""
    path = SCORES / arm / "likelihoods.jsonl"
    by_id = {likelihood.id: likelihood for likelihood in Likelihood.read_lines(path)}
    if by_id.keys() != {p.id for p in predictions}:
        raise DataError(
            f"{path} is of other samples than predictions.jsonl; `python -m components.evaluate --arm {arm}` makes both"
        )
    if arm != TEACHER_ARM and any(likelihood.kl is None for likelihood in by_id.values()):
        raise DataError(f"{path} was made without a teacher; `python -m components.evaluate --arm {arm}` makes it anew")
    return [by_id[p.id] for p in predictions]


def _align(predictions: dict[str, list[Prediction]]) -> dict[str, list[Prediction]]:
    """Every arm's predictions in the teacher's order of samples. Raises DataError unless all answered the same questions."""
    questions = {
        arm: {p.id: (p.image_id, p.kind, p.question, p.reference) for p in items} for arm, items in predictions.items()
    }
    expected = questions[TEACHER_ARM]
    aligned = {}
    for arm, arm_predictions in predictions.items():
        by_id = {p.id: p for p in arm_predictions}
        if len(by_id) != len(arm_predictions):
            duplicate = next(id_ for id_, count in Counter(p.id for p in arm_predictions).items() if count > 1)
            raise DataError(f"{SCORES / arm}: sample {duplicate!r} is scored more than once; evaluate {arm} anew")
        if differing := sorted(id_ for id_ in by_id.keys() | expected.keys() if questions[arm].get(id_) != expected.get(id_)):
            raise DataError(
                f"{arm} and the teacher were scored on different samples ({len(differing)} differ, first {differing[0]!r}), so"
                f" their scores cannot be compared; `dvc repro` evaluates both on one split"
            )
        aligned[arm] = [by_id[id_] for id_ in expected]
    return aligned
