"""`alignti preview`: what it colours is what the loss sees, and nothing of the data acts on page or terminal."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.cli import app
from components.config.data import Mixture, MixtureSource
from components.config.load import load_settings
from components.dataset.prepare import prepare
from components.own_data import preview as page
from components.own_data.available_models import available_models
from components.records.paths import DATASET
from tests.own_data.conftest import respell

EVIL = "<script>alert(1)</script> \x1b[31mred &amp;"


def build_preview(each: int = 1) -> page.Preview:
    settings = load_settings()
    return page.preview(settings, available_models(settings.models)[0], each)


def spoil(rows: list[dict[str, object]]) -> None:
    rows[0]["kind"] = rows[0]["id"] = EVIL
    rows[0]["messages"] = [
        {"role": "user", "content": f"<image>\n{EVIL}"},
        {"role": "assistant", "content": f"{EVIL} first"},
        {"role": "user", "content": "And ?"},
        {"role": "assistant", "content": "second"},
    ]
    rows[1]["messages"] = [{"role": "user", "content": "<image>\nwhat ?"}, {"role": "assistant", "content": "x" * 7000}]


def test_every_kind_is_there_and_its_answers_are_what_is_trained_on(pointed: Path) -> None:
    respell(pointed / "data/mine", spoil)
    preview = build_preview()
    assert set(preview.samples) == {EVIL, "what", "how"}
    (sample,) = preview.samples[EVIL]
    trained = [piece.text for piece in sample.pieces if piece.role == "trained"]
    assert [text.removesuffix("<end_of_utterance>").strip() for text in trained] == [f"{EVIL} first", "second"]
    assert all(text.endswith("<end_of_utterance>") for text in trained)
    read = "".join(piece.text for piece in sample.pieces if piece.role == "read")
    assert EVIL in read
    assert "first" not in read
    assert sample.tokens("visual") == sum(piece.tokens for piece in sample.pieces if piece.role == "visual") > 0
    assert preview.tally.samples.total() == 40
    assert "1 are longer, 1 of them left out" in preview.lengths


def test_a_sample_that_is_left_out_says_why(pointed: Path) -> None:
    respell(pointed / "data/mine", lambda rows: rows[0]["messages"][1].update(content="x" * 7000))
    (sample,) = build_preview().samples["what"]
    assert not sample.pieces
    assert "models.max_length is 2,048" in sample.issue
    assert sample.issue in (page.write_page(build_preview())).read_text()


def test_a_chat_template_that_the_checkpoint_has_and_the_params_leave_out_is_told(pointed: Path) -> None:
    assert not build_preview().unused_template
    path = pointed / "params/models.yaml"
    path.write_text(path.read_text().replace("style: processor", "style: vicuna"))
    said = "The checkpoint's own chat template reads otherwise; models.template.style is vicuna"
    assert said in CliRunner().invoke(app, ["preview"]).output
    assert said.replace("'", "&#39;") in page.PAGE.read_text()


def test_each_source_of_a_mixture_is_shown(pointed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_IMAGES", 4)
    monkeypatch.setattr(page, "ADJACENT", 2)
    settings = load_settings()
    source = MixtureSource(files="data/mine/rows.json", images=Path("data/mine/images"), weight=1.0, licence="CC0")
    mixture = Mixture(
        val=0.2, test=0.2, near_duplicates="report", evaluation_images=[], sources={"first": source, "last": source}
    )
    data = settings.data.model_copy(update={"source": "mixture", "llava": None, "mixture": mixture})
    preview = page.preview(settings.model_copy(update={"data": data}), available_models(settings.models)[0], 1)
    assert set(preview.samples) == {"first: what", "first: how", "last: what", "last: how"}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_and_escapes_everything(pointed: Path) -> None:
    respell(pointed / "data/mine", spoil)
    tags = Tags()
    text = page.write_page(build_preview()).read_text()
    tags.feed(text)
    assert "script" not in tags.tags
    assert all(link.startswith("data:image/") for link in tags.links)
    assert len(tags.links) == 3
    assert "prefers-color-scheme: dark" in text


def test_a_terminal_gets_no_control_characters(pointed: Path) -> None:
    respell(pointed / "data/mine", spoil)
    done = CliRunner().invoke(app, ["preview", "--each", "1"])
    assert done.exit_code == 0, done.output
    assert "\x1b[31m" not in done.output
    assert "\\x1b[31m" in done.output
    assert "«And" not in done.output
    assert "second<end_of_utterance>»" in done.output.replace("\n    ", "\n")
    assert "-> reports/preview.html" in done.output


def test_prepared_data_are_shown_only_if_they_are_of_these_params(pointed: Path) -> None:
    settings = load_settings()
    prepare(settings.data, workers=1)
    assert "not prepared yet" in build_preview().origin
    params = json.loads(settings.data.model_dump_json())
    Path("dvc.lock").write_text(json.dumps({"stages": {"prepare": {"params": {"params/data.yaml": params}}}}))
    prepared = build_preview()
    assert prepared.origin == f"{DATASET}, split train"
    assert set(prepared.samples) == {"what", "how"}
    Path("dvc.lock").write_text(json.dumps({"stages": {"prepare": {"params": {"params/data.yaml": {**params, "seed": 2}}}}}))
    assert "not prepared yet" in build_preview().origin
