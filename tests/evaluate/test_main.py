"""The stage `evaluate`: from a student folder to scores, on a workplace of tiny models."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from components.dataset.shards import Samples
from components.errors import DataError, ModelError
from components.evaluate.__main__ import main
from components.evaluate.likelihood import kl_per_token, nats_per_token
from components.evaluate.metrics import matches, score
from components.records.evaluate import Likelihood, Prediction, Scores
from components.records.paths import DATASET, SCORES, STUDENTS, TEACHER
from components.records.teacher import NO_TEACHER
from tests.evaluate.conftest import Tracked


def run(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--arm", arm])
    main()


def read(arm: str) -> tuple[list[Prediction], Scores]:
    lines = (SCORES / arm / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prediction.model_validate_json(line) for line in lines], Scores.read(SCORES / arm / "scores.json")


def read_likelihoods(arm: str) -> list[Likelihood]:
    lines = (SCORES / arm / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()
    return [Likelihood.model_validate_json(line) for line in lines]


def test_a_student_is_scored_on_every_question_of_the_test_split(
    workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("sft", monkeypatch)
    predicted, scores = read("sft")
    question_samples = [sample for sample in Samples(DATASET, "test") if sample.kind != "caption"]
    assert [(p.id, p.image_id, p.kind, p.question, p.reference) for p in predicted] == [
        (s.id, s.image_id, s.kind, s.turns[0].question, s.turns[0].answer) for s in question_samples
    ]
    assert all(p.correct == matches(p.answer, p.reference) for p in predicted)
    forced = read_likelihoods("sft")
    assert [likelihood.id for likelihood in forced] == [p.id for p in predicted]
    assert scores.nats_per_token == nats_per_token(forced) and scores.kl_per_token == kl_per_token(forced)
    assert scores.kl_per_token is not None and scores.kl_per_token > 0.01  # the teacher is another model
    without = {"fingerprint": None, "nats_per_token": None, "kl_per_token": None}
    assert scores.model_copy(update=without) == score("sft", predicted)
    assert scores.fingerprint is not None and scores.fingerprint.dataset == "tests/test"
    assert scores.exact_match > 0.9  # the references are this model's answers: see the fixture
    assert tracked.stage == ("evaluate", "sft")
    assert tracked.params["split"] == "test"
    assert tracked.logged["exact_match"] == scores.exact_match
    assert tracked.datasets == [("artifacts/dataset", "0" * 64)]
    assert {"token_f1", "nats_per_token", "kl_per_token"} <= tracked.logged.keys()
    assert tracked.artifacts == [SCORES / "sft" / name for name in ("scores.json", "predictions.jsonl", "likelihoods.jsonl")]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"{scores.exact_match:.1%}" in printed and "artifacts/scores/sft/scores.json" in printed


def test_another_student_scores_otherwise_and_the_same_one_the_same_bytes(
    workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("kd", monkeypatch)
    first = {file.name: file.read_bytes() for file in (SCORES / "kd").iterdir()}
    shutil.rmtree(SCORES)
    run("kd", monkeypatch)
    assert {file.name: file.read_bytes() for file in (SCORES / "kd").iterdir()} == first
    assert sorted(first) == ["likelihoods.jsonl", "predictions.jsonl", "scores.json"]
    assert read("kd")[1].exact_match < 0.5


def test_the_teacher_is_the_chosen_one(workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    run("teacher", monkeypatch)
    run("kd", monkeypatch)  # the same model as the teacher that the fixture chose
    assert [p.answer for p in read("teacher")[0]] == [p.answer for p in read("kd")[0]]
    assert read("teacher")[1].arm == "teacher"
    assert read("teacher")[1].nats_per_token == read("kd")[1].nats_per_token
    assert read("teacher")[1].kl_per_token is None and read("kd")[1].kl_per_token == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_there_is_no_distance_from_it(
    workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    NO_TEACHER.write(TEACHER / "choice.json")
    run("kd", monkeypatch)
    scores = read("kd")[1]
    assert scores.kl_per_token is None and scores.nats_per_token is not None
    assert "kl_per_token" not in tracked.logged


def test_references_that_cannot_be_reached_are_mentioned(
    workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Path("params/evaluate.yaml")
    settings.write_text(re.sub(r"max_new_tokens: \d+", "max_new_tokens: 1", settings.read_text()))
    run("kd", monkeypatch)
    assert "references are longer than evaluate.max_new_tokens 1" in capsys.readouterr().out


def test_an_unknown_arm_leaves_with_2_and_the_list(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run("aling_ti", monkeypatch)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert all(arm in message for arm in ("aling_ti", "teacher", "sft", "kd_uniform", "align_ti"))


def test_what_is_missing_is_named(workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(STUDENTS / "kd")
    with pytest.raises(ModelError, match="artifacts/students/kd/model"):
        run("kd", monkeypatch)
    (TEACHER / "choice.json").unlink()
    with pytest.raises(DataError, match=r"choice\.json is missing"):
        run("teacher", monkeypatch)
    shutil.rmtree(DATASET)
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        run("kd", monkeypatch)
    assert not SCORES.exists()
