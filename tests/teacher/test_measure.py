"""The figures of one candidate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.config.load import load_settings
from components.config.settings import Settings
from components.dataset.shards import Samples
from components.evaluate.generate import questions
from components.irs.search import TooFewInstructions
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS
from components.records.teacher import TeacherReport
from components.teacher.measure import balanced, measure
from components.teacher.report import table

KINDS = st.lists(st.sampled_from(["exist", "list", "count"]), min_size=1, max_size=40)


@given(KINDS, st.integers(1, 50), st.integers(0, 3))
def test_the_choice_is_as_even_over_the_kinds_as_they_allow(kinds: list[str], size: int, seed: int) -> None:
    rows = balanced(range(len(kinds)), kinds, size, seed)
    assert rows == sorted(set(rows)) and len(rows) == min(size, len(kinds))
    taken, available = Counter(kinds[row] for row in rows), Counter(kinds)
    most = max(taken.values())
    assert all(taken[kind] >= min(available[kind], most - 1) for kind in available)


@given(KINDS, st.integers(1, 50), st.integers(0, 3))
def test_the_choice_depends_on_its_seed_alone(kinds: list[str], size: int, seed: int) -> None:
    assert balanced(range(len(kinds)), kinds, size, seed) == balanced(range(len(kinds)), list(kinds), size, seed)


def test_seeds_choose_differently_and_only_from_the_rows_given() -> None:
    kinds = ["caption", "list"] * 100
    chosen = [balanced(range(1, 200, 2), kinds, 20, seed) for seed in range(5)]
    assert len({tuple(rows) for rows in chosen}) == 5
    assert all(kinds[row] == "list" for rows in chosen for row in rows)


@pytest.fixture
def settings(workplace: Path) -> Settings:
    loaded = load_settings()
    return loaded.model_copy(update={"evaluate": loaded.evaluate.model_copy(update={"batch_size": 7})})


def test_a_candidate_has_no_irs_where_no_image_has_two_instructions_and_no_arm_asks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise TooFewInstructions(0, 4, settings.irs)

    monkeypatch.setattr("components.irs.search.measure", none)
    samples = Samples(DATASET, "val")
    record = ModelIndex.read(MODELS / "index.json").teachers["small"]
    with pytest.raises(TooFewInstructions):
        measure(record, samples, questions(samples), settings, torch.device("cpu"))
    arms = {name: arm for name, arm in settings.study.arms.items() if name in ("sft", "kd")}
    asking_nothing = settings.model_copy(update={"study": settings.study.model_copy(update={"arms": arms})})
    candidate = measure(record, samples, questions(samples), asking_nothing, torch.device("cpu"))
    assert candidate.irs is None and candidate.irs_layer is None
    report = TeacherReport(chosen="small", reason="", candidates=[candidate])
    assert "| IRS of its best layer | none |" in table(report, settings.teacher, 4)


def test_a_candidate_is_measured(settings: Settings) -> None:
    samples = Samples(DATASET, "val")
    rows = questions(samples)
    records = ModelIndex.read(MODELS / "index.json").teachers
    small, base, again = (
        measure(records[name], samples, rows, settings, torch.device("cpu")) for name in ("small", "base", "small")
    )
    assert base.exact_match > 0.9 > 0.5 > small.exact_match  # the references are base's answers
    assert sorted(base.per_kind) == ["digit_at", "exist", "exist_at", "list"]
    assert base.nats_per_token < small.nats_per_token
    assert base.parameters > small.parameters
    assert again.model_dump(exclude={"seconds_per_1000"}) == small.model_dump(exclude={"seconds_per_1000"})
    assert base.memory_mib > small.memory_mib > small.parameters * 4 / 2**20
    assert base.seconds_per_1000 > 0
    assert 0 <= base.irs <= 1 and base.irs_layer in (0, 1)
    assert base.refused == [] and small.refused == [
        f"exact match {small.exact_match:.3f} is below min_exact_match {settings.teacher.min_exact_match}"
    ]
