"""Model registry in MLflow: one registered model, named after the experiment, with a version per student.

A version points to an external logged model: its weights stay with DVC, under the md5 in its tag `dvc.md5`. The alias
`candidate` marks the best student registered last, `champion` the one to beat (`alignti promote`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

CANDIDATE, CHAMPION = "candidate", "champion"
MD5 = "dvc.md5"  # tag: MD5 of the student's folder
REGISTERED = "registered"  # ms since 1970
ON_THE_ROW = ("arm", "recipe", "exact_match", MD5)  # tags of a version; the others are on its logged model
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


def register(client: Any, run_id: str, line: Mapping[str, Any]) -> None:
    """Create the model version of a journal's `register` event, unless it exists.

    A candidate takes that alias from those registered before it. `run_id` is the run of the outcome; the version's own run is
    the training that made the bytes, if MLflow has it.
    """
    import mlflow

    experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    trained = client.search_runs([experiment.experiment_id], f"tags.`alignti.run` = '{line['made_by']}'", max_results=1)
    source = trained[0].info.run_id if trained else run_id
    _make_model(client, experiment.name)
    md5 = line["tags"][MD5]
    found = of_md5(client, experiment.name, md5, line["tags"]["arm"])
    if found is None:
        tags = {**line["tags"], "run.scores": run_id, REGISTERED: str(line["time"])}
        logged = mlflow.create_external_model(
            tags["arm"], source, tags=tags, params=line["params"], experiment_id=experiment.experiment_id
        )
        made = client.create_model_version(
            experiment.name, logged.model_uri, source, model_id=logged.model_id, description=line["description"],
            tags={key: tags[key] for key in ON_THE_ROW if key in tags},
        )  # fmt: skip
        found = _version(client, made)
    if line["candidate"]:
        before = aliased(client, experiment.name, CANDIDATE)
        if before is None or int(before.tags.get(REGISTERED, 0)) <= line["time"]:
            propose(client, found)


def propose(client: Any, version: Version) -> None:
    client.set_registered_model_alias(version.model, CANDIDATE, version.number)


def aliased(client: Any, model: str, alias: str) -> Version | None:
    """Version with the alias, or None."""
    return or_none(lambda: _version(client, client.get_model_version_by_alias(model, alias)))


def numbered(client: Any, model: str, number: str) -> Version | None:
    return or_none(lambda: _version(client, client.get_model_version(model, number)))


def of_md5(client: Any, model: str, md5: str, arm: str) -> Version | None:
    """Version with this md5 and arm; students of two arms may have equal bytes."""
    found = client.search_model_versions(f"name = '{model}' and tags.`{MD5}` = '{md5}' and tags.arm = '{arm}'")
    return _version(client, client.get_model_version(model, found[0].version)) if found else None


def set_champion(client: Any, version: Version, over: Version | None, why: Mapping[str, str]) -> None:
    """Set the alias `champion`; tags record the reason on `version`, and its number on its predecessor."""
    comment(client, version, why)
    client.update_model_version(version.model, version.number, description=why["promotion"])
    client.set_registered_model_alias(version.model, CHAMPION, version.number)
    if over is not None:
        client.set_model_version_tag(over.model, over.number, "succeeded_by", version.number)


def comment(client: Any, version: Version, why: Mapping[str, str]) -> None:
    for key, value in why.items():
        client.set_model_version_tag(version.model, version.number, key, value)


def _make_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Students distilled with Align-TI; their weights are DVC's.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def or_none(read: Callable[[], T]) -> T | None:
    """What `read` gets from MLflow; None if MLflow has no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return read()
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def _version(client: Any, made: Any) -> Version:
    tags = {**client.get_logged_model(made.source.removeprefix("models:/")).tags, **made.tags}
    return Version(made.name, str(made.version), tags.get("arm", "?"), tags.get(MD5, "?"), tags)
