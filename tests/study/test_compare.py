from __future__ import annotations

import csv
import itertools
import json
import random
import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from components.errors import DataError, InputError
from components.report.figures import LIGHT
from components.study import compare as module
from components.study import plots, report, runs
from components.study.compare import StudyResult, compare
from components.study.expand import Family
from components.study.runs import HOURS, MEMORY, SCORE, Run
from components.tracking.mlflow_client import client

FINGERPRINT = json.dumps({"kit": "alignti", "dataset_hash": "abc"})
SCORES = {("0.0", "0.0"): 0.50, ("1.0", "0.0"): 0.52, ("0.0", "1.0"): 0.57, ("1.0", "1.0"): 0.60}
NOISE = {1: -0.01, 2: 0.0, 3: 0.012}


def run(iva: str, tpa: str, seed: int, score: float, fingerprint: str = FINGERPRINT, started: int = 0) -> Run:
    variant = f"iva{iva[0]}-tpa{tpa[0]}"
    return Run(
        id=f"{variant}-{seed}-{started}",
        cell=f"{variant}-seed{seed}",
        variant=variant,
        params={"weights.iva": iva, "weights.tpa": tpa, "seed": str(seed)},
        metrics={SCORE: score, HOURS: 0.1 + float(tpa), MEMORY: 1000.0 + 100 * float(iva)},
        fingerprint=fingerprint,
        started=started,
    )


RUNS = [run(iva, tpa, s, score + n + 0.001 * s * float(tpa)) for (iva, tpa), score in SCORES.items() for s, n in NOISE.items()]
CELLS = [r.cell for r in RUNS]
BASELINES = "Against the baselines"
FAMILIES = {BASELINES: Family(variants=list(dict.fromkeys(r.variant for r in RUNS)), against=["iva0-tpa0"])}


def result(runs: list[Run] = RUNS, cells: list[str] = CELLS) -> StudyResult:
    return compare("terms", runs, cells, FAMILIES, 0.95)


def test_variants_are_means_over_seeds_with_t_intervals() -> None:
    comparison = result()
    assert [v.name for v in comparison.variants] == ["iva1-tpa1", "iva0-tpa1", "iva1-tpa0", "iva0-tpa0"]
    worst = comparison.variants[-1].score
    values = [0.50 + n for n in NOISE.values()]
    assert worst.mean == pytest.approx(sum(values) / 3)
    assert worst.interval == pytest.approx(stats.t.interval(0.95, 2, worst.mean, stats.sem(values)))


def test_pairs_are_tested_over_common_seeds_and_adjusted_together() -> None:
    tests = {t.variant: t for t in result().tests[BASELINES]}
    scores = {v: [r.metrics[SCORE] for r in RUNS if r.variant == v] for v in (*tests, "iva0-tpa0")}
    for variant, test in tests.items():
        if test.p_value is not None:
            assert test.p_value == pytest.approx(stats.ttest_rel(scores[variant], scores["iva0-tpa0"]).pvalue)
    p_values = sorted(t.p_value for t in tests.values() if t.p_value is not None)
    smallest = min(t.p_holm for t in tests.values() if t.p_holm is not None)
    assert smallest == pytest.approx(min(1.0, p_values[0] * len(p_values)))


def test_differences_equal_but_for_their_rounding_have_no_p() -> None:
    scores = {("0.0", 1): 0.7, ("0.0", 2): 0.6, ("1.0", 1): 0.8, ("1.0", 2): 0.7}
    found = result([run(iva, "0.0", seed, score) for (iva, seed), score in scores.items()])
    assert {t.variant: t.p_value for t in found.tests[BASELINES]} == {"iva1-tpa0": None}


def test_each_family_is_adjusted_by_itself_and_is_a_table_of_its_own() -> None:
    families = {"TPA": Family(variants=["iva1-tpa1"], against=["iva0-tpa0"]), "both": FAMILIES[BASELINES]}
    comparison = compare("terms", RUNS, CELLS, families, 0.95)
    (alone,), together = comparison.tests.values()
    assert list(comparison.tests) == ["TPA", "both"] and alone.p_holm == alone.p_value
    again = next(t for t in together if t.variant == "iva1-tpa1")
    assert again.p_value == alone.p_value
    assert again.p_holm is not None and alone.p_value is not None and again.p_holm > alone.p_value
    assert [heading for heading, *_ in report._tables(comparison, 0.95)][1:3] == ["TPA", "both"]


def test_the_main_effect_of_a_term_is_over_all_pairs_that_differ_in_it_alone() -> None:
    effects = {e.factor: e for e in result().effects}
    assert set(effects) == {"weights.iva", "weights.tpa"}  # repetitions are no factor
    assert effects["weights.iva"].effect.n == effects["weights.tpa"].effect.n == 6
    assert effects["weights.iva"].effect.mean == pytest.approx((0.02 + 0.03) / 2)
    assert effects["weights.tpa"].effect.mean == pytest.approx((0.07 + 0.08) / 2 + 0.002)


def test_energy_is_a_column_where_it_was_measured_and_blank_where_a_run_lacks_it() -> None:
    assert "Wh" not in str(report._tables(result(), 0.95)[0])
    runs = [replace(r, metrics={**r.metrics, "cost/gpu_wh": 10.0 * r.metrics[HOURS]}) for r in RUNS]
    runs[0] = RUNS[0]
    _, note, head, rows = report._tables(result(runs), 0.95)[0]
    energy = {row[0]: row[head.index("GPU Wh")] for row in rows}
    assert energy == {"iva1-tpa1": "11", "iva0-tpa1": "11", "iva1-tpa0": "1", "iva0-tpa0": "\N{EN DASH}"}
    assert "processor Wh" not in head and "Energy of the training" in note


def test_at_equal_compute_a_variant_stands_beside_the_best_that_costs_no_more() -> None:
    best = {variant.name: other for variant, other in module.equal_compute(result().variants)}
    assert {name: other and other.name for name, other in best.items()} == {
        "iva1-tpa1": "iva0-tpa1", "iva0-tpa1": "iva1-tpa1", "iva1-tpa0": "iva0-tpa0", "iva0-tpa0": "iva1-tpa0",
    }  # fmt: skip
    *_, (_, _, _, rows) = report._tables(result(), 0.95)
    column = {row[0]: row[-1] for row in rows}
    assert (column["iva1-tpa1"], column["iva0-tpa0"]) == ("+3.00", "\N{MINUS SIGN}2.00")
    cheapest = [v for v in result().variants if v.name == "iva0-tpa0"]
    assert module.equal_compute(cheapest) == [(cheapest[0], None)]


def test_a_missing_cell_is_named_and_the_rest_is_compared() -> None:
    comparison = result(RUNS[:-1])
    assert comparison.missing == ["iva1-tpa1-seed3"]
    assert "Missing: iva1-tpa1-seed3." in report.standing(comparison)
    assert next(t for t in comparison.tests[BASELINES] if t.variant == "iva1-tpa1").difference.n == 2


def test_the_latest_run_of_a_cell_counts() -> None:
    newer = run("0.0", "0.0", 1, 0.9, started=5)
    comparison = result([newer, *RUNS])
    assert newer in comparison.runs and len(comparison.runs) == len(CELLS)
    assert comparison.superseded == 1


def test_two_runs_of_one_variant_and_seed_are_refused() -> None:
    with pytest.raises(DataError, match="iva0-tpa0-seed1 and iva0-tpa0-seed2 have one variant, iva0-tpa0, and one seed, 1"):
        result([replace(r, params=r.params | {"seed": "1"}) for r in RUNS])


def test_one_seed_gives_no_interval_and_no_p() -> None:
    comparison = result([r for r in RUNS if r.seed == "1"])
    assert all(v.score.interval is None for v in comparison.variants)
    assert all(t.p_value is None and t.p_holm is None for t in comparison.tests[BASELINES])


@pytest.mark.parametrize(
    ("fingerprint", "message"),
    [
        ("null", r"how iva0-tpa0-seed1 was measured is not known"),
        (json.dumps({"kit": "alignti", "dataset_hash": "other"}), r"measured differently.*dataset_hash: abc and other"),
    ],
)
def test_scores_that_were_not_measured_alike_are_refused(fingerprint: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        result([run("0.0", "0.0", 1, 0.5, fingerprint), *RUNS[1:]])


def test_runs_of_two_recipes_are_refused_and_of_an_unknown_one_are_not() -> None:
    known = [replace(r, recipe="digits") for r in RUNS[1:]]
    assert result([RUNS[0], *known]).runs == [RUNS[0], *known]
    with pytest.raises(DataError, match=r"iva0-tpa0-seed1 \(base\) against iva0-tpa0-seed2, .* and 8 more \(digits\)"):
        result([replace(RUNS[0], recipe="base"), *known])


def test_what_the_first_run_does_not_name_is_a_factor_too() -> None:
    assert "tpa.draws" in result([*RUNS[:-1], replace(RUNS[-1], params=RUNS[-1].params | {"tpa.draws": "2"})]).factors


def test_a_study_that_has_not_run_is_told_how_to() -> None:
    with pytest.raises(DataError, match="alignti study run terms"):
        result([])
    with pytest.raises(DataError, match=r"has been run \(iva0-tpa0-seed1, .* and 9 more are of another\)"):
        result(RUNS, ["kd-seed1"])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_what_is_not_on_the_front_is_beaten_by_something_on_it(points: list[tuple[int, int]]) -> None:
    means = {str(i): (float(score), float(cost)) for i, (score, cost) in enumerate(points)}
    front = [name for name in means if module.on_front(name, means)]
    assert front
    for name, (score, cost) in means.items():
        if name not in front:
            assert any(means[f][0] >= score and means[f][1] <= cost for f in front)


def test_the_files_say_what_was_found_and_need_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = {path.suffix: path for path in report.write(result(), "What <each> term does", 0.95)}
    rows = list(csv.DictReader(written[".csv"].open()))
    assert [float(row[f"metrics.{SCORE}"]) for row in rows] == [r.metrics[SCORE] for r in RUNS]
    page = written[".html"].read_text()
    assert "What &lt;each&gt; term does" in page and not re.search(r'(?:src|href)="(?!data:)', page)
    for text in (page, written[".md"].read_text()):
        assert "weights.tpa" in text and "+7.70" in text


def test_more_settings_than_parallel_coordinates_can_show_are_left_to_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    comparison = result()
    report.write(comparison, "few", 0.95)
    folder = report.FOLDER / comparison.study
    assert (folder / "runs.png").exists() and "runs.png" in (folder / "compare.md").read_text()
    report.write(replace(comparison, factors=comparison.factors * plots.MAX_AXES), "many", 0.95)
    assert not (folder / "runs.png").exists() and "runs.png" not in (folder / "compare.md").read_text()


def test_a_study_of_one_variant_has_no_differences_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = result(RUNS[:2])
    assert not found.tests
    report.write(found, "one", 0.95)
    assert {path.name for path in (report.FOLDER / found.study).glob("*.png")} == {"pareto.png", "runs.png"}


@pytest.mark.filterwarnings("error")
def test_runs_without_a_cost_are_drawn() -> None:
    plots.pareto(result([replace(r, metrics=r.metrics | {HOURS: 0.0, MEMORY: 0.0}) for r in RUNS]), LIGHT)


def test_where_nothing_was_learnt_none_is_the_best() -> None:
    runs = [replace(r, metrics={**r.metrics, SCORE: 0.0}) for r in RUNS]
    assert "nothing was learnt and none is the best" in report.standing(result(runs))
    assert "the best is iva1-tpa1" in report.standing(result())


@pytest.mark.parametrize(("hours", "text"), [(0.0002, "0.72 s"), (0.01, "36 s"), (0.5, "30.0 min"), (3, "3.00 h")])
def test_times_are_said_in_the_unit_that_suits_them(hours: float, text: str) -> None:
    assert plots.duration(hours) == text


def test_a_thousand_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From MLflow's own database to the written report. Made in bulk, as MLflow takes a minute to take a thousand runs."""
    monkeypatch.chdir(tmp_path)
    mlflow = client("sqlite:///mlflow.db")
    experiment = mlflow.create_experiment("align-ti")
    with pytest.raises(InputError, match="no experiment 'other'"):
        runs.read(mlflow, "other", "terms")
    cells = _fill(tmp_path / "mlflow.db", experiment, seeds=10)
    recorded = runs.read(mlflow, "align-ti", "terms")
    families = {"all": Family(variants=[run.variant for run in recorded[::10]], against=["iva0-tpa0-draws1"])}
    comparison = compare("terms", recorded, cells, families, 0.95)
    report.write(comparison, "a thousand", 0.95)
    assert len(comparison.runs) == 1000 and not comparison.missing
    assert len(comparison.tests["all"]) == 99


def _fill(database: Path, experiment: str, seeds: int) -> list[str]:
    """1,000 finished runs of 5 x 5 x 4 variants, straight into MLflow's tables."""
    dice = random.Random(1)
    cells = []
    with sqlite3.connect(database) as connection:
        for iva, tpa, draws, seed in itertools.product(range(5), range(5), range(1, 5), range(seeds)):
            variant = f"iva{iva}-tpa{tpa}-draws{draws}"
            cell = f"{variant}-seed{seed}"
            cells.append(cell)
            key = f"{len(cells):032x}"
            connection.execute(
                "insert into runs (run_uuid, name, user_id, status, start_time, end_time, lifecycle_stage, experiment_id,"
                " artifact_uri) values (?, ?, 'me', 'FINISHED', ?, ?, 'active', ?, '')",
                (key, cell, len(cells), len(cells), experiment),
            )
            tags = {"stage": "cell", "study": "terms", "cell": cell, "variant": variant, "eval.fingerprint": FINGERPRINT}
            params = {"weights.iva": iva, "weights.tpa": tpa, "tpa.draws": draws, "seed": seed}
            metrics = {SCORE: 0.5 + 0.02 * tpa + dice.gauss(0, 0.01), HOURS: 0.1 * draws + 0.01 * seed, MEMORY: 900.0 + draws}
            metrics |= {f"{SCORE}/kind{k}": dice.random() for k in range(9)}
            for table, values in (("tags", tags), ("params", params)):
                rows = [(k, str(v), key) for k, v in values.items()]
                connection.executemany(f"insert into {table} (key, value, run_uuid) values (?, ?, ?)", rows)
            for table in ("metrics", "latest_metrics"):
                connection.executemany(
                    f"insert into {table} (key, value, timestamp, run_uuid, step, is_nan) values (?, ?, 1, ?, 0, 0)",
                    [(k, v, key) for k, v in metrics.items()],
                )
    return cells


def test_levels_that_are_numbers_stand_in_their_order() -> None:
    runs = [
        replace(r, params={**r.params, "weights.iva": level}) for r, level in zip(RUNS, ["1.0", "0.3", "none"] * 4, strict=True)
    ]
    comparison = result(runs)
    assert [label for _, label in plots._positions(comparison, "weights.iva")[1]] == ["0.3", "1.0", "none"]
