"""The comparison's figures and words, and what it refuses to compare."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from components import io
from components.config.evaluate import EvaluateSettings
from components.config.study import Arm
from components.errors import DataError
from components.evaluate.compare import compare, record_arms, runs_by_arm
from components.evaluate.fingerprint import differences
from components.evaluate.headline import leading
from components.evaluate.likelihood import kl_per_token, nats_per_token
from components.evaluate.load_results import Outcomes, read
from components.evaluate.report_notes import notes
from components.evaluate.report_tables import small_tables
from components.records.compare import Comparison
from components.records.distill import Cost
from components.records.evaluate import Likelihood, Prediction, Scores
from components.records.paths import SCORES, STUDENTS
from components.records.record import jsonl
from components.report.markdown import DASH
from components.tracking import outcome, provenance, stage_run
from components.tracking.journal import JOURNALS
from tests.evaluate.study import ARMS, MEASURED, study_arms, write_scores, write_study

SETTINGS = EvaluateSettings(
    split="test",
    batch_size=1,
    max_new_tokens=1,
    scorers=[],
    bootstrap_resamples=1000,
    confidence=0.95,
    seed=1,
    baselines=["sft", "kd"],
    examples=4,
)
STUDY = study_arms()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_study(root, images=120)
    return root


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The made-up study as the working directory. Tests that spoil a file put it back."""
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def outcomes(study: Path) -> Outcomes:
    return read(ARMS)


@pytest.fixture
def comparison(outcomes: Outcomes) -> Comparison:
    return compare(outcomes, SETTINGS, STUDY)


def predictions(arm: str) -> list[Prediction]:
    lines = (SCORES / arm / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prediction.model_validate_json(line) for line in lines]


def test_scores_are_those_of_the_evaluation(comparison: Comparison) -> None:
    assert list(comparison.arms) == list(ARMS)
    for arm, result in [("teacher", comparison.teacher), *comparison.arms.items()]:
        scores = Scores.read(SCORES / arm / "scores.json")
        assert result.exact_match == pytest.approx(scores.exact_match)
        assert result.per_kind == pytest.approx(scores.per_kind)
        assert result.average == pytest.approx(sum(scores.per_kind.values()) / len(scores.per_kind))
        assert (result.yes_no, result.yes_no_overall) == (scores.yes_no, scores.yes_no_overall)
        for value, (low, high) in [(result.exact_match, result.ci95), (result.average, result.average_ci95)]:
            assert low < value < high


def test_json_holds_what_others_read(comparison: Comparison, tmp_path: Path) -> None:
    held = json.loads(comparison.write(tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert held["teacher"]["exact_match"] == comparison.teacher.exact_match
    for arm in ARMS:
        cost = Cost.read(STUDENTS / arm / "cost.json")
        assert held["arms"][arm]["train_seconds"] == cost.train_seconds
        assert held["arms"][arm]["peak_memory_mib"] == cost.peak_memory_mib
        low, high = held["arms"][arm]["ci95"]
        assert low < held["arms"][arm]["exact_match"] < high
    assert held["n"] == 480
    assert held["images"] == 120
    assert Comparison.read(tmp_path / "compare.json") == comparison


def test_order_and_pairs_go_from_the_best_down(comparison: Comparison) -> None:
    scores = [comparison.arms[arm].exact_match for arm in comparison.order]
    assert scores == sorted(scores, reverse=True)
    assert len(comparison.pairs) == 15
    for pair in comparison.pairs:
        assert comparison.order.index(pair.arm) < comparison.order.index(pair.against)
        expected = comparison.arms[pair.arm].exact_match - comparison.arms[pair.against].exact_match
        assert pair.difference == pytest.approx(expected)
        assert pair.ci95[0] <= pair.difference <= pair.ci95[1]
        assert pair.p_value <= pair.p_holm


def test_gains_are_over_each_baseline_whichever_is_better(comparison: Comparison) -> None:
    for arm, result in comparison.arms.items():
        assert list(result.gains) == [base for base in SETTINGS.baselines if base != arm]
        for base, gain in result.gains.items():
            assert (gain.arm, gain.against) == (arm, base)
            assert gain.difference == pytest.approx(result.exact_match - comparison.arms[base].exact_match)
    forth, back = comparison.arms["kd"].gains["sft"], comparison.arms["sft"].gains["kd"]
    assert back.difference == -forth.difference
    assert back.ci95 == (-forth.ci95[1], -forth.ci95[0])
    assert (back.p_value, back.larger_than_noise) == (forth.p_value, forth.larger_than_noise)


def test_paired_interval_is_narrower_than_two_apart(comparison: Comparison) -> None:
    gain = comparison.arms["align_ti"].gains["sft"]
    apart = sum((high - low) ** 2 for low, high in (comparison.arms[a].ci95 for a in ("align_ti", "sft"))) ** 0.5
    assert gain.ci95[1] - gain.ci95[0] < 0.85 * apart


def test_questions_about_one_image_count_as_one_draw(outcomes: Outcomes) -> None:
    """An arm that is right or wrong on whole images has the interval of 120 images, not that of 480 questions."""
    image_of = {p.image_id: index for index, p in enumerate(outcomes.predictions["sft"][::4])}
    by_image = [p.model_copy(update={"correct": image_of[p.image_id] % 2 == 0}) for p in outcomes.predictions["sft"]]
    comparison = compare(replace(outcomes, predictions={**outcomes.predictions, "sft": by_image}), SETTINGS, STUDY)
    low, high = comparison.arms["sft"].ci95
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 120) ** 0.5, rel=0.1)


def test_share_of_the_teacher(comparison: Comparison) -> None:
    for result in comparison.arms.values():
        assert result.share_of_teacher == pytest.approx(result.exact_match / comparison.teacher.exact_match)
        assert result.share_ci95 is not None
        assert result.share_ci95[0] < result.share_of_teacher < result.share_ci95[1]


def test_a_teacher_that_is_never_right_has_no_share_to_keep(outcomes: Outcomes) -> None:
    wrong = [p.model_copy(update={"correct": False}) for p in outcomes.predictions["teacher"]]
    comparison = compare(replace(outcomes, predictions={**outcomes.predictions, "teacher": wrong}), SETTINGS, STUDY)
    assert {arm.share_of_teacher for arm in comparison.arms.values()} == {None}
    assert comparison.teacher.ci95 == (0, 0)
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison


def test_equal_arms_differ_by_exactly_nothing_and_nothing_is_claimed(outcomes: Outcomes) -> None:
    same = {arm: outcomes.predictions["sft"] if arm != "teacher" else answers for arm, answers in outcomes.predictions.items()}
    comparison = compare(replace(outcomes, predictions=same), SETTINGS, STUDY)
    for pair in comparison.pairs:
        assert (pair.difference, pair.ci95, pair.p_value, pair.p_holm) == (0, (0, 0), 1, 1)
    assert comparison.order == list(ARMS), "equal scores stay in the study's order"
    assert comparison.headline.startswith("sft, kd, kd_uniform, kd_iva, kd_tpa and align_ti each answer"), "no 0.0 points"
    assert "lead" not in comparison.headline
    assert small_tables(comparison)["resolution"][1][0][2:4] == [DASH, DASH]


def test_headline_claims_exactly_what_the_intervals_say(comparison: Comparison) -> None:
    best, second, third, *rest = comparison.order
    assert comparison.arms[best].exact_match > comparison.arms[second].exact_match

    def words(beyond: list[str], adjusted: list[str] | None = None) -> str:
        intervals = {arm: (0.01, 0.02) if arm in beyond else (-0.01, 0.02) for arm in comparison.order}
        holm = {arm: 0.01 if arm in (beyond if adjusted is None else adjusted) else 1.0 for arm in comparison.order}
        pairs = [
            p.model_copy(update={"ci95": intervals[p.against], "p_holm": holm[p.against]}) if p.arm == best else p
            for p in comparison.pairs
        ]
        contrast = comparison.exact_match.model_copy(update={"pairs": pairs})
        return leading(comparison.model_copy(update={"exact_match": contrast}))

    assert words([]).endswith("Its lead over no other arm is larger than the noise of the test sample.")
    pairs = f" Adjusted for {len(comparison.pairs)} pairs (Holm), this holds over"
    assert words(comparison.order[1:]).endswith(
        f"Its lead over every other arm is larger than the noise of the test sample.{pairs} all of them."
    )
    two = (
        f"Its lead over {second} and {third} is larger than the noise of the test sample;"
        f" over {rest[0]}, {rest[1]} and {rest[2]} it is not."
    )
    assert words([second, third]).endswith(f"{two}{pairs} all of them.")
    assert words([second, third], [third]).endswith(f"{two}{pairs} {third}.")
    assert words([second, third], []).endswith(f"{two}{pairs} none of them.")


def test_arms_that_tie_share_the_headline(outcomes: Outcomes) -> None:
    tied = {**outcomes.predictions, "kd": outcomes.predictions["align_ti"], "kd_iva": outcomes.predictions["sft"]}
    comparison = compare(replace(outcomes, predictions=tied), SETTINGS, STUDY)
    assert leading(comparison).startswith("kd and align_ti each answer ")
    assert "The lead of kd over" in comparison.headline


def test_standing_gives_every_arm_its_interval(comparison: Comparison) -> None:
    cells = re.findall(r"(\w+) ([\d.]+)% \(([\d.]+) to ([\d.]+)\)", comparison.standing)
    assert [name for name, *_ in cells] == [*comparison.order, "has"]
    for (_, *numbers), result in zip(cells, [*(comparison.arms[a] for a in comparison.order), comparison.teacher], strict=True):
        assert [float(n) for n in numbers] == [round(100 * v, 1) for v in (result.exact_match, *result.ci95)]


def test_a_single_arm_is_compared_with_the_teacher_alone(study: Path) -> None:
    comparison = compare(read(["sft"]), SETTINGS.model_copy(update={"baselines": ["sft"]}), STUDY)
    assert comparison.pairs == []
    assert comparison.arms["sft"].gains == {}
    assert comparison.headline.startswith("sft answers")


def test_one_pair_needs_no_adjustment(study: Path) -> None:
    comparison = compare(read(["sft", "align_ti"]), SETTINGS.model_copy(update={"baselines": ["sft"]}), STUDY)
    assert comparison.headline.endswith("Its lead over every other arm is larger than the noise of the test sample.")
    assert any("p (Holm) accounts for the 1 pair here." in note for note in notes(comparison))


def test_the_order_of_lines_does_not_matter(outcomes: Outcomes, comparison: Comparison) -> None:
    write_scores(Path(), "kd", outcomes.predictions["kd"][::-1])
    try:
        assert compare(read(ARMS), SETTINGS, STUDY) == comparison
    finally:
        write_scores(Path(), "kd", outcomes.predictions["kd"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[1:], "kd and the teacher were scored on different samples .1 differ, first 'image-0-0'"),
        (lambda rows: [*rows[:-1], rows[-1].model_copy(update={"id": "other"})], "different samples .2 differ"),
        (lambda rows: [rows[0].model_copy(update={"reference": "other"}), *rows[1:]], "different samples .1 differ"),
        (lambda rows: [*rows, rows[0]], "'image-0-0' is scored more than once"),
    ],
)
def test_arms_scored_on_different_samples_are_refused(study: Path, spoil, message: str) -> None:
    original = predictions("kd")
    write_scores(Path(), "kd", spoil(original))
    try:
        with pytest.raises(DataError, match=message):
            read(ARMS)
    finally:
        write_scores(Path(), "kd", original)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("artifacts/scores/kd_tpa/predictions.jsonl", None, "kd_tpa/predictions.jsonl is missing; `dvc repro`"),
        ("artifacts/scores/kd_tpa/predictions.jsonl", '{"id": 1}\n', "holds a line that is no Prediction"),
        ("artifacts/students/kd_tpa/losses.jsonl", None, "kd_tpa/losses.jsonl is missing"),
        ("artifacts/students/kd_tpa/losses.jsonl", "{\n", r"kd_tpa/losses.jsonl, line 1: no JSON"),
        ("artifacts/students/kd_tpa/cost.json", None, "kd_tpa/cost.json is missing"),
    ],
)
def test_missing_and_broken_files_are_named(study: Path, path: str, content: str | None, message: str) -> None:
    original = Path(path).read_text(encoding="utf-8")
    try:
        if content is None:
            Path(path).unlink()
        else:
            Path(path).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read(ARMS)
    finally:
        Path(path).write_text(original, encoding="utf-8")


def test_an_arm_measured_otherwise_is_marked_and_compares_with_nothing(outcomes: Outcomes) -> None:
    measured = {**outcomes.fingerprints, "align_ti": MEASURED.model_copy(update={"dtype": "bfloat16"})}
    comparison = compare(replace(outcomes, fingerprints=measured), SETTINGS, STUDY)
    assert comparison.arms["align_ti"].differs == ["dtype: bfloat16, not float32"]
    for pair in comparison.pairs:
        assert bool(pair.differs) == ("align_ti" in (pair.arm, pair.against))
        assert not (pair.differs and pair.larger_than_noise)
    assert comparison.order[0] == "align_ti"
    assert comparison.headline.endswith("No other arm was measured in the same way, so none compares with it.")
    another = compare(replace(outcomes, fingerprints={**outcomes.fingerprints, "sft": None}), SETTINGS, STUDY)
    assert another.arms["sft"].differs == differences(None, MEASURED)
    assert "over sft" not in another.headline and "sft" not in another.headline.split("Its lead")[1]
    for interval, lead in (((0.01, 0.02), "every other arm"), ((-0.01, 0.02), "no other arm")):
        pairs = [pair.model_copy(update={"ci95": interval}) for pair in another.pairs]
        contrast = another.exact_match.model_copy(update={"pairs": pairs})
        said = leading(another.model_copy(update={"exact_match": contrast}))
        assert f"Its lead over {lead} measured in the same way is larger than the noise" in said


def test_noise_is_what_the_intervals_say(comparison: Comparison) -> None:
    for contrast in (comparison.exact_match, *comparison.measures.values()):
        widths = sorted((pair.ci95[1] - pair.ci95[0]) / 2 for pair in contrast.pairs)
        assert contrast.noise is not None and contrast.detectable is not None
        assert contrast.noise == pytest.approx(widths[len(widths) // 2])
        assert contrast.detectable / contrast.noise == pytest.approx((1.96 + 0.8416) / 1.96, rel=1e-3)


def test_yes_no_questions_have_a_mcnemar_of_their_own(outcomes: Outcomes, comparison: Comparison) -> None:
    assert all(0 <= pair.p_mcnemar <= 1 for pair in comparison.pairs if pair.p_mcnemar is not None)
    assert None not in {pair.p_mcnemar for pair in comparison.pairs}
    none = compare(replace(outcomes, yes_no={arm: {} for arm in outcomes.yes_no}), SETTINGS, STUDY)
    assert {pair.p_mcnemar for pair in none.pairs} == {None}


def repeated(arms: Iterable[str], of: str) -> dict[str, Arm]:
    """The study's settings, `arms` being further seeds of arm `of`."""
    return {**STUDY, **{arm: STUDY[of].model_copy(update={"seed": seed}) for seed, arm in enumerate(arms, start=2)}}


def test_arms_that_differ_in_their_seed_alone_are_one_arm(outcomes: Outcomes, comparison: Comparison) -> None:
    study = repeated(["kd", "kd_tpa"], of="sft")
    single_runs = {arm: [arm] for arm in ("kd_uniform", "kd_iva", "align_ti")}
    assert runs_by_arm(study, ARMS) == {"sft": ["sft", "kd", "kd_tpa"], **single_runs}
    merged = compare(outcomes, SETTINGS, study)
    assert sorted(merged.order) == sorted(["sft", "kd_uniform", "kd_iva", "align_ti"]) and len(merged.pairs) == 6
    sft = merged.arms["sft"]
    runs = {arm: comparison.arms[arm].exact_match for arm in ("sft", "kd", "kd_tpa")}
    assert sft.runs == pytest.approx(runs)
    assert sft.exact_match == pytest.approx(fmean(runs.values()))
    assert merged.exact_match.spread == pytest.approx(stdev(runs.values()))
    assert sft.train_seconds == pytest.approx(fmean(comparison.arms[arm].train_seconds for arm in runs))
    assert sft.measures["nats_per_token"].value == pytest.approx(
        fmean(comparison.arms[arm].measures["nats_per_token"].value for arm in runs)
    )
    accuracies = [overall.accuracy for arm in runs if (overall := comparison.arms[arm].yes_no_overall)]
    assert sft.yes_no_overall is not None and sft.yes_no_overall.accuracy == pytest.approx(fmean(accuracies))
    assert {pair.p_mcnemar for pair in merged.pairs if "sft" in (pair.arm, pair.against)} == {None}
    assert merged.repeated and not comparison.repeated


def test_the_seeds_spread_widens_every_arms_interval_and_not_the_teachers(outcomes: Outcomes, comparison: Comparison) -> None:
    merged = compare(outcomes, SETTINGS, repeated(["kd", "kd_tpa"], of="sft"))
    for arm in ("align_ti", "kd_iva"):  # of one seed each: what a seed does is taken from the arm that has three
        low, high = merged.arms[arm].ci95
        previous = comparison.arms[arm].ci95
        assert high - low > previous[1] - previous[0]
    assert merged.teacher == comparison.teacher
    assert merged.exact_match.detectable is not None and comparison.exact_match.detectable is not None
    assert merged.exact_match.detectable > comparison.exact_match.detectable


def test_the_headline_says_first_what_can_be_told_apart(outcomes: Outcomes, comparison: Comparison) -> None:
    assert comparison.exact_match.detectable is not None
    assert comparison.headline.startswith(
        "With 480 questions about 120 images and one training run per arm, a true difference of"
        f" {100 * comparison.exact_match.detectable:.1f} points between two arms is seen four times in five"
    )
    assert "what another seed would change is not counted in. " in comparison.headline
    several = compare(outcomes, SETTINGS, repeated(["kd"], of="sft")).headline
    assert "1 or 2 training runs per arm" in several and "points (standard deviation), which is counted in." in several
    assert "the test sample and the seeds" in several


def test_other_measures_are_those_of_the_evaluation(comparison: Comparison) -> None:
    for arm in ARMS:
        scores = Scores.read(SCORES / arm / "scores.json")
        estimates = comparison.arms[arm].measures
        assert list(estimates) == ["token_f1", "nats_per_token", "kl_per_token"]
        assert estimates["token_f1"].value == pytest.approx(scores.token_f1)
        assert estimates["token_f1"].per_kind == pytest.approx(scores.token_f1_per_kind)
        forced = [Likelihood.model_validate_json(line) for line in (SCORES / arm / "likelihoods.jsonl").open()]
        assert estimates["nats_per_token"].value == pytest.approx(nats_per_token(forced))
        assert estimates["kl_per_token"].value == pytest.approx(kl_per_token(forced))
        assert all(estimate.ci95[0] < estimate.value < estimate.ci95[1] for estimate in estimates.values())
    assert comparison.teacher.measures["kl_per_token"].value == 0


def test_other_measures_are_paired_in_the_order_of_exact_match(comparison: Comparison) -> None:
    for measure, contrast in comparison.measures.items():
        assert [(p.arm, p.against) for p in contrast.pairs] == [(p.arm, p.against) for p in comparison.pairs]
        for pair in contrast.pairs:
            left, right = (comparison.arms[arm].measures[measure] for arm in (pair.arm, pair.against))
            assert pair.difference == pytest.approx(left.value - right.value)
            assert pair.ci95[0] < pair.difference < pair.ci95[1]
    lead = next(p for p in comparison.measures["nats_per_token"].pairs if {p.arm, p.against} == {"align_ti", "sft"})
    assert lead.larger_than_noise and lead.difference < 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[1:], "of other samples than predictions.jsonl"),
        (lambda lines: [line.model_copy(update={"kl": None}) for line in lines], "made without a teacher"),
    ],
)
def test_likelihoods_of_another_evaluation_are_refused(study: Path, spoil, message: str) -> None:
    path = SCORES / "kd" / "likelihoods.jsonl"
    original = path.read_text(encoding="utf-8")
    lines = [Likelihood.model_validate_json(line) for line in original.splitlines()]
    try:
        io.write_text(path, jsonl(spoil(lines)))
        with pytest.raises(DataError, match=rf"kd/likelihoods.jsonl .*{message}"):
            read(ARMS)
    finally:
        path.write_text(original, encoding="utf-8")


@pytest.mark.parametrize(("parent", "recorded"), [("pipeline", ["kd-seed1", "kd-seed2"]), ("study-mine", [])])
def test_every_seed_has_an_outcome_in_mlflow_and_a_study_s_cells_no_second_one(
    parent: str, recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    io.write_text(JOURNALS / "p.jsonl", json.dumps({"event": "start", "time": 1, "tags": {"stage": parent}}) + "\n")
    monkeypatch.setenv(stage_run.PARENT, "p")
    arms = ("kd-seed1", "kd-seed2")
    monkeypatch.setattr(provenance, "locked", lambda: {f"distill@{arm}": {str(STUDENTS / arm): "0"} for arm in arms})
    monkeypatch.setattr(outcome, "of_arm", lambda arm, *_: arm)
    sent: list[str] = []
    monkeypatch.setattr(stage_run, "send", lambda names, _: sent.extend(names))
    settings: Any = SimpleNamespace(study=SimpleNamespace(arms=arms), runtime=None)
    record_arms(settings)
    assert sent == recorded
