"""The rule: best exact match within the limits; among its near-equals the smallest; never a refused one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from components.config.load import load_settings
from components.config.teacher import TeacherSettings
from components.errors import ModelError
from components.records.teacher import Candidate
from components.teacher.choose import choose, limits_broken

SHIPPED = load_settings().teacher
UNLIMITED = {"min_exact_match": None, "max_parameters": None, "max_seconds_per_1000": None, "max_memory_mib": None}


def limits(**changed: Any) -> TeacherSettings:
    return SHIPPED.model_copy(update={**UNLIMITED, "tie_margin": 0.01, **changed})


def candidate(name: str, exact_match: float, parameters: int = 100, seconds: float = 1.0, memory: float = 10.0) -> Candidate:
    return Candidate(
        name=name,
        exact_match=exact_match,
        per_kind={},
        nats_per_token=1.0,
        irs=0.1,
        irs_layer=0,
        parameters=parameters,
        seconds_per_1000=seconds,
        memory_mib=memory,
        refused=[],
    )


def test_the_best_is_chosen() -> None:
    name, reason = choose([candidate("small", 0.7, 50), candidate("base", 0.8, 100)], limits())
    assert name == "base"
    assert reason == "base (100 parameters) has the best exact match, 80.0%, of the 2 candidates within the limits."


def test_within_the_margin_the_smallest_is_chosen() -> None:
    name, reason = choose([candidate("small", 0.795, 50), candidate("base", 0.8, 100), candidate("tiny", 0.5, 10)], limits())
    assert name == "small"
    assert "the smallest of the 2 candidates that count as equal: 79.5% exact match against 80.0% for base" in reason


def test_the_margin_is_counted_from_the_best_and_does_not_chain() -> None:
    """c is within the margin of b, and b of a, but c is not of a."""
    assert choose([candidate("a", 0.800, 30), candidate("b", 0.792, 20), candidate("c", 0.785, 10)], limits())[0] == "b"


def test_exactly_the_margin_is_within_it_whatever_the_floats() -> None:
    assert 0.81 - 0.80 > 0.01
    assert choose([candidate("small", 0.80, 50), candidate("base", 0.81, 100)], limits())[0] == "small"
    assert choose([candidate("small", 0.799, 50), candidate("base", 0.81, 100)], limits())[0] == "base"


def test_without_a_margin_only_equals_tie() -> None:
    settings = limits(tie_margin=0.0)
    assert choose([candidate("small", 0.8, 50), candidate("base", 0.8, 100)], settings)[0] == "small"
    assert choose([candidate("small", 0.7999, 50), candidate("base", 0.8, 100)], settings)[0] == "base"


def test_of_equal_size_the_better_then_the_first_by_name() -> None:
    assert choose([candidate("a", 0.795), candidate("b", 0.8)], limits())[0] == "b"
    assert choose([candidate("b", 0.8), candidate("a", 0.8)], limits())[0] == "a"


def test_a_refused_candidate_neither_wins_nor_sets_the_margin() -> None:
    """big is out of bounds: then small is not near anything, and base is the best."""
    name, reason = choose(
        [candidate("big", 0.9, 1000), candidate("base", 0.8, 100), candidate("small", 0.7, 50)], limits(max_parameters=100)
    )
    assert name == "base"
    assert reason.endswith("of the 2 candidates within the limits; refused: big.")


def test_a_single_candidate_is_chosen_with_its_reason() -> None:
    assert choose([candidate("only", 0.6)], limits())[1].startswith(
        "only (100 parameters) is the only candidate within the limits"
    )


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"min_exact_match": 0.5}, "exact match 0.400 is below min_exact_match 0.5"),
        ({"max_parameters": 1000}, "12,345 parameters are above max_parameters 1,000"),
        ({"max_seconds_per_1000": 2.5}, "3 s per 1,000 samples are above max_seconds_per_1000 2.5"),
        ({"max_memory_mib": 20.0}, "30 MiB are above max_memory_mib 20.0"),
    ],
)
def test_each_limit_is_checked_and_named(limit: dict[str, float], message: str) -> None:
    assert limits_broken(candidate("base", 0.4, 12345, 3.0, 30.0), limits(**limit)) == [message]


def test_a_figure_equal_to_its_limit_is_within() -> None:
    exact_limits = limits(min_exact_match=0.4, max_parameters=12345, max_seconds_per_1000=3.0, max_memory_mib=30.0)
    assert limits_broken(candidate("base", 0.4, 12345, 3.0, 30.0), exact_limits) == []


def test_when_none_qualifies_each_candidate_and_each_limit_is_listed() -> None:
    with pytest.raises(ModelError) as refusal:
        choose([candidate("base", 0.6, 1000), candidate("small", 0.3, 50)], limits(min_exact_match=0.5, max_parameters=10))
    assert refusal.value.exit_code == 2
    head, base, small = str(refusal.value).split("\n")
    assert "params/teacher.yaml" in head
    assert base == "  base: 1,000 parameters are above max_parameters 10"
    assert small == "  small: exact match 0.300 is below min_exact_match 0.5; 50 parameters are above max_parameters 10"


SETTINGS = st.builds(
    limits,
    min_exact_match=st.integers(0, 20).map(lambda n: n / 20),
    max_parameters=st.none() | st.integers(1, 5),
    max_seconds_per_1000=st.none() | st.integers(1, 5).map(float),
    max_memory_mib=st.none() | st.integers(1, 5).map(float),
    tie_margin=st.integers(0, 10).map(lambda n: n / 20),
)
FIGURES = st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
CANDIDATES = st.lists(FIGURES, min_size=1, max_size=6).map(
    lambda figures: [candidate(f"c{i}", *f) for i, f in enumerate(figures)]
)


@given(CANDIDATES, SETTINGS)
def test_the_chosen_one_is_within_the_limits_and_no_other_is_both_near_and_smaller(
    candidates: list[Candidate], settings: TeacherSettings
) -> None:
    within = [c for c in candidates if not limits_broken(c, settings)]
    assume(within)
    name, reason = choose(candidates, settings)
    chosen = next(c for c in candidates if c.name == name)
    assert chosen in within
    assert reason.startswith(name) and reason.endswith(".")
    best = max(round(20 * c.exact_match) for c in within)  # twentieths: whole numbers, compared exactly
    near = [c for c in within if best - round(20 * c.exact_match) <= round(20 * settings.tie_margin)]
    assert chosen in near
    assert chosen.parameters == min(c.parameters for c in near)
    assert chosen.exact_match == max(c.exact_match for c in near if c.parameters == chosen.parameters)


@given(CANDIDATES, SETTINGS)
def test_all_refused_is_refused(candidates: list[Candidate], settings: TeacherSettings) -> None:
    settings = settings.model_copy(update={"max_parameters": 0})
    with pytest.raises(ModelError) as refusal:
        choose(candidates, settings)
    assert all(f"\n  {c.name}: " in str(refusal.value) for c in candidates)


@given(CANDIDATES, SETTINGS, st.randoms())
def test_the_order_of_candidates_does_not_matter(candidates: list[Candidate], settings: TeacherSettings, random: Any) -> None:
    assume(any(not limits_broken(c, settings) for c in candidates))
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert choose(shuffled, settings) == choose(candidates, settings)
