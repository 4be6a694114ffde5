"""Registration and promotion: `alignti register`, `alignti promote`.

A candidate takes the alias `champion` only if its exact match on the same questions is higher than the champion's, beyond
chance (components/model_registry/paired_test.py). The predictions of both are those in DVC's cache.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from components.config.load import load_settings
from components.config.settings import Settings
from components.errors import AlignTIError, InputError, TryAgainError
from components.model_registry import record
from components.model_registry.paired_test import MeasuredDifferently, majority_accuracy, paired_test
from components.records.compare import Difference
from components.records.evaluate import Fingerprint, Prediction
from components.records.record import Record
from components.tracking import journal, mlflow_registry, mlflow_sync
from components.tracking.mlflow_client import asking, client
from components.tracking.mlflow_registry import CANDIDATE, CHAMPION, Version
from components.tracking.outcome import FINGERPRINT
from components.tracking.stage_run import JOURNAL_ONLY
from flows import dvc

Answers = tuple[list[Prediction], Fingerprint | None]


class Contender(Record):
    """Registered student in a verdict."""

    version: str
    arm: str
    md5: str
    exact_match: float  # on the questions of this comparison


class Verdict(Record):
    """Decision of `promote`, with its evidence."""

    model: str
    promoted: bool
    candidate: Contender
    champion: Contender | None  # the previous one; None: there was none
    difference: Difference | None  # candidate minus champion; None: nothing to compare
    why: str


def register(arms: list[str], settings: Settings) -> tuple[list[str], bool]:
    """Register these arms of the folder in MLflow, the best of them as the candidate.

    Returns the new ones, and whether all were sent to MLflow. Raises DataError if one has not been trained and scored.
    """
    students = record.scored_students(arms)
    best = record.best(students)
    told = record.register(students, settings, best)
    if not mlflow_sync.try_sync(settings.runtime.tracking_uri):
        return told, False
    if best.arm not in told:  # registered before, and no longer the candidate
        client, model = _client(settings), settings.runtime.experiment
        with _asking():
            if known := mlflow_registry.by_md5(client, model, best.md5, best.arm):
                mlflow_registry.set_candidate(client, known)
    return told, True


def register_all() -> None:
    """`register` for every arm, at the end of a finished pipeline: a fault costs a warning."""
    try:
        settings = load_settings()
        register(list(settings.study.arms), settings)
    except (AlignTIError, OSError) as error:
        journal.warn(f"the students are not registered: {error}; `alignti register` does it")


def promote(candidate: str | None, settings: Settings, measure: bool = False) -> Verdict:
    """Make `candidate` (an arm of this folder or a version; none: the alias `candidate`) the champion, if it is better.

    `measure`: evaluate the champion on the current questions, if its fingerprint differs.

    Raises:
        InputError: no such student, or no MLflow.
        MeasuredDifferently: the two scores are not comparable.
        TryAgainError: MLflow does not answer.
    """
    client, model = _client(settings), settings.runtime.experiment
    with _asking():
        challenger = _challenger(client, model, candidate, settings)
        before = mlflow_registry.by_alias(client, model, CHAMPION)
    verdict = _verdict(challenger, before, settings, measure)
    with _asking():
        _write(client, challenger, before, verdict)
    return verdict


def champion(settings: Settings) -> Version | None:
    """Current champion, or None. Raises InputError or TryAgainError as `promote`."""
    client = _client(settings)
    with _asking():
        return mlflow_registry.by_alias(client, settings.runtime.experiment, CHAMPION)


def _asking() -> AbstractContextManager[None]:
    return asking("MLflow does not answer", "the champion is as it was")


def _client(settings: Settings) -> Any:
    if settings.runtime.tracking_uri == JOURNAL_ONLY:
        raise InputError(
            "the champion is an alias in MLflow's registry, and params/runtime.yaml (or ALIGNTI_TRACKING_URI) asks for no"
            " MLflow; name an address there"
        )
    with _asking():
        return client(settings.runtime.tracking_uri)


def _challenger(client: Any, model: str, asked: str | None, settings: Settings) -> Version:
    """Version of the candidate; an arm is registered first. Raises InputError if there is none."""
    if asked is None:
        found = mlflow_registry.by_alias(client, model, CANDIDATE)
        if found is None:
            raise InputError(f"no student of {model} is registered; `alignti register` registers those of this folder")
        return found
    if asked.removeprefix("v").isdigit():
        found = mlflow_registry.by_number(client, model, asked.removeprefix("v"))
        if found is None:
            raise InputError(f"{model} has no version {asked}; MLflow's page Models lists them")
        return found
    if asked not in settings.study.arms:
        raise InputError(f"{asked!r} is neither a version nor an arm of params/study.yaml ({', '.join(settings.study.arms)})")
    (student,) = record.scored_students([asked])
    record.register([student], settings, None)
    mlflow_sync.sync(settings.runtime.tracking_uri)
    found = mlflow_registry.by_md5(client, model, student.md5, asked)
    if found is None:
        raise TryAgainError(f"{asked} is registered, but MLflow does not show it yet")
    return found


def _verdict(challenger: Version, champion: Version | None, settings: Settings, measure: bool) -> Verdict:
    def contender(version: Version, answers: list[Prediction] | None) -> Contender:
        right = sum(p.correct for p in answers) / len(answers) if answers else float(version.tags["exact_match"])
        return Contender(version=version.number, arm=version.arm, md5=version.md5, exact_match=right)

    def decided(promoted: bool, why: str, difference: Difference | None = None, theirs: Answers | None = None) -> Verdict:
        return Verdict(
            model=challenger.model,
            promoted=promoted,
            candidate=contender(challenger, None),
            champion=contender(champion, theirs and theirs[0]) if champion else None,
            difference=difference,
            why=why,
        )

    if champion is None:
        answered = _recorded(challenger)[0]
        right, floor = sum(p.correct for p in answered) / len(answered), majority_accuracy(answered)
        recipe = f", recipe {challenger.tags['recipe']}" if "recipe" in challenger.tags else ""
        found = f"{right:.1%} on {len(answered):,} questions{recipe}; the most frequent answer to each kind gives {floor:.1%}"
        if right <= floor:
            return decided(False, f"{challenger} is no champion: {found}")
        return decided(True, f"{challenger} is the first champion: {found}")
    if champion.md5 == challenger.md5:
        return decided(False, f"{challenger} has the bytes of the champion already")
    ours, theirs = _recorded(challenger), _recorded(champion)
    if measure and ours[1] != theirs[1]:
        theirs = _measured(champion, settings)
    names = f"{challenger.arm}@{challenger.number}", f"{champion.arm}@{champion.number}"
    try:
        gap = paired_test(names, (ours[0], theirs[0]), (ours[1], theirs[1]), settings.evaluate)
    except MeasuredDifferently as error:
        raise MeasuredDifferently(
            f"{error}: their scores do not compare, and {champion} stays; `alignti promote --measure` asks it the questions of"
            " this folder's test split"
        ) from None
    low, high = (100 * bound for bound in gap.ci95)
    found = (
        f"{100 * gap.difference:+.2f} points ({settings.evaluate.confidence:.0%} interval {low:+.2f} to {high:+.2f},"
        f" p = {gap.p_value:.2g}) on {len(ours[0]):,} questions against {champion}"
    )
    better = gap.difference > 0 and gap.larger_than_noise
    said = f"{challenger} is the champion: {found}" if better else f"{champion} stays the champion: {challenger} has {found}"
    return decided(better, said if better else f"{said}, which is no lead beyond chance", gap, theirs)


def _recorded(version: Version) -> Answers:
    """Predictions of the version as its stage `evaluate` wrote them. Raises InputError if DVC does not have them here."""
    md5 = version.tags.get("dvc.scores")
    if md5 is None:
        raise InputError(f"{version} says no `dvc.scores`, so its answers cannot be found; register it anew")
    with tempfile.TemporaryDirectory() as folder:
        try:
            dvc.bring(md5, Path(folder) / "scores")
        except InputError as error:
            raise InputError(f"the answers of {version} are not here: {error}") from None
        fingerprint = TypeAdapter(Fingerprint | None).validate_json(version.tags.get(FINGERPRINT, "null"))
        return Prediction.read_lines(Path(folder) / "scores/predictions.jsonl"), fingerprint


def _measured(version: Version, settings: Settings) -> Answers:
    """Predictions of the version on this folder's questions. Raises InputError if DVC does not have its weights here."""
    from components.model_registry import measure

    with tempfile.TemporaryDirectory() as folder:
        try:
            dvc.bring(version.md5, Path(folder) / "student")
        except InputError as error:
            raise InputError(f"the weights of {version} are not here: {error}") from None
        return measure.answers(Path(folder) / "student/model", f"champion {version.arm}", settings)


def _write(client: Any, challenger: Version, champion: Version | None, verdict: Verdict) -> None:
    why, gap = {"promotion": verdict.why}, verdict.difference
    if gap is not None and verdict.champion is not None:
        why |= {
            "promotion.against": verdict.champion.version,
            "promotion.difference": f"{gap.difference:.6f}",
            "promotion.p_value": f"{gap.p_value:.6g}",
        }
    if verdict.promoted:
        mlflow_registry.set_champion(client, challenger, champion, why)
    elif champion is not None and champion.number != challenger.number:
        mlflow_registry.set_tags(client, challenger, why)
