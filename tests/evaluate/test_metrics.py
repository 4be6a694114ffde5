"""Exact match and yes/no figures against hand-computed cases and a plain reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.dataset.shards import Sample, Turn
from components.errors import DataError
from components.evaluate.metrics import matches, normalise, predictions, score, token_f1, yes_no
from components.records.evaluate import Prediction, YesNo


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("seven", "seven", True),
        (" Seven. ", "seven", True),
        ("red\n\tseven !?", "Red  seven", True),
        ("STRASSE", "straße", True),  # case is folded, not merely lowered
        ("seven", "seventh", False),
        ("the seven", "seven", False),  # articles count
        ("3, 4", "3,4", False),  # only punctuation at the end is dropped
        (".5", "5", False),
        ("", "seven", False),
        ("caf\u00e9", "CAFE\u0301", True),  # one letter, stored in two ways
        ("红色。", "红色", True),
        ("?", "!", False),  # punctuation is all there is
        ("", "?", False),
    ],
)
def test_exact_match_forgives_case_space_and_final_punctuation_only(answer: str, reference: str, right: bool) -> None:
    assert matches(answer, reference) is right


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(
    st.lists(st.sampled_from(["one", "Two", "drei"]), min_size=1),
    st.sampled_from([" ", "  ", "\t", " \n "]),
    st.sampled_from(["", ".", "!?", " ."]),
)
def test_spelling_variants_match(words: list[str], space: str, end: str) -> None:
    assert matches(space.join(words).upper() + end + space, " ".join(words))


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("a red seven", "A red seven.", 1.0),
        ("seven red a", "a red seven", 1.0),  # a multiset: order is exact match's to judge
        ("a red five, a blue two", "a red five, a green two", 5 / 6),
        ("red red red", "red", 0.5),  # one of three words counts: precision 1/3, recall 1
        ("", "seven", 0.0),
        ("seven", "eight", 0.0),
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u0928", 0.0),  # Hindi: vowels are marks, and do not divide a word
        ("...", "", 1.0),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@given(st.text(), st.text())
def test_token_f1_is_a_share_and_takes_no_side(answer: str, reference: str) -> None:
    assert 0 <= token_f1(answer, reference) == token_f1(reference, answer) <= 1
    assert token_f1(answer, answer) == 1


CASES = {
    "perfect": ([("yes", "yes"), ("no", "no"), ("Yes.", "yes"), ("NO", "no")], (4, 1.0, 1.0, 1.0, 1.0, 0.5)),
    # 2 hits of 4 claims, both positives found: precision 1/2, recall 1, F1 = 2 * 2 / (4 + 2)
    "all yes": ([("yes", "yes"), ("yes", "no"), ("yes", "yes"), ("yes", "no")], (4, 0.5, 0.5, 1.0, 2 / 3, 1.0)),
    "all no": ([("no", "yes"), ("no", "no"), ("no", "no")], (3, 2 / 3, 0.0, 0.0, 0.0, 0.0)),
    "no positives": ([("no", "no"), ("no", "no")], (2, 1.0, 0.0, 0.0, 0.0, 0.0)),
    "nothing asked": ([], (0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    "silent": ([("", "yes"), ("", "no")], (2, 0.0, 0.0, 0.0, 0.0, 0.0)),
    # right, right, neither, both: the last two are wrong, and no to the ratio
    "verbose": (
        [("Yes, there is.", "yes"), ("There is no red one", "no"), ("I cannot tell", "no"), ("yes and no", "yes")],
        (4, 0.5, 1.0, 0.5, 2 / 3, 0.25),
    ),
    "part of a word": ([("yesterday", "yes"), ("nothing", "no")], (2, 0.0, 0.0, 0.0, 0.0, 0.0)),
    # claims 3 (2 right), positives 3 (2 found), one negative called yes, one negative right
    "mixed": (
        [("yes", "yes"), ("yes", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no")],
        (5, 3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_yes_no_by_hand(name: str) -> None:
    pairs, (samples, accuracy, precision, recall, f1, ratio) = CASES[name]
    figures = yes_no(pairs)
    assert figures.samples == samples
    assert [figures.accuracy, figures.precision, figures.recall, figures.f1, figures.yes_ratio] == pytest.approx(
        [accuracy, precision, recall, f1, ratio]
    )


ANSWER = st.sampled_from(["yes", "no", "Yes.", "no, it is not", "seven", "", "yes or no"])


@given(st.lists(st.tuples(ANSWER, st.sampled_from(["yes", "no"]))))
def test_yes_no_equals_the_plain_definition(pairs: list[tuple[str, str]]) -> None:
    meaning = {"yes": 1, "Yes.": 1, "no": 0, "no, it is not": 0}
    tp = fp = fn = right = claimed = 0
    for answer, reference in pairs:
        predicted, true = meaning.get(answer), {"yes": 1, "no": 0}[reference]
        right += predicted == true
        claimed += predicted == 1
        tp += predicted == 1 and true == 1
        fp += predicted == 1 and true == 0
        fn += predicted != 1 and true == 1
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    n = len(pairs)
    figures = yes_no(pairs)
    expected = YesNo(
        samples=n,
        accuracy=right / n if n else 0.0,
        precision=precision,
        recall=recall,
        f1=f1,
        yes_ratio=claimed / n if n else 0.0,
    )
    assert figures.model_dump() == pytest.approx(expected.model_dump())


def test_predictions_hold_what_was_asked_and_said() -> None:
    turns = (Turn("<image>\nwhat is it?", "seven"), Turn("and now?", "eight"))
    sample = Sample("s1", "i1", "digit_at", b"", turns)
    (prediction,) = predictions([sample], ["Seven."])
    assert prediction == Prediction(
        id="s1",
        image_id="i1",
        kind="digit_at",
        question="<image>\nwhat is it?",
        reference="seven",
        answer="Seven.",
        correct=True,
    )


def test_an_answer_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        predictions([Sample("s1", "i1", "k", None, (Turn("q", "a"),))], [])


def test_scores_are_per_kind_and_over_all_samples() -> None:
    predicted = [
        _prediction("list", "seven", "seven"),
        _prediction("list", "seven", "eight"),
        _prediction("list", "yes", "seven"),
        _prediction("exist", "yes", "Yes"),
        _prediction("compare", "no", "yes"),
        _prediction("compare", "yes", "yes"),
        _prediction("all", "no", "no"),  # a name as any other
    ]
    scores = score("kd", predicted)
    assert (scores.arm, scores.samples) == ("kd", 7)
    assert scores.exact_match == 4 / 7  # over samples, not a mean over kinds
    assert scores.per_kind == {"all": 1.0, "compare": 1 / 2, "exist": 1.0, "list": 1 / 3}
    assert list(scores.yes_no) == ["all", "compare", "exist"]  # "list" has a yes among its references, and is none
    assert scores.yes_no["all"] == yes_no([("no", "no")])
    assert scores.yes_no_overall == yes_no([("Yes", "yes"), ("yes", "no"), ("yes", "yes"), ("no", "no")])


def test_without_yes_no_kinds_there_are_no_such_figures() -> None:
    scores = score("kd", [_prediction("list", "seven", "seven")])
    assert scores.yes_no == {} and scores.yes_no_overall is None


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="kd"):
        score("kd", [])


def _prediction(kind: str, reference: str, answer: str) -> Prediction:
    return Prediction(
        id="s", image_id="i", kind=kind, question="q", reference=reference, answer=answer, correct=matches(answer, reference)
    )
