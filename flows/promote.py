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
from components.tracking.mlflow_registry import CANDIDATE, CHAMPION, Version, model_name
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
    registered = record.register(students, settings, best)
    if not mlflow_sync.try_sync(settings.runtime.tracking_uri):
        return registered, False
    if best.arm not in registered:  # registered before, and no longer the candidate
        client, model = _client(settings), model_name(settings.runtime.experiment)
        with _mlflow_errors():
            if version := mlflow_registry.by_md5(client, model, best.md5, best.arm):
                mlflow_registry.set_candidate(client, version)
    return registered, True


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
    client, model = _client(settings), model_name(settings.runtime.experiment)
    with _mlflow_errors():
        challenger = _challenger(client, model, candidate, settings)
        current = mlflow_registry.by_alias(client, model, CHAMPION)
    verdict = _verdict(challenger, current, settings, measure)
    with _mlflow_errors():
        _write_verdict(client, challenger, current, verdict)
    return verdict


def champion(settings: Settings) -> Version | None:
    """Current champion, or None. Raises InputError or TryAgainError as `promote`."""
    client = _client(settings)
    with _mlflow_errors():
        return mlflow_registry.by_alias(client, model_name(settings.runtime.experiment), CHAMPION)


def _mlflow_errors() -> AbstractContextManager[None]:
    return asking("MLflow does not answer", "the champion is as it was")


def _client(settings: Settings) -> Any:
    if settings.runtime.tracking_uri == JOURNAL_ONLY:
        raise InputError(
            "the champion is an alias in MLflow's registry, and params/runtime.yaml (or ALIGNTI_TRACKING_URI) asks for no"
            " MLflow; name an address there"
        )
    with _mlflow_errors():
        return client(settings.runtime.tracking_uri)


def _challenger(client: Any, model: str, name: str | None, settings: Settings) -> Version:
    """Version of the candidate; an arm is registered first. Raises InputError if there is none."""
    if name is None:
        version = mlflow_registry.by_alias(client, model, CANDIDATE)
        if version is None:
            raise InputError(f"no student of {model} is registered; `alignti register` registers those of this folder")
        return version
    if name.removeprefix("v").isdigit():
        version = mlflow_registry.by_number(client, model, name.removeprefix("v"))
        if version is None:
            raise InputError(f"{model} has no version {name}; MLflow's page Models lists them")
        return version
    if name not in settings.study.arms:
        raise InputError(f"{name!r} is neither a version nor an arm of params/study.yaml ({', '.join(settings.study.arms)})")
    (student,) = record.scored_students([name])
    record.register([student], settings, None)
    mlflow_sync.sync(settings.runtime.tracking_uri)
    version = mlflow_registry.by_md5(client, model, student.md5, name)
    if version is None:
        raise TryAgainError(f"{name} is registered, but MLflow does not show it yet")
    return version


def _verdict(challenger: Version, champion: Version | None, settings: Settings, measure: bool) -> Verdict:
    def contender(version: Version, predictions: list[Prediction] | None) -> Contender:
        accuracy = sum(p.correct for p in predictions) / len(predictions) if predictions else float(version.tags["exact_match"])
        return Contender(version=version.number, arm=version.arm, md5=version.md5, exact_match=accuracy)

    def decision(
        promoted: bool, why: str, difference: Difference | None = None, champion_answers: Answers | None = None
    ) -> Verdict:
        return Verdict(
            model=challenger.model,
            promoted=promoted,
            candidate=contender(challenger, None),
            champion=contender(champion, champion_answers and champion_answers[0]) if champion else None,
            difference=difference,
            why=why,
        )

    if champion is None:
        predictions = _recorded_answers(challenger)[0]
        accuracy, baseline = sum(p.correct for p in predictions) / len(predictions), majority_accuracy(predictions)
        recipe = f", recipe {challenger.tags['recipe']}" if "recipe" in challenger.tags else ""
        evidence = (
            f"{accuracy:.1%} on {len(predictions):,} questions{recipe};"
            f" the most frequent answer to each kind gives {baseline:.1%}"
        )
        if accuracy <= baseline:
            return decision(False, f"{challenger} is no champion: {evidence}")
        return decision(True, f"{challenger} is the first champion: {evidence}")
    if champion.md5 == challenger.md5:
        return decision(False, f"{challenger} has the bytes of the champion already")
    challenger_answers, champion_answers = _recorded_answers(challenger), _recorded_answers(champion)
    if measure and challenger_answers[1] != champion_answers[1]:
        champion_answers = _measure_answers(champion, settings)
    names = f"{challenger.arm}@{challenger.number}", f"{champion.arm}@{champion.number}"
    try:
        gap = paired_test(
            names, (challenger_answers[0], champion_answers[0]), (challenger_answers[1], champion_answers[1]), settings.evaluate
        )
    except MeasuredDifferently as error:
        advice = (
            f"{challenger} was measured otherwise than this folder measures: `make repro` and `alignti register` do it anew"
            if measure
            else "`alignti promote --measure` asks it the questions of this folder's test split"
        )
        raise MeasuredDifferently(f"{error}: their scores do not compare, and {champion} stays; {advice}") from None
    low, high = (100 * bound for bound in gap.ci95)
    evidence = (
        f"{100 * gap.difference:+.2f} points ({settings.evaluate.confidence:.0%} interval {low:+.2f} to {high:+.2f},"
        f" p = {gap.p_value:.2g}) on {len(challenger_answers[0]):,} questions against {champion}"
    )
    better = gap.difference > 0 and gap.larger_than_noise
    conclusion = (
        f"{challenger} is the champion: {evidence}" if better else f"{champion} stays the champion: {challenger} has {evidence}"
    )
    return decision(better, conclusion if better else f"{conclusion}, which is no lead beyond chance", gap, champion_answers)


def _recorded_answers(version: Version) -> Answers:
    """Predictions of the version as its stage `evaluate` wrote them. Raises InputError if DVC does not have them here."""
    md5 = version.tags.get("dvc.scores")
    if md5 is None:
        raise InputError(f"{version} says no `dvc.scores`, so its answers cannot be found; register it anew")
    with tempfile.TemporaryDirectory() as folder:
        try:
            dvc.checkout_folder(md5, Path(folder) / "scores")
        except InputError as error:
            raise InputError(f"the answers of {version} are not here: {error}") from None
        fingerprint = TypeAdapter(Fingerprint | None).validate_json(version.tags.get(FINGERPRINT, "null"))
        return Prediction.read_lines(Path(folder) / "scores/predictions.jsonl"), fingerprint


def _measure_answers(version: Version, settings: Settings) -> Answers:
    """Predictions of the version on this folder's questions. Raises InputError if DVC does not have its weights here."""
    from components.model_registry import measure

    with tempfile.TemporaryDirectory() as folder:
        try:
            dvc.checkout_folder(version.md5, Path(folder) / "student")
        except InputError as error:
            raise InputError(f"the weights of {version} are not here: {error}") from None
        return measure.answers(Path(folder) / "student/model", f"champion {version.arm}", settings)


def _write_verdict(client: Any, challenger: Version, champion: Version | None, verdict: Verdict) -> None:
    tags, gap = {"promotion": verdict.why}, verdict.difference
    if gap is not None and verdict.champion is not None:
        tags |= {
            "promotion.against": verdict.champion.version,
            "promotion.difference": f"{gap.difference:.6f}",
            "promotion.p_value": f"{gap.p_value:.6g}",
        }
    if verdict.promoted:
        mlflow_registry.set_champion(client, challenger, champion, tags)
    elif champion is not None and champion.number != challenger.number:
        mlflow_registry.set_tags(client, challenger, tags)
