"""The stage from end to end: one page that needs nothing beside it, a Markdown table, plots."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import shutil
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from components.config import recipes
from components.config.load import load_settings
from components.config.settings import Settings
from components.config.yaml_file import read_yaml
from components.errors import DataError, InputError
from components.evaluate import compare as stage
from components.evaluate import dvc_files, plots, published_runs
from components.evaluate.headline import headline
from components.evaluate.load_results import Outcomes, read
from components.evaluate.measures import MEASURES
from components.evaluate.report import OTHER_PAGES, Picture, disagreements, html, markdown
from components.evaluate.report_notes import by_kind
from components.evaluate.report_tables import table
from components.records.compare import Comparison, PublishedRuns
from components.records.irs import LayerChoice
from components.records.paths import IRS
from components.report.figures import LIGHT, draw, series_indices
from components.report.markdown import DASH
from components.report.pages import data_uri, thumbnail
from tests.evaluate.study import write_study


@dataclass(frozen=True)
class Finished:
    root: Path
    output: str
    settings: Settings
    comparison: Comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The stage run on a made-up study with the arms that params/study.yaml names."""
    root = tmp_path_factory.mktemp("study")
    shutil.copytree(Path(__file__).parents[2] / "params", root / "params")
    settings = load_settings(root)
    write_study(root, images=40, arms={arm: 0.6 + 0.03 * i for i, arm in enumerate(settings.study.arms)})
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(root)
        patch.setenv("ALIGNTI_TRACKING_URI", "journal")
        stage.main()
    return Finished(root, output.getvalue(), settings, Comparison.read(root / "reports/compare.json"))


@pytest.fixture
def outcomes(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> Outcomes:
    monkeypatch.chdir(finished.root)
    return read(finished.settings.study.arms)


def rendered(finished: Finished, outcomes: Outcomes) -> str:
    """The page with one pixel for each plot."""
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    picture = Picture(data_uri(dot.getvalue()), data_uri(dot.getvalue()), 1)
    names = ("scores", "gains", "kinds", "measures", "quality_cost", "losses", "irs")
    layer = LayerChoice.read(IRS / "layer.json")
    return html(finished.comparison, outcomes, finished.settings.evaluate, layer, dict.fromkeys(names, picture), {})


@dataclass
class Page(HTMLParser):
    """Tags, the addresses they fetch, and the text."""

    tags: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.fetched += [values[name] for name in ("src", "srcset", "data", "poster", "action") if name in values]
        self.links += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(text: str) -> Page:
    parsed = Page()
    parsed.feed(text)
    return parsed


def test_the_page_fetches_nothing(finished: Finished) -> None:
    text = (finished.root / "reports/report.html").read_text(encoding="utf-8")
    parsed = page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert len(parsed.fetched) >= 2 * 7 + 4
    for address in parsed.fetched:
        head, _, content = address.partition(";base64,")
        assert head in ("data:image/png", "data:image/jpeg")
        Image.open(io.BytesIO(base64.b64decode(content))).load()
    assert parsed.links
    beside = {f"{command}.html" for command in OTHER_PAGES}
    assert {link.removeprefix("#") for link in parsed.links} - beside <= parsed.ids and beside <= set(parsed.links)


def test_the_page_says_it_all(finished: Finished) -> None:
    text = page((finished.root / "reports/report.html").read_text(encoding="utf-8")).text
    assert finished.comparison.headline in text
    assert finished.comparison.standing in text
    assert "one seed" in text
    assert "cluster bootstrap over images" in text
    for arm in finished.comparison.order:
        low, high = finished.comparison.arms[arm].ci95
        assert f"{100 * finished.comparison.arms[arm].exact_match:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in text
    for pair in finished.comparison.pairs:
        assert f"{100 * pair.difference:+.1f}" in text


def test_a_caption_stands_under_a_picture(finished: Finished, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose visual tokens are no square grid has no overlays."""
    assert "One image, two instructions" in page(rendered(finished, outcomes)).text
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    assert "One image, two instructions" not in page(rendered(finished, outcomes)).text


def test_a_damaged_picture_of_an_earlier_stage_is_told(finished: Finished, outcomes: Outcomes) -> None:
    picture = finished.root / "reports/irs/overlay_1.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"noise")
    with pytest.raises(DataError, match="does not decode"):
        rendered(finished, outcomes)
    picture.write_bytes(whole)


def test_the_page_says_what_it_compares(finished: Finished) -> None:
    text = page((finished.root / "reports/report.html").read_text(encoding="utf-8")).text
    for fact in (
        "recipe digits",
        "commit none",
        "data tests, digest 00000000: test 160 questions about 40 images",
        f"torch {torch.__version__}",
    ):
        assert fact in text
    lines = {line.label: [cell.value for cell in line.cells] for line in table(finished.comparison)}
    arms = [finished.settings.study.arms[arm] for arm in finished.comparison.order]
    assert lines["weight of tpa"] == [DASH, *(f"{arm.weights.get('tpa', 0):g}" for arm in arms)]
    assert "weight of sft" not in lines, "all arms have the same"


def test_the_page_escapes_what_models_and_people_wrote(finished: Finished, outcomes: Outcomes) -> None:
    evil = '<script>alert("x")</script> & <img src=x>'
    spoiled = {
        arm: [p.model_copy(update={"answer": evil, "question": f"<image>\n{evil}", "reference": evil}) for p in predicted]
        for arm, predicted in outcomes.predictions.items()
    }
    text = rendered(finished, replace(outcomes, predictions=spoiled))
    assert "<script" not in text
    assert "<img src=x" not in text
    assert page(text).text.count(evil) > len(finished.comparison.order)
    assert "<image>" not in page(text).text


def test_examples_show_right_and_wrong_answers(finished: Finished, outcomes: Outcomes) -> None:
    text = rendered(finished, outcomes)
    examples = finished.settings.evaluate.examples
    assert text.count("<article") == examples
    rows = examples * (1 + len(finished.comparison.order))
    assert text.count('aria-label="right"') + text.count('aria-label="wrong"') == rows
    assert min(text.count('aria-label="right"'), text.count('aria-label="wrong"')) >= examples
    assert rendered(finished, outcomes) == text, "the same examples every time"


def test_no_disagreement_is_said(finished: Finished, outcomes: Outcomes) -> None:
    same = dict.fromkeys(outcomes.predictions, outcomes.predictions["teacher"])
    assert "All arms are right and wrong on the same questions." in rendered(finished, replace(outcomes, predictions=same))


def test_disagreements_are_all_those_between_arms_and_kinds_take_turns(outcomes: Outcomes) -> None:
    divided = disagreements(outcomes.predictions, seed=1)
    arms = [answers for arm, answers in outcomes.predictions.items() if arm != "teacher"]
    assert sorted(divided) == [i for i in range(len(arms[0])) if len({answers[i].correct for answers in arms}) == 2]
    assert divided == disagreements(outcomes.predictions, seed=1)
    assert divided != disagreements(outcomes.predictions, seed=2)
    kinds = [arms[0][index].kind for index in divided]
    assert len(set(kinds[: len(set(kinds))])) == len(set(kinds))


@pytest.mark.parametrize(
    "path", ["reports/teacher/quality_cost.png", "reports/teacher/candidates.json", "artifacts/dataset/contact_sheet.png"]
)
def test_a_missing_part_is_named(finished: Finished, outcomes: Outcomes, path: str) -> None:
    original = Path(path).read_bytes()
    Path(path).unlink()
    try:
        with pytest.raises(DataError, match=f"{path} is missing; `dvc repro`"):
            rendered(finished, outcomes)
    finally:
        Path(path).write_bytes(original)


def test_markdown_is_one_table_of_arms_and_measures(finished: Finished) -> None:
    text = (finished.root / "reports/compare.md").read_text(encoding="utf-8")
    assert text == markdown(finished.comparison)
    assert f"**{finished.comparison.headline}**" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1, "every row has as many cells as the header"
    labels = [line.split("|")[1].strip() for line in blocks[0][2:]]
    assert labels == [line.label for line in table(finished.comparison)]
    for kind in finished.comparison.kinds:
        assert any(label.startswith(kind.replace("_", " ")) for label in labels)
    for label in (
        "exact match, %",
        "average over kinds, %",
        "share of the teacher, %",
        "training, s per step",
        "peak memory, MiB",
    ):
        assert label in labels


def test_gains_beyond_noise_are_bold_and_only_those(finished: Finished) -> None:
    lines, bold = {line.label: line.cells for line in table(finished.comparison)}, set()
    for base in finished.settings.evaluate.baselines:
        for arm, cell in zip(finished.comparison.order, lines[f"gain over {base}, points"][1:], strict=True):
            gain = finished.comparison.arms[arm].gains.get(base)
            assert (gain is None) == (arm == base) and cell.strong == (gain is not None and gain.larger_than_noise)
            bold |= {cell.strong} if gain else set()
    assert bold == {True, False}


def test_plots_are_written_and_drawn_the_same_every_time(finished: Finished) -> None:
    written = sorted(path.name for path in (finished.root / "reports/plots").iterdir())
    assert written == ["gains.png", "kinds.png", "losses.png", "measures.png", "quality_cost.png", "scores.png"]
    scores = (finished.root / "reports/plots/scores.png").read_bytes()
    assert draw(plots.scores, finished.comparison) == scores


def test_plots_show_the_numbers(finished: Finished, outcomes: Outcomes) -> None:
    comparison = finished.comparison
    (axes,) = plots.scores(comparison, LIGHT).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == comparison.order[::-1]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == pytest.approx([100 * comparison.arms[arm].exact_match for arm in comparison.order[::-1]])
    for panel, base in zip(plots.gains(comparison, LIGHT).axes, finished.settings.evaluate.baselines, strict=True):
        dots = [line for line in panel.lines if line.get_marker() == "o"]
        gains = [comparison.arms[arm].gains[base] for arm in comparison.order[::-1] if arm != base]
        assert [dot.get_xdata()[0] for dot in dots] == pytest.approx([100 * gain.difference for gain in gains])
        assert [dot.get_markerfacecolor() != LIGHT.paper for dot in dots] == [gain.larger_than_noise for gain in gains]
    assert [axes.get_title() for axes in plots.losses(comparison, outcomes.losses, LIGHT).axes] == [
        "L_sft", "L_kd", "L_iva", "L_tpa", "weighted total",
    ]  # fmt: skip


def test_kinds_in_which_all_are_equal_are_left_out_and_the_hardest_is_named(finished: Finished) -> None:
    kinds = dict.fromkeys(finished.comparison.kinds, 1.0)
    arms = {
        arm: result.model_copy(update={"per_kind": {**kinds, "sum": 0.4 + 0.02 * i, "where": 0.9}})
        for i, (arm, result) in enumerate(finished.comparison.arms.items())
    }
    teacher = finished.comparison.teacher.model_copy(update={"per_kind": {**kinds, "sum": 0.9}})
    comparison = finished.comparison.model_copy(update={"teacher": teacher, "arms": arms})
    assert plots.differing_kinds(comparison) == ["sum", "where"]
    paragraph = by_kind(comparison)
    assert paragraph.startswith(
        "Arms fall furthest behind the teacher in sum: it has 90.0%, they have 40.0 to 50.0%. Left out are 7 of"
    )
    assert paragraph in markdown(comparison) and "count colour" not in [line.label.split(" (")[0] for line in table(comparison)]
    (axes,) = plots.kinds(comparison, LIGHT).axes
    distances = axes.images[0].get_array()
    assert list(distances[1 + comparison.order.index("kd")]) == [0, 0], "coloured by the distance from kd"
    assert distances[1 + comparison.order.index("sft"), 0] == pytest.approx(-2)


def test_an_arm_has_one_colour_in_all_reports() -> None:
    names = ["sft", "mine", "kd", "theirs", *map(str, range(40))]
    together = series_indices(names)
    assert len(set(together.values())) == len(names)
    assert all(series_indices([name])[name] == together[name] for name in names[:4])


def test_where_nobody_answers_right_the_report_says_so(finished: Finished) -> None:
    nothing = {"exact_match": 0.0, "per_kind": dict.fromkeys(finished.comparison.kinds, 0.0)}
    arms = {arm: result.model_copy(update=nothing) for arm, result in finished.comparison.arms.items()}
    comparison = finished.comparison.model_copy(
        update={"teacher": finished.comparison.teacher.model_copy(update=nothing), "arms": arms}
    )
    assert "nobody, the teacher included, answers one right" in headline(comparison)
    assert by_kind(comparison).startswith("All are equal in every kind: ")


def test_losses_leave_out_terms_that_no_arm_trains_on(finished: Finished) -> None:
    rows = {arm: [{"step": 1, "sft": 0.5, "kd": 0.0, "other": 0.3, "total": 0.5}] for arm in finished.comparison.arms}
    figure = plots.losses(finished.comparison, rows, LIGHT)
    assert [axes.get_title() for axes in figure.axes] == ["L_sft", "weighted total"]


def test_one_closing_line_and_a_journal(finished: Finished) -> None:
    best = finished.comparison.order[0]
    low, high = finished.comparison.arms[best].ci95
    (line,) = finished.output.splitlines()
    assert f"best arm {best}" in line
    assert f"({100 * low:.1f} to {100 * high:.1f})" in line
    assert line.endswith("reports/report.html")
    (journal,) = (finished.root / ".runs/journal").glob("*compare*.jsonl")
    events = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    values = {name: value for e in events if e["event"] == "metrics" for name, value in e["values"].items()}
    assert values[f"{best}/exact_match"] == pytest.approx(finished.comparison.arms[best].exact_match)
    sent = {Path(e["path"]).name for e in events if e["event"] == "artifact"}
    assert {"compare.json", "compare.md", "report.html", "scores.png"} <= sent


def test_large_images_shrink_and_small_ones_stay() -> None:
    small, large = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "PNG")
    Image.new("RGBA", (2000, 1000)).save(large, "PNG")
    assert thumbnail(small.getvalue(), 480) == small.getvalue()
    assert Image.open(io.BytesIO(thumbnail(large.getvalue(), 480))).size == (480, 240)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="does not decode"):
        data_uri(b"not an image")


def test_an_arm_measured_otherwise_has_a_dagger_and_says_how(finished: Finished, outcomes: Outcomes) -> None:
    odd = finished.comparison.order[-1]
    how = ["dtype: bfloat16, not float32"]
    arms = {**finished.comparison.arms, odd: finished.comparison.arms[odd].model_copy(update={"differs": how})}
    pairs = [p.model_copy(update={"differs": how}) if odd in (p.arm, p.against) else p for p in finished.comparison.pairs]
    contrast = finished.comparison.exact_match.model_copy(update={"pairs": pairs})
    marked = replace(finished, comparison=finished.comparison.model_copy(update={"arms": arms, "exact_match": contrast}))
    text = markdown(marked.comparison)
    assert f"| {odd} \N{DAGGER} |" in text and text.count("| measured otherwise |") == len(arms) - 1
    assert f"{odd} was measured otherwise than the teacher (dtype: bfloat16, not float32)" in text
    page = rendered(marked, outcomes)
    assert page.count("\N{DAGGER}") == 4 and "bfloat16, not float32" in page  # in three tables, and before the sentence
    assert "\N{DAGGER}" not in rendered(finished, outcomes)


def test_the_report_says_what_the_sample_can_tell_apart(finished: Finished, outcomes: Outcomes) -> None:
    contrast = finished.comparison.exact_match
    assert contrast.detectable is not None and contrast.noise is not None
    row = f"| exact match, % | points | {100 * contrast.noise:.1f} | {100 * contrast.detectable:.1f} | \N{EN DASH} |"
    assert row in markdown(finished.comparison)
    assert "is seen four times in five" in rendered(finished, outcomes)
    assert "## Seeds" not in markdown(finished.comparison)


def test_the_report_shows_the_other_measures_with_their_paired_differences(finished: Finished) -> None:
    text = markdown(finished.comparison)
    for name, contrast in finished.comparison.measures.items():
        for arm in finished.comparison.order:
            assert MEASURES[name].format(finished.comparison.arms[arm].measures[name].value) in text
        gain = contrast.gain("align_ti", "sft")
        assert gain is not None and f"{MEASURES[name].format_difference(gain.difference)}" in text
    assert "KL from the teacher" in page((finished.root / "reports/report.html").read_text(encoding="utf-8")).text


def test_several_seeds_of_an_arm_are_shown_as_one_arm(finished: Finished, outcomes: Outcomes) -> None:
    study = finished.settings.study.arms
    study = {**study, "kd_tpa": study["sft"].model_copy(update={"seed": 2})}
    several = replace(finished, comparison=stage.compare(outcomes, finished.settings.evaluate, study))
    runs = several.comparison.arms["sft"].runs
    each = ", ".join(f"{name} {100 * score:.1f}" for name, score in runs.items())
    assert f"| sft | 2 | {each} | {50 * sum(runs.values()):.1f} |" in markdown(several.comparison)
    report = page(rendered(several, outcomes)).text
    assert each in report and "with other seeds" in report and "kd_tpa" not in several.comparison.order


def test_published_runs_of_the_recipe_stand_beside_ones_own(finished: Finished, outcomes: Outcomes) -> None:
    study = finished.settings.study.arms
    assert "published runs" not in markdown(stage.compare(outcomes, finished.settings.evaluate, study))
    scores = {"teacher": [0.95], "sft": [0.52, 0.54], "align_ti": [0.58, 0.6, 0.62]}
    runs = PublishedRuns(recipe="digits", differing=2, machine="two cores", scores=scores)
    comparison = stage.compare(outcomes, finished.settings.evaluate, study, runs)
    text = markdown(comparison)
    assert "Runs of recipe digits on two cores. Your params differ from the recipe in 2 values." in text
    result = comparison.arms["align_ti"]
    cell = f"{100 * result.exact_match:.1f} [{100 * result.ci95[0]:.1f}, {100 * result.ci95[1]:.1f}]"
    assert f"| align_ti | {cell} | 60.0 | 2.0 | 3 |" in text
    assert "| 95.0 | \N{EN DASH} | 1 |" in text and "| \N{EN DASH} | \N{EN DASH} | 0 |" in text  # of one seed, and of none
    pooled = 100 * ((2 * 0.02**2 + 0.01**2 * 2) / 3) ** 0.5
    assert f"not counted in: seeds of one arm vary by {pooled:.1f} points in the published runs." in comparison.headline
    assert "Beside the published runs" in rendered(replace(finished, comparison=comparison), outcomes)
    (axes,) = plots.scores(comparison, LIGHT).axes
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert sorted(diamonds) == pytest.approx([52, 54, 58, 60, 62])


def test_the_published_runs_are_those_of_the_nearest_recipe(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.root)
    file = finished.root / "published.yaml"
    file.write_text("digits: {machine: two cores, scores: {sft: [0.5]}}\n")
    recipe, differing = recipes.nearest()
    nearest = published_runs.nearest(file)
    assert recipe == "digits" and nearest == PublishedRuns(
        recipe="digits", differing=differing, machine="two cores", scores={"sft": [0.5]}
    )
    file.write_text("smoke: {machine: two cores, scores: {sft: [0.5]}}\n")
    assert published_runs.nearest(file) is None
    file.write_text("digits: {machine: two cores, scores: {sft: []}}\n")
    with pytest.raises(InputError, match=r"published.yaml: digits.scores.sft: List should have at least 1 item"):
        published_runs.nearest(file)


def test_what_is_published_is_of_recipes_and_arms_that_there_are() -> None:
    root = Path(__file__).parents[2]
    for recipe, entry in read_yaml(published_runs.FILE).items():
        arms = recipes.settings_with(recipe, root).study.arms
        assert set(PublishedRuns(**entry, recipe=recipe, differing=0).scores) <= {"teacher", *arms}


def test_metrics_are_few_numbers_under_everybodys_name(finished: Finished) -> None:
    written = json.loads((finished.root / dvc_files.METRICS).read_text())
    assert written == dvc_files.metrics(finished.comparison) and set(written) == {"teacher", *finished.comparison.order}
    assert 14 <= sum(len(figures) for figures in written.values()) <= 20
    gain = finished.comparison.arms["align_ti"].gains["sft"].difference
    assert written["align_ti"]["gain_over_sft"] == pytest.approx(gain, abs=1e-5)


def test_tables_hold_every_score_and_every_logged_loss(finished: Finished, outcomes: Outcomes) -> None:
    scores = list(csv.DictReader((finished.root / dvc_files.SCORES_TABLE).open()))
    assert [row["arm"] for row in scores] == ["teacher", *finished.comparison.order]
    assert all(float(row["low"]) <= float(row["exact_match"]) <= float(row["high"]) for row in scores)
    losses = list(csv.DictReader((finished.root / dvc_files.LOSSES_TABLE).open()))
    logged = {(arm, int(row["step"]), "sft"): row["sft"] for arm, rows in outcomes.losses.items() for row in rows if row["sft"]}
    written = {(row["arm"], int(row["step"]), row["term"]): float(row["loss"]) for row in losses}
    assert logged and all(written[key] == pytest.approx(value) for key, value in logged.items())
    assert {row["term"] for row in losses}.isdisjoint(dvc_files.NOT_LOSSES)
