"""Model registry in MLflow: one registered model, named after the experiment, with a version per student.

A version points to an external logged model: its weights stay with DVC, under the md5 in its tag `dvc.md5`. The alias
`candidate` marks the best student registered last, `champion` the one to beat (`alignti promote`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

CANDIDATE, CHAMPION = "candidate", "champion"
MD5 = "dvc.md5"  # tag: MD5 of the student's folder
REGISTERED = "registered"  # ms since 1970
VERSION_TAGS = ("arm", "recipe", "exact_match", MD5)  # tags of a version; the others are on its logged model
SCORED = ("dvc.scores", "eval.fingerprint", "exact_match", "samples", "run.scores", REGISTERED)  # tags: of the scores
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such model or run; no such alias or version, malformed id
T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """Registered model version of one student."""

    model: str
    number: str
    arm: str
    md5: str
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"version {self.number} ({self.arm})"


def model_name(experiment: str) -> str:
    """Name of the experiment's registered model: MLflow takes neither paths, which Databricks' experiments are, nor quotes."""
    return re.sub(r"[/:']|^\.+$", "-", experiment)


def register(client: Any, run_id: str, line: Mapping[str, Any]) -> None:
    """Create the model version of a journal's `register` event; one that exists gets the tags of scores measured since.

    A candidate takes that alias from those registered before it. `run_id` is the run of the outcome; the version's own run is
    the training that made the bytes, if MLflow has it.
    """
    import mlflow

    experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    training_runs = client.search_runs([experiment.experiment_id], f"tags.`alignti.run` = '{line['made_by']}'", max_results=1)
    source = training_runs[0].info.run_id if training_runs else run_id
    model = model_name(experiment.name)
    _create_model(client, model)
    md5 = line["tags"][MD5]
    version = by_md5(client, model, md5, line["tags"]["arm"])
    tags = {**line["tags"], "run.scores": run_id, REGISTERED: str(line["time"])}
    if version is None:
        logged = mlflow.create_external_model(
            tags["arm"], source, tags=tags, params=line["params"], experiment_id=experiment.experiment_id
        )
        created = client.create_model_version(
            model, logged.model_uri, source, model_id=logged.model_id, description=line["description"],
            tags={key: tags[key] for key in VERSION_TAGS if key in tags},
        )  # fmt: skip
        version = _version(client, created)
    elif int(version.tags.get(REGISTERED, 0)) < line["time"]:
        _set_scores(client, version, {key: tags[key] for key in SCORED if key in tags}, line["description"])
    if line["candidate"]:
        current = by_alias(client, model, CANDIDATE)
        if current is None or int(current.tags.get(REGISTERED, 0)) <= line["time"]:
            set_candidate(client, version)


def _set_scores(client: Any, version: Version, tags: Mapping[str, str], description: str) -> None:
    set_tags(client, version, {key: value for key, value in tags.items() if key in VERSION_TAGS})
    client.update_model_version(version.model, version.number, description=description)
    model_id = client.get_model_version(version.model, version.number).source.removeprefix("models:/")
    client.set_logged_model_tags(model_id, tags)  # at last: the time among them says that all are set


def set_candidate(client: Any, version: Version) -> None:
    client.set_registered_model_alias(version.model, CANDIDATE, version.number)


def by_alias(client: Any, model: str, alias: str) -> Version | None:
    """Version with the alias, or None."""
    return none_if_absent(lambda: _version(client, client.get_model_version_by_alias(model, alias)))


def by_number(client: Any, model: str, number: str) -> Version | None:
    return none_if_absent(lambda: _version(client, client.get_model_version(model, number)))


def by_md5(client: Any, model: str, md5: str, arm: str) -> Version | None:
    """Version with this md5 and arm; students of two arms may have equal bytes."""
    versions = client.search_model_versions(f"name = '{model}' and tags.`{MD5}` = '{md5}' and tags.arm = '{arm}'")
    return _version(client, client.get_model_version(model, versions[0].version)) if versions else None


def set_champion(client: Any, version: Version, predecessor: Version | None, tags: Mapping[str, str]) -> None:
    """Set the alias `champion`; tags record the reason on `version`, and its number on its predecessor."""
    set_tags(client, version, tags)
    client.update_model_version(version.model, version.number, description=tags["promotion"])
    client.set_registered_model_alias(version.model, CHAMPION, version.number)
    if predecessor is not None:
        client.set_model_version_tag(predecessor.model, predecessor.number, "succeeded_by", version.number)


def set_tags(client: Any, version: Version, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.model, version.number, key, value)


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Students distilled with Align-TI; their weights are DVC's.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def none_if_absent(read: Callable[[], T]) -> T | None:
    """Result of `read`, a request to MLflow; None if MLflow has no such object."""
    from mlflow.exceptions import MlflowException

    try:
        return read()
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def _version(client: Any, model_version: Any) -> Version:
    tags = {**client.get_logged_model(model_version.source.removeprefix("models:/")).tags, **model_version.tags}
    return Version(model_version.name, str(model_version.version), tags.get("arm", "?"), tags.get(MD5, "?"), tags)
