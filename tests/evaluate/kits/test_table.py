"""`alignti evaluate`: own, VLMEvalKit and lm-eval on the same student, in one table."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from components.artifacts import REPORTS, STUDENTS, sha256
from components.errors import DataError, InputError
from components.evaluate.__main__ import main as evaluate_stage
from components.evaluate.kits import lm_eval_tasks, serve, table
from components.evaluate.kits.client import Endpoint
from components.evaluate.kits.command import evaluate
from components.evaluate.kits.table import Table
from tests.evaluate.conftest import Tracked
from tests.evaluate.kits.conftest import needs_lm_eval, needs_server, needs_vlmeval


@needs_server
@needs_vlmeval
@needs_lm_eval
def test_three_ways_of_measuring_one_student_agree(
    workplace: Path,
    endpoint: Endpoint,
    tracked: Tracked,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "served", lambda *_: nullcontext(endpoint))  # the session's: sft is the same model
    lm_eval_tasks.split.cache_clear()
    monkeypatch.setattr("sys.argv", ["evaluate", "--arm", "sft"])
    evaluate_stage()
    evaluate([], ["sft"], [])
    found = {scores.kit: scores for scores in Table.read(REPORTS / "kits.json").scores}
    assert list(found) == list(table.KITS)
    own = found["own"]
    for kit in ("vlmeval", "lm-eval"):
        assert [verdict.model_dump() for verdict in found[kit].disagreements] == []
        assert found[kit].exact_match == own.exact_match and found[kit].per_kind == own.per_kind == found[kit].ours
        assert not found[kit].other_answers and not found[kit].failed
        assert found[kit].samples == own.samples == 32
        same = {"dataset", "dataset_hash", "prompt_hash", "decoding", "transformers", "dtype", "device"}
        for name in same:
            assert getattr(found[kit].fingerprint, name) == getattr(own.fingerprint, name), name
    assert 0.5 < own.exact_match <= 1
    shown = (REPORTS / "kits.md").read_text()
    share = f"{own.exact_match:.2%}"
    assert f"| sft | {share} | {share} | {share} | 0 | 0 |" in shown and "yes, but for kit and judge" in shown
    assert capsys.readouterr().out.count("reports/kits.md") == 3
    monkeypatch.setattr(serve, "served", None)  # nothing is asked again
    evaluate(["vlmeval", "lm-eval"], ["sft"], [])
    assert capsys.readouterr().out.count("measured before") == 2
    assert [scores.model_dump() for scores in Table.read(REPORTS / "kits.json").scores] == [
        s.model_dump() for s in found.values()
    ]
    shutil.copytree(STUDENTS / "kd/model", STUDENTS / "sft/model", dirs_exist_ok=True)  # the student is trained again
    assert table.read(lambda arm: sha256([STUDENTS / arm / "model"])).scores == []


def test_what_is_not_there_is_named_before_anything_runs(workplace: Path) -> None:
    with pytest.raises(InputError, match="--kit lmms: there are own, vlmeval, lm-eval"):
        evaluate(["lmms"], [], [])
    with pytest.raises(InputError, match="--arm nobody: there are sft, kd"):
        evaluate([], ["nobody"], [])
    with pytest.raises(DataError, match=r"scores.json is missing; `dvc repro`"):
        evaluate(["own"], ["sft"], [])
    with pytest.raises(InputError, match="--blank goes with --kit vlmeval and --task"):
        evaluate(["lm-eval"], ["sft"], ["arc_easy"], blank=True)
    assert not REPORTS.exists()
