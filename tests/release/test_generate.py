"""`alignti try`: the answers, the timings, the picture, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.config.settings import Settings
from components.errors import AlignTIError, DataError, InputError
from components.evaluate.generate import answers
from components.irs.regions import placed
from components.models.collate import Collator
from components.models.families import FAMILIES
from components.models.load import load
from components.models.template import Template
from components.release import attention_overlay
from components.release.arguments import sample_of
from components.release.attention_overlay import compute_overlay, select_layer
from components.release.generate import Answer, _render_table, encode_prompt, run, stream_answer
from components.release.model import CheckpointRef, find
from tests.families import toy

QUESTION = "what digit is at a1 ?"


def streamed(settings: Settings, name: str = "align_ti", longest: int = 6) -> tuple[Answer, list[str]]:
    """The answer, and its text after each change."""
    pieces = []

    class Watched(Answer):
        def __setattr__(self, field: str, value: object) -> None:
            super().__setattr__(field, value)
            if field == "text":
                pieces.append(value)

    answer = Watched(find(name, settings))
    loaded = load(answer.checkpoint.path, "cpu")
    batch, eos = encode_prompt(
        loaded, answer.checkpoint, sample_of([Path("cat.png")], QUESTION, settings.data.limits), settings
    )
    stream_answer(loaded, batch, eos, longest, answer)
    return answer, pieces


def test_an_answer_does_not_drive_the_terminal(project: Path, settings: Settings) -> None:
    answer = Answer(find("align_ti", settings), text="red\x1b[2J\nblue")
    (cell,) = list(_render_table([answer]).columns[0].cells)[:1]
    assert str(cell) == "red\\x1b[2J\nblue"


def test_one_token_is_no_tokens(project: Path, settings: Settings) -> None:
    assert Answer(find("align_ti", settings), token_times=[0.1]).timings.endswith("\n1 token")


def test_the_answer_is_that_of_evaluation_and_comes_in_pieces(project: Path, settings: Settings) -> None:
    answer, pieces = streamed(settings)
    sample = sample_of([Path("cat.png")], QUESTION, settings.data.limits)
    loaded = load(Path("artifacts/students/align_ti/model"), "cpu")
    evaluate = settings.evaluate.model_copy(update={"max_new_tokens": 6})
    (expected,) = answers(loaded, [sample], [0], Template.from_settings(settings.models.template), 200, evaluate, "")
    assert answer.text == expected != ""
    assert len(pieces) > 3, "it came word by word"
    assert len(answer.token_times) <= 6 and answer.token_times == sorted(answer.token_times) and answer.token_times[0] > 0
    assert "first token after" in answer.timings and f"{len(answer.token_times)} tokens" in answer.timings


def test_an_exported_students_own_template_reads_as_the_one_it_was_trained_with(project: Path) -> None:
    """So a student asked by its folder is asked as by its name."""
    loaded = load(Path("artifacts/students/align_ti/model"), "cpu")
    trained = Template("Look closely.")
    loaded.processor.chat_template = trained.of(loaded.processor).jinja.replace("<image>", loaded.processor.image_token)
    exported = Collator(loaded.processor, Template("", style="processor"), 400, train=False)
    trained_prompt = Collator(loaded.processor, trained, 400, train=False)
    for sample in toy.SAMPLES:
        assert exported([sample]).input_ids.tolist() == trained_prompt([sample]).input_ids.tolist()
    assert exported.eos_id == trained_prompt.eos_id


def test_two_models_answer_side_by_side_and_show_where_they_looked(
    project: Path, settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    run(["align_ti", "teacher"], [Path("cat.png")], QUESTION, settings, max_new_tokens=3, overlay=True)
    out = capsys.readouterr().out
    assert "align_ti" in out and "teacher" in out and out.count("first token after") == 2
    assert "align_ti, layer 0: as deep in its 2 layers as layer 1 lies in the teacher's 3" in " ".join(out.split())
    assert "teacher, layer 1: the layer that the layer search chose" in out
    path = Path("reports/try/cat-align_ti-teacher.png")
    assert str(path) in out
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 2 * pixels.shape[0] and pixels.std() > 20


def test_a_picture_of_many_long_names_has_a_name_that_a_file_may_have(project: Path, settings: Settings) -> None:
    images = [Path(f"{number}{100 * chr(252)}.png") for number in range(3)]
    for image in images:
        image.write_bytes(Path("cat.png").read_bytes())
    run(["align_ti"], images, QUESTION, settings, max_new_tokens=1, overlay=True)
    (picture,) = Path("reports/try").glob("0*-align_ti.png")
    assert picture.stat().st_size > 1000


def test_each_of_several_images_has_its_place_in_the_question_and_its_row_of_panels(
    project: Path, settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    Path("dog.png").write_bytes(toy.png(20, 40, 5))
    pair, limits = [Path("cat.png"), Path("dog.png")], settings.data.limits
    assert sample_of(pair, QUESTION, limits).turns[0].question == f"<image>\n<image>\n{QUESTION}"
    assert sample_of(pair, "is <image> red ? <image>", limits).turns[0].question == "is <image> red ? <image>"
    with pytest.raises(InputError, match="shows 1 <image>, and there are 2 --image"):
        sample_of(pair, "is <image> red ?", limits)
    with pytest.raises(InputError, match="shows 2 <image>, and there are 1 --image: one for each, or none"):
        sample_of(pair[:1], "is <image> redder than <image> ?", limits)
    run(["align_ti", "teacher"], pair, "is <image> red ? <image>", settings, max_new_tokens=3, overlay=True)
    path = Path("reports/try/cat-dog-align_ti-teacher.png")
    assert str(path) in capsys.readouterr().out.replace("\n", "")
    first, second = np.array_split(np.asarray(Image.open(path).convert("L")), 2)
    assert first.std() > 20 and second.std() > 20


def test_where_no_search_was_made_all_layers_are_shown(project: Path) -> None:
    assert select_layer(CheckpointRef("base", project, None), 3)[0] is None
    Path("artifacts/irs/layer.json").unlink()
    assert select_layer(CheckpointRef("align_ti", project, "align_ti"), 3)[0] is None


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_attention_is_laid_out_over_the_whole_image(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide images: rectangles where tokens tile them, and the square of the whole where there are tiles besides."""
    loaded, sample = toy.loaded(family), toy.SAMPLES[0]
    batch = toy.batch(family, [sample])
    count = int(batch.visual.sum())
    grid = placed(loaded, batch, np.arange(count))
    assert grid is not None
    rows, columns = grid.shape
    if family.startswith("qwen"):
        assert (rows * columns, columns > rows) == (count, True)
    elif thumbnail := FAMILIES[family].whole:
        assert rows == columns and rows * columns == 4 <= count
        first = grid[0, 0] == 0
        assert first == (thumbnail == "first" or count == 4)
    else:
        assert rows == columns and rows * columns == count
    answer = "red"
    overlay = compute_overlay(CheckpointRef(family, Path(), None), loaded, replace(batch, ids=["x"]), sample, answer)
    (heat,) = overlay.heats
    assert heat.grid.shape == grid.shape and heat.grid.mean() == pytest.approx(1)
    assert heat.below == answer and heat.above == f"{family}, all layers"


def test_tokens_that_are_no_square_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, batch = toy.loaded("llava"), toy.batch("llava", [toy.SAMPLES[0]])
    assert placed(loaded, batch, np.ones(12)) is None
    monkeypatch.setattr(attention_overlay, "placed", lambda *_: None)
    with pytest.raises(InputError, match=f"{int(batch.visual.sum())} visual tokens"):
        compute_overlay(CheckpointRef("llava", Path(), None), loaded, batch, toy.SAMPLES[0], "red")


@pytest.mark.parametrize(
    ("image", "question", "message", "kind"),
    [
        ("cat.png", " <image> ", "the question is empty", InputError),
        ("cat.png", "what \udcff ?", "the question is no UTF-8", InputError),
        ("gone.png", "what ?", "gone.png is no file", InputError),
        ("notes.txt", "what ?", "notes.txt is none of JPEG, PNG", InputError),
        ("half.png", "what ?", "half.png is truncated or damaged", InputError),
        ("cat.png", "what " * 2000, "params/models.yaml:max_length", DataError),
    ],
)
def test_what_cannot_be_asked_is_refused(
    image: str, question: str, message: str, kind: type[AlignTIError], project: Path, settings: Settings
) -> None:
    Path("notes.txt").write_text("no picture")
    Path("half.png").write_bytes(toy.png(40, 20)[:-300])
    with pytest.raises(kind) as refusal:
        run(["align_ti"], [Path(image)], question, settings, max_new_tokens=2, overlay=False)
    assert message in str(refusal.value) and refusal.value.exit_code == 2
