"""Scorers for one's own data: what answers are worth, and where a chosen scorer stands. Rules of benchmarks: tests/oracles."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.config.load import load_settings
from components.dataset.shards import Samples
from components.evaluate import fingerprint, metrics, scorers
from components.evaluate.compare import compare
from components.evaluate.generate import questions
from components.evaluate.load_results import read
from components.models.load import Loaded
from components.models.template import Template
from components.records.evaluate import Prediction
from tests.evaluate.study import ARMS, study_arms, write_study
from tests.evaluate.test_compare import SETTINGS

LINES = "<image>\nWhat is it?\nA. a cat\nB. a teddy bear\nAnswer with the letter."


def predicted(answer: str, reference: str, question: str = LINES) -> Prediction:
    return Prediction(id="a", image_id="i", kind="k", question=question, reference=reference, answer=answer, correct=False)


@pytest.mark.parametrize(
    ("scorer", "prediction", "worth"),
    [
        ("choice", predicted("B", "B"), 1),
        ("choice", predicted("The answer is (B).", "B. a teddy bear"), 1),
        ("choice", predicted("it is a teddy bear", "B"), 1),
        ("choice", predicted("A", "B"), 0),
        ("choice", predicted("", "B"), 0),
        ("choice", predicted("C", "C"), 0),  # not on offer
        ("choice", predicted("(b) red", "B", "Which colour? (A) green (B) red"), 1),  # by its text
        ("choice", predicted("Red.", "red", "Which colour?"), 1),  # no options: exact match
        ("choice", predicted("B", "red", "What is at A. or so?"), 0),
        ("choice", predicted("A dog", "A bird", "What is it? A. A cat B. A dog C. A bird"), 0),  # the articles are no letters
        ("choice", predicted("A bird.", "C", "What is it? A. A cat B. A dog C. A bird"), 1),
        ("anls", predicted("grundik", "grundig"), 6 / 7),
        ("relaxed_accuracy", predicted("104", "100"), 1),
        ("relaxed_accuracy", predicted("106", "100"), 0),
        ("relaxed_accuracy", predicted("red", " Red\n"), 1),  # answers are trained without that white space
        ("relaxed_accuracy", predicted("12%", "12%\n"), 1),
    ],
)
def test_what_an_answer_is_worth(scorer: str, prediction: Prediction, worth: float) -> None:
    assert scorers.SCORERS[scorer].score(prediction) == pytest.approx(worth)


def test_a_chosen_scorer_has_intervals_and_none_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path, images=20, pictures=False)
    monkeypatch.chdir(tmp_path)
    outcomes, few = read(ARMS), SETTINGS.model_copy(update={"bootstrap_resamples": 50})
    plain = compare(outcomes, few, study_arms())
    chosen = compare(outcomes, few.model_copy(update={"scorers": ["anls"]}), study_arms())
    assert [*chosen.measures] == [*plain.measures, "anls"] and chosen.pairs == plain.pairs
    estimate = chosen.arms["kd"].measures["anls"]
    assert estimate.value == pytest.approx(scorers.mean("anls", outcomes.predictions["kd"]))
    assert estimate.ci95[0] <= estimate.value <= estimate.ci95[1] and chosen.measures["anls"].gain("kd", "sft") is not None
    without = metrics.score("kd", outcomes.predictions["kd"])
    assert "scorers" not in without.model_dump_json(), "the shipped recipes' scores.json keep their bytes"
    assert '"anls":' in without.model_copy(update={"scorers": {"anls": 0.5}}).model_dump_json()


def test_a_chosen_scorer_is_part_of_the_fingerprint(loaded: Loaded, samples: Samples) -> None:
    rows = questions(samples)[:2]
    template = Template.from_settings(load_settings(Path(__file__).parents[2]).models.template)
    settings = [SETTINGS.model_copy(update={"scorers": chosen}) for chosen in ([], ["anls"])]
    none, anls = (fingerprint.for_evaluate(loaded, samples, rows, template, setting) for setting in settings)
    assert none.judge == fingerprint.JUDGE and anls.judge == f"{fingerprint.JUDGE}, anls"
    assert any(difference.startswith("judge: ") for difference in fingerprint.differences(none, anls))
