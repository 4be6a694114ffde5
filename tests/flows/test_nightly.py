"""What is new since the champion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.config import recipes
from components.tracking import provenance
from components.tracking.mlflow_registry import Version
from flows import nightly
from tests.flows.conftest import git

UNREAD: Any = None  # the prepared set's manifest, of which this champion has no figures


def test_a_recipe_is_new_only_if_the_champion_was_of_another(project: Path) -> None:
    git("init", "--quiet")
    git("add", "params")
    git("commit", "--quiet", "-m", "params")
    recipes.use("smoke")  # as in the workspace of a night with that recipe
    tags = {"recipe": "smoke", "mlflow.source.git.commit": provenance.git("rev-parse", "HEAD") or ""}
    assert nightly.retrain_reasons(Version("m", "1", "kd", "0123", tags), UNREAD, 0.05) == []
    other = Version("m", "1", "kd", "0123", tags | {"recipe": "digits"})
    assert nightly.retrain_reasons(other, UNREAD, 0.05) == ["another recipe: smoke, the champion's was digits"]
    Path("params/new.yaml").touch()
    git("add", "params/new.yaml")
    git("commit", "--quiet", "-m", "change")
    (reason,) = nightly.retrain_reasons(Version("m", "1", "kd", "0123", tags), UNREAD, 0.05)
    assert reason.startswith("1 file(s) of code or params differ")
