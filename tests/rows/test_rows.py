"""Every row tried as the models read it: what is left out, cut or stretched is listed, and no other row stops a batch."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.config.load import load_settings
from components.config.settings import Settings
from components.dataset.shards import ImageRow, Samples, Turn
from components.errors import DataError
from components.models import image_processor
from components.models.collate import Collator
from components.models.processor import load_processor
from components.models.template import Template
from components.records.dataset import Manifest
from components.records.models import ModelIndex, ModelRecord
from components.records.paths import SPLITS, Split
from components.records.rows import TriedRows
from components.rows import trial
from components.rows.__main__ import closing_line
from components.rows.judge import Judge, distinct_encodings
from components.rows.trial import try_rows
from tests.families import toy
from tests.shards import write_split

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 60  # tokens
FAMILIES = ("qwen2_vl", "internvl")


def turns(*texts: str, image: bool) -> tuple[Turn, ...]:
    marked = [f"<image>\n{text}" if image and n == 0 else text for n, text in enumerate(texts)]
    return tuple(Turn(q, a) for q, a in zip(marked[::2], marked[1::2], strict=True))


def row(name: str, size: tuple[int, int] | None, *texts: str) -> ImageRow:
    image = None if size is None else toy.png(*size)
    return ImageRow(name, image, ((name, "kind", turns(*texts, image=size is not None)),))


LONG = "red " * 100
ROWS = [
    row("good", (40, 40), "what ?", "one"),
    row("text", None, "what ?", "two"),
    row("end", None, "what is <|im_end|> ?", "it is <|im_end|> . <|im_start|>"),
    row("long answer", (40, 40), "what ?", LONG),
    row("long question", None, LONG, "one"),
    row("long later", None, "what ?", "one", "is it ?", LONG, "yes ?", "no"),
    row("narrow", (1200, 3), "what ?", "three"),
]


def dataset(folder: Path, rows: list[ImageRow] = ROWS) -> Path:
    """The rows in `train`; a good one in each of the other splits."""
    by_split: dict[Split, list[ImageRow]] = {"train": rows, "val": [ROWS[0]], "test": [ROWS[1]]}
    splits = {split: write_split(folder / split, by_split[split], 100) for split in SPLITS}
    Manifest(source="llava", rows_in=9, rows_out=9, quarantined=0, splits=splits, digest="d" * 64).write(
        folder / "manifest.json"
    )
    return folder


def models(folder: Path) -> Path:
    def record(family: str, role: Any) -> ModelRecord:
        path, none = str(toy.folder(family)), {"origin": "", "revision": None, "visual_tokens": None}
        return ModelRecord(name=family, role=role, path=path, parameters=1, size_bytes=1, sha256=family, **none)

    index = ModelIndex(teachers={"t": record(FAMILIES[0], "teacher")}, students={"s": record(FAMILIES[1], "student")})
    index.write(folder / "index.json")
    return folder


def settings_with(**changes: Any) -> Settings:
    shipped = load_settings(ROOT)
    template = shipped.models.template.model_copy(update={"style": "processor"})
    update = {"max_length": MAX_LENGTH, "template": template, "too_long": "cut", "refused_images": "resize", **changes}
    limits = shipped.data.limits.model_copy(update={"max_bad_ratio": 0.5})
    data = shipped.data.model_copy(update={"limits": limits})
    return shipped.model_copy(update={"models": shipped.models.model_copy(update=update), "data": data})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "dataset")
    models(tmp_path / "models")
    return tmp_path


def tried(root: Path, **changes: Any) -> TriedRows:
    return try_rows(settings_with(**changes), 1, root / "dataset", root / "models", root / "rows")


def remarks(root: Path) -> dict[str, str]:
    lines = (root / "rows" / "remarks.jsonl").read_text().splitlines()
    return {(remark := json.loads(line))["id"]: remark["reason"] for line in lines}


def test_rows_that_make_no_batch_are_left_out_and_named(root: Path) -> None:
    result = tried(root)
    assert remarks(root) == {"long answer": "too_long", "long question": "too_long", "long later": "cut", "narrow": "resized"}
    train = result.splits["train"]
    assert (train.samples, train.usable, train.cut, train.resized, train.left_out) == (7, 5, 1, 1, {"too_long": 2})
    assert train.longest <= MAX_LENGTH and result.tried_with == [toy.folder(family).name for family in FAMILIES]
    assert "2 left out (2 too_long)" in closing_line(result)


@pytest.mark.parametrize("split", SPLITS)
def test_a_damaged_shard_of_any_split_is_refused_before_a_row_is_read(root: Path, split: Split) -> None:
    (shard,) = (root / "dataset" / split).glob("*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{split}/{shard.name}"):
        tried(root)


def test_settings_say_what_becomes_of_long_rows_and_odd_images(root: Path) -> None:
    result = tried(root, too_long="leave_out", refused_images="leave_out")
    assert remarks(root) == {
        "long answer": "too_long",
        "long question": "too_long",
        "long later": "too_long",
        "narrow": "refused_image",
    }
    assert result.splits["train"].left_out == {"too_long": 3, "refused_image": 1}


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "llava"]
)  # the one's narrow images we stretch, the other's the processor itself
def test_an_image_that_would_grow_past_all_bounds_is_refused_before_it_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_processor, "MOST_GROWN", 1_000_000)
    vicuna = load_settings(ROOT).models.template
    (sample, *_), judge = toy.SAMPLES, Judge([toy.folder(family)], settings_with(template=vicuna, max_length=100_000).models)
    grown: list[int] = []
    resize = Image.Image.resize

    def counting(image: Image.Image, size: tuple[int, int], *rest: Any, **options: Any) -> Image.Image:
        grown.append(size[0] * size[1])
        return resize(image, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", counting)
    sizes = [((5_000, 1),), ((1, 5_000),), ((20_000, 1),), ((1, 20_000),)]
    _, remarks = zip(*judge("train", [sample] * 4, sizes), strict=True)
    assert [remark and remark.reason for remark in remarks] == ["resized", "resized", "refused_image", "refused_image"]
    assert "20000 x 1 pixels is too narrow" in remarks[2].detail and max(grown) < 1_000_000


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_never_stops_a_batch(root: Path, family: str) -> None:
    tried(root)
    samples = Samples(root / "dataset", "train", root / "rows")
    collator = Collator(load_processor(toy.folder(family)), Template("", style="processor"), MAX_LENGTH, train=True)
    batch = collator(list(samples))
    assert batch.ids == ["good", "text", "end", "long later", "narrow"] and len(batch.input_ids[0]) <= MAX_LENGTH
    ends = [
        int((ids[response] == collator.eos_id).sum()) for ids, response in zip(batch.input_ids, batch.response, strict=True)
    ]
    assert ends == [1] * 5, "an end for each answer that is kept, and none that a row has written"


def test_lengths_are_those_of_the_longest_reading(root: Path) -> None:
    tried(root)
    samples = Samples(root / "dataset", "train", root / "rows")
    verdict = np.load(root / "rows" / "train.npy")
    for family in FAMILIES:
        collator = Collator(load_processor(toy.folder(family)), Template("", style="processor"), MAX_LENGTH, train=True)
        rows = collator.encode(list(samples))
        usable = verdict[verdict["turns"] > 0]
        assert [samples.tokens(index) for index in range(len(samples))] == usable["tokens"].tolist()
        assert all(len(row.input_ids) <= tokens for row, tokens in zip(rows, usable["tokens"], strict=True))
        assert all(row.response.sum() <= tokens for row, tokens in zip(rows, usable["response"], strict=True))


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_verdict_is_the_length_of_what_the_collator_makes(family: str) -> None:
    settings = settings_with(template=load_settings(ROOT).models.template, max_length=100_000).models
    collator = Collator(load_processor(toy.folder(family)), Template.from_settings(settings.template), 100_000, train=True)
    samples = list(toy.SAMPLES)
    sizes = [tuple(Image.open(io.BytesIO(image)).size for image in sample.images) for sample in samples]
    verdicts = [verdict for verdict, _ in Judge([toy.folder(family)], settings)("train", samples, sizes)]
    rows = collator.encode(samples)
    shorter = settings.model_copy(update={"max_length": len(rows[3].input_ids) - 1})
    ((cut, _),) = Judge([toy.folder(family)], shorter)("train", samples[3:], sizes[3:])
    (first,) = collator.encode([samples[3].upto(1)])
    assert cut == (1, len(first.input_ids), int(first.response.sum())), "a later turn goes with its image"
    assert verdicts == [
        (len(s.turns), len(row.input_ids), int(row.response.sum())) for s, row in zip(samples, rows, strict=True)
    ]


def test_line_breaks_around_an_image_may_be_one_token_with_those_beside_them() -> None:
    """Gemma's own tokenizer has a token for each number of line breaks, and its images stand between two and two."""
    judge = Judge([toy.folder("gemma3")], settings_with(max_length=100_000).models)
    (collator,) = judge.collators
    collator.tokenizer.add_tokens(["\n\n", "\n\n\n"])
    samples = [sample for sample in toy.SAMPLES if sample.images]
    sizes = [tuple(Image.open(io.BytesIO(image)).size for image in sample.images) for sample in samples]
    lengths = [tokens for (_, tokens, _), _ in judge("train", samples, sizes)]
    assert lengths == [len(row.input_ids) for row in collator.encode(samples)]


@pytest.mark.parametrize(("jinja", "usable"), [("", 3), ("first", 2), ("one", 1)])
def test_rows_whose_images_a_template_has_no_place_for_are_left_out_and_say_so(jinja: str, usable: int, root: Path) -> None:
    """As released: LLaVA-OneVision's puts a turn's images before its words; others write one image alone."""
    folder = toy.save("llava_onevision", root / "onevision")
    words = "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}<|im_end|>"
    images = "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    images = images if jinja == "first" else "{% if m['content'][0]['type'] == 'image' %}<image>{% endif %}"
    if jinja:
        generation_prompt = "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
        chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}" + images + words + "{% endfor %}" + generation_prompt
        )
        (folder / "chat_template.jinja").write_text(chat_template)
    samples = [
        replace(toy.SAMPLES[3], turns=(Turn(question, "red"),), more=toy.SAMPLES[3].more[:count])
        for question, count in (("<image>what ?", 0), ("<image><image>what ?", 1), ("is <image> at <image> ?", 1))
    ]
    sizes = [tuple(Image.open(io.BytesIO(image)).size for image in sample.images) for sample in samples]
    verdicts = list(Judge([folder], settings_with(max_length=1000).models)("train", samples, sizes))
    assert [bool(verdict[0]) for verdict, _ in verdicts] == [True] * usable + [False] * (3 - usable)
    for _, remark in verdicts[usable:]:
        assert remark is not None and remark.reason == "no_sample"
        assert "no place for several images" in remark.detail and "template.style: vicuna" in remark.detail


def test_samples_skip_what_was_left_out_in_every_way_of_reading(root: Path) -> None:
    tried(root)
    samples = Samples(root / "dataset", "train", root / "rows")
    all_samples = Samples(root / "dataset", "train")
    assert (len(all_samples), len(samples), len(samples.kinds), samples.images) == (7, 5, 5, 7)
    assert [len(samples[i].turns) for i in range(5)] == [1, 1, 1, 1, 1]
    assert [len(samples.of_image(row)) for row in range(7)] == [1, 1, 1, 0, 0, 1, 1]
    assert [samples[i].id for row in range(7) for i in samples.of_image(row)] == [sample.id for sample in samples]
    again = pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert [sample.id for sample in again] == [sample.id for sample in samples]


def test_verdicts_of_another_data_set_are_refused(root: Path) -> None:
    tried(root)
    other = dataset(root / "other")
    manifest = Manifest.read(other / "manifest.json")
    manifest.model_copy(update={"digest": "e" * 64}).write(other / "manifest.json")
    with pytest.raises(DataError, match="dvc repro check_rows"):
        Samples(other, "train", root / "rows")
    with pytest.raises(DataError, match="is missing"):
        Samples(other, "train", root / "nowhere")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
def test_damaged_verdicts_are_refused(root: Path, damage: Callable[[Path], object]) -> None:
    tried(root)
    damage(root / "rows/train.npy")
    with pytest.raises(DataError, match=r"train\.npy.*`dvc repro check_rows` makes it anew"):
        Samples(root / "dataset", "train", root / "rows")


def test_more_than_may_be_bad_stops_the_stage_and_leaves_the_list(root: Path) -> None:
    settings = settings_with()
    limits = settings.data.limits.model_copy(update={"max_bad_ratio": 0.1})
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"limits": limits})})
    with pytest.raises(DataError, match=r"2 of 9 samples cannot be trained on.*2 too_long"):
        try_rows(settings, 1, root / "dataset", root / "models", root / "rows")
    assert not (root / "rows").exists()
    assert len((root / ".runs/check_rows/remarks.jsonl").read_text().splitlines()) == 2


def test_an_interrupted_run_goes_on_and_workers_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "IMAGES_PER_JOB", 2)
    tried(root)
    outputs = {path.name: path.read_bytes() for path in (root / "rows").iterdir()}
    try_part, jobs = trial.try_part, list[Any]()

    def stopped(*job: Any) -> int:
        if len(jobs) == 2:
            raise KeyboardInterrupt
        jobs.append(job[2:4])
        return try_part(*job)

    monkeypatch.setattr(trial, "try_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        tried(root)

    def counted(*job: Any) -> int:
        jobs.append(job[2:4])
        return try_part(*job)

    monkeypatch.setattr(trial, "try_part", counted)
    tried(root)
    assert len(jobs) == len(set(jobs)) + 1 == 6, "four parts of train, one of val and of test, each tried once"
    assert {path.name: path.read_bytes() for path in (root / "rows").iterdir()} == outputs


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"])
def test_models_that_differ_in_any_file_of_their_encoding_are_both_asked(name: str, tmp_path: Path) -> None:
    folders = [tmp_path / model for model in ("teacher", "student", "twin")]
    for folder in folders:
        folder.mkdir()
        (folder / name).write_text("b" if folder.name == "student" else "a")
        (folder / "config.json").write_text(folder.name)
    assert distinct_encodings(folders) == folders[:2]


def test_a_process_of_its_own_finds_the_work() -> None:
    """Spawned processes do not import the `__main__` of a package."""
    assert trial.try_part.__module__ == "components.rows.trial"
