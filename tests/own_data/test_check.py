"""`alignti check --data` counts what the stages would refuse, cut or leave out, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.cli import app
from components.config.load import load_settings
from components.dataset.prepare import prepare
from components.dataset.shards import Sample, Samples, Turn
from components.errors import DataError
from components.irs.choice import NoRegions
from components.irs.search import TooFewInstructions, draw_images
from components.models.__main__ import build_index, obtain_member
from components.models.collate import Collator
from components.models.processor import load_processor
from components.models.template import Template
from components.own_data import check
from components.own_data.available_models import available_models
from components.records.paths import DATASET, MODELS, ROWS, SPLITS
from components.rows.trial import try_rows
from tests.families import toy
from tests.own_data.conftest import respell


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def checked() -> tuple[check.CheckResult, list[str]]:
    settings = load_settings()
    folders, missing = available_models(settings.models)
    result = check.try_data(settings, folders.values(), workers=1)
    return result, list(check.report(result, settings, folders, missing))


def spoil(rows: list[dict[str, object]]) -> None:
    rows[0]["image"] = "gone.png"
    rows[3]["messages"] = []
    rows[7]["messages"] = [{"role": "user", "content": "<image>\nwhat ?"}, {"role": "assistant", "content": "red " * 400}]


def test_it_counts_what_the_stages_count(pointed: Path) -> None:
    respell(pointed / "data/mine", spoil)
    for file, old, new in (
        ("data", "max_bad_ratio: 0.02", "max_bad_ratio: 0.2"),
        ("models", "max_length: 2048", "max_length: 200"),
    ):
        path = pointed / f"params/{file}.yaml"
        path.write_text(path.read_text().replace(old, new))
    original = files(pointed)
    result, lines = checked()
    assert files(pointed) == original
    settings = load_settings()
    check.accept(result, settings)

    manifest = prepare(settings.data, workers=1)
    assert settings.models.pretrained is not None
    for role, members in (("teachers", settings.models.pretrained.teachers), ("students", settings.models.pretrained.students)):
        for name, member in members.items():
            obtain_member(member, MODELS / role / name, "")
    build_index(settings.models, MODELS).write(MODELS / "index.json")
    tried = try_rows(settings, workers=1)

    assert (len(result.tally.refused), result.rows_in) == (manifest.quarantined, manifest.rows_in) == (2, 40)
    for split in SPLITS:
        assert result.tally.samples[split] == manifest.splits[split].samples
        assert result.tally.usable[split] == tried.splits[split].usable
    assert max(result.tally.tokens) == max(split.longest for split in tried.splits.values())
    assert [issue.model_dump_json() for issue in result.tally.issues] == (ROWS / "remarks.jsonl").read_text().splitlines()
    assert any("row 1 (0-0): data/mine/images/gone.png" in line for line in lines)
    assert any(line.strip().startswith("too_long: 1") for line in lines)
    assert any("rule roles: 39 rows" in line for line in lines)


def test_too_many_bad_rows_end_with_2_and_every_reason(pointed: Path) -> None:
    respell(pointed / "data/mine", spoil)
    done = CliRunner().invoke(app, ["check", "--data"])
    assert isinstance(done.exception, DataError)
    assert "2 of 40 rows are bad (1 missing_file, 1 missing_key, such as row 1: " in str(done.exception)
    assert "more than limits.max_bad_ratio = 0.02" in str(done.exception)
    assert "missing_file: 1" in done.output


def test_one_is_no_plural_and_progress_in_a_log_leaves_no_blanks(
    pointed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "tqdm", partial(check.tqdm, delay=0, mininterval=0))
    respell(pointed / "data/mine", lambda rows: rows.__delitem__(slice(1, None)))
    settings = load_settings()
    lines = list(check.report(check.try_data(settings, []), settings, {}, []))
    assert "  1 row, 0 refused" in lines and any("1 image, 1 sample" in line for line in lines)
    assert "rows tried: 100%" in (stderr := capsys.readouterr().err) and " " * 20 not in stderr


def test_without_models_rows_are_read_all_the_same(pointed: Path) -> None:
    settings = load_settings()
    result = check.try_data(settings, [], workers=1)
    assert result.tally.samples.total() == 40
    assert "not tried with teacher" in "\n".join(check.report(result, settings, {}, ["teacher"]))
    check.accept(result, settings)


def test_samples_that_are_too_long_stop_it_as_they_would_check_rows(pointed: Path) -> None:
    path = pointed / "params/models.yaml"
    path.write_text(path.read_text().replace("max_length: 2048", "max_length: 62"))
    result, lines = checked()
    assert any(line.strip().startswith("too_long: 20, left out") for line in lines), lines
    with pytest.raises(
        DataError, match=r"20 of 40 samples cannot be trained on \(such as .* tokens; models.max_length is 62\)"
    ):
        check.accept(result, load_settings())


def test_images_shown_together_are_said_to_count_as_one(pointed: Path) -> None:
    def joined(rows: list[dict[str, object]]) -> None:
        del rows[1::2]  # one question about each image
        for row, image in zip(rows[:6:2], rows[1:6:2], strict=True):
            row["images"] = [row.pop("image"), image["image"]]
            row["messages"][0]["content"] = "<image><image> Which is red ?"  # type: ignore[index]

    respell(pointed / "data/mine", joined)
    tally, said = checked()[0].tally, checked()[1]
    assert tally.samples.total() == 20 and tally.together.total() == 3
    assert "  3 of these images are several shown together, which count as one" in said


def test_a_split_without_images_is_told(pointed: Path) -> None:
    path = pointed / "params/data.yaml"
    path.write_text(path.read_text().replace("val: 0.2", "val: 0.0001"))
    assert "val: 0.0001" in path.read_text()
    with pytest.raises(DataError, match="no usable sample fell into val"):
        check.accept(check.try_data(load_settings(), [], workers=1), load_settings())


def test_too_few_questions_per_image_are_refused_where_a_layer_is_searched(pointed: Path) -> None:
    """In the words of the stage `search_layer`, which would end with them hours later."""
    respell(pointed / "data/mine", lambda rows: rows.__delitem__(slice(1, None, 2)))  # one question about each image
    result, settings = check.try_data(load_settings(), [], workers=1), load_settings()
    samples = prepare(settings.data, workers=1) and Samples(DATASET, "train")
    with pytest.raises(TooFewInstructions) as stage_error:
        draw_images(samples, settings.irs)
    with pytest.raises(TooFewInstructions, match=r"0 of \d+ images have 2 .*iva.weighting: uniform") as error:
        check.accept(result, settings)
    assert str(error.value) == str(stage_error.value)
    path = pointed / "params/distill.yaml"
    path.write_text(re.sub(r"weighting: \w+", "weighting: uniform", path.read_text()))
    assert not load_settings().needs_layer
    check.accept(result, load_settings())


def test_a_rule_that_needs_boxes_is_refused_where_no_question_has_one(pointed: Path) -> None:
    path = pointed / "params/irs.yaml"
    path.write_text(re.sub(r"rule: \w+", "rule: pointing", path.read_text()))
    result = check.try_data(load_settings(), [], workers=1)
    with pytest.raises(NoRegions, match=r"rule is pointing, .*; set rule: irs"):
        check.accept(result, load_settings())
    check.accept(replace(result, boxes=True), load_settings())


def test_questions_of_equal_images_count_together_in_whatever_files_they_are(pointed: Path) -> None:
    """As the layer search counts them: rows of tar and Parquet files have an image each."""
    together = check.try_data(load_settings(), [], workers=1).tally

    def copied(rows: list[dict[str, object]]) -> None:
        for row in rows[1::2]:
            shutil.copy(f"data/mine/images/{row['image']}", f"data/mine/images/copy-{row['image']}")
            row["image"] = f"copy-{row['image']}"

    respell(pointed / "data/mine", copied)
    apart = check.try_data(load_settings(), [], workers=1).tally
    assert apart.images.total() == 2 * together.images.total() == 40
    for tally in (together, apart):
        assert sum(tally.images_with_questions(split, 2) for split in SPLITS) == 20 and not tally.images_with_questions(
            "train", 3
        )


def test_workers_change_nothing(pointed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pointed / "params/data.yaml"
    path.write_text(path.read_text().replace("images_per_shard: 1000", "images_per_shard: 5"))
    alone = check.try_data(load_settings(), [pointed / "hub/small"], workers=1)
    monkeypatch.setattr(check, "WORTH_A_WORKER", 5)
    shared = check.try_data(load_settings(), [pointed / "hub/small"], workers=2)
    for result in (alone, shared):
        result.tally.questions = array("Q", sorted(result.tally.questions))
    assert shared == alone


@pytest.mark.parametrize(("family", "style", "answer"), [("llava", "vicuna", " one two"), ("qwen2_vl", "processor", "one two")])
def test_first_answers_are_counted_as_the_template_writes_them(family: str, style: str, answer: str) -> None:
    processor = load_processor(toy.folder(family))
    collator = Collator(processor, Template("", style=style), 1000, train=True)  # type: ignore[arg-type]
    sample = Sample("1", "1", "kind", b"", (Turn("<image>\nwhat ?", "one two"), Turn("and ?", "three three three three")))
    assert check.answer_lengths(collator, [sample]) == [
        len(processor.tokenizer(answer, add_special_tokens=False).input_ids) + 1
    ]


def test_answers_that_are_never_evaluated_do_not_ask_for_more_tokens() -> None:
    tally = check.Tally()
    tally.answers.update({("train", 28): 8, ("test", 14): 3, ("test", 9): 1})
    assert tally.first_answers("test") == {14: 3, 9: 1}
    assert tally.first_answers() == {28: 8, 14: 3, 9: 1}
