from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config.load import load_settings
from components.errors import DataError
from components.model_registry import drift
from components.model_registry.paired_test import MeasuredDifferently, majority_accuracy, paired_test
from components.records.dataset import Manifest, SplitRecord
from components.records.evaluate import Fingerprint, Prediction

SETTINGS = load_settings().evaluate.model_copy(update={"bootstrap_resamples": 500})
MEASURED = Fingerprint(
    kit="alignti", kit_version="1", dataset="digits/test", dataset_hash="a", prompt_hash="b", decoding={}, judge="c",
    transformers="5", dtype="float32", device="cpu",
)  # fmt: skip


def answers(right: list[bool]) -> list[Prediction]:
    return [
        Prediction(id=str(i), image_id=str(i // 2), kind="count", question="?", reference="1", answer="1", correct=correct)
        for i, correct in enumerate(right)
    ]


def run(new: list[bool], old: list[bool], measured: Any = (MEASURED, MEASURED)) -> Any:
    return paired_test(("new", "old"), (answers(new), answers(old)), measured, SETTINGS)


def test_the_most_frequent_answer_is_the_same_however_it_is_spelt() -> None:
    texts = ("Yes", "no", "yes.", "YES")
    spelt = [answer.model_copy(update={"reference": text}) for answer, text in zip(answers([True] * 4), texts, strict=True)]
    assert majority_accuracy(spelt) == 0.75


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=40))
def test_a_duel_is_the_same_seen_from_the_other_side(pairs: list[tuple[bool, bool]]) -> None:
    new, old = [a for a, _ in pairs], [b for _, b in pairs]
    forward, reverse = run(new, old), run(old, new)
    assert forward.difference == pytest.approx(sum(new) / len(new) - sum(old) / len(old))
    assert forward.difference == pytest.approx(-reverse.difference)
    assert forward.ci95 == pytest.approx((-reverse.ci95[1], -reverse.ci95[0]))
    assert forward.p_value == reverse.p_value


def test_only_a_lead_beyond_chance_is_larger_than_noise() -> None:
    assert run([True] * 40, [True] * 20 + [False] * 20).larger_than_noise
    assert not run([True] * 40, [True] * 39 + [False]).larger_than_noise
    assert not run([True] * 40, [True] * 40).larger_than_noise


@pytest.mark.parametrize("other", [None, MEASURED.model_copy(update={"prompt_hash": "z"})])
def test_what_was_measured_differently_is_not_compared(other: Fingerprint | None) -> None:
    with pytest.raises(
        MeasuredDifferently, match=r"new and old were measured differently .*(prompt hash: b, not z|no fingerprint)"
    ):
        run([True] * 4, [True] * 4, (MEASURED, other))


def test_answers_to_different_questions_are_refused_whatever_the_fingerprints_say() -> None:
    with pytest.raises(DataError, match="to different questions"):
        run([True] * 4, [True] * 6)


def manifest(**kinds: int) -> Manifest:
    split = SplitRecord(images=100, samples=sum(kinds.values()), kinds=kinds, shards=[])
    return Manifest(source="digits", rows_in=1000, rows_out=990, quarantined=10, splits={"train": split}, digest="d")


def test_drift_names_each_figure_that_moved_and_no_other() -> None:
    then = drift.statistics(manifest(count=500, where=500))
    assert drift.changed_statistics(then, then, 0.05) == []
    assert drift.changed_statistics(then, drift.statistics(manifest(count=510, where=490)), 0.05) == []
    assert drift.changed_statistics(then, drift.statistics(manifest(count=900, where=300)), 0.05) == [
        "train/count/share 0.500 -> 0.750",
        "train/samples 1,000 -> 1,200",
        "train/where/share 0.500 -> 0.250",
    ]
    gone = drift.changed_statistics(then, drift.statistics(manifest(count=1000)), 0.05)
    assert "train/where/share 0.500 -> 0.000" in gone
