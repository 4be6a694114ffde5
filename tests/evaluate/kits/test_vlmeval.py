"""VLMEvalKit in its own process: its verdicts against ours on the same answers, and what happens to bad ones."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import pytest

from components.dataset.shards import Sample, Turn
from components.errors import InputError, TryAgainError
from components.evaluate.kits import export, vlmeval
from components.evaluate.kits.vlmeval_worker import EMPTY_ANSWER
from components.evaluate.metrics import matches
from tests.evaluate import tiny
from tests.evaluate.kits.conftest import Scripted, needs_vlmeval, session
from tests.oracles.scoring import Answer, score

ANSWERS = {  # question -> (kind, reference, what the model says)
    "colour right": ("colour", "red", "red"),
    "colour with a point": ("colour", "blue", "Blue."),
    "colour wrong": ("colour", "red", "blue"),
    "colour both": ("colour", "blue", "red blue"),
    "colour nothing": ("colour", "nan", ""),
    "colour endless": ("colour", "red", "word " * 20_000 + "red"),
    "colour refused": ("colour", "blue", None),
    "exist right": ("exist", "yes", "Yes"),
    "exist wrong": ("exist", "no", "yes"),
    "exist nothing": ("exist", "no", ""),
    "exist endless": ("exist", "yes", "a " * 50_000 + "yes"),
    "sum right": ("sum", "sixteen", "sixteen"),
    "sum wrong": ("sum", "six", "sixteen"),
    "sum nothing": ("sum", "six", ""),
    "sum among <image> words": ("sum", "sixteen", "sixteen"),
}


def planted_samples() -> list[Sample]:
    """Two show two images, one has its image among the words."""
    image = tiny._row("x", 0, {}).image or b""
    samples = []
    for i, (question, (kind, reference, _)) in enumerate(ANSWERS.items()):
        count = 0 if "<image>" in question else 1 + (question in ("exist right", "exist endless"))
        turn = Turn("<image>\n" * count + question, reference)
        samples.append(Sample(f"s{i}", f"i{i}", kind, image, (turn,), (image,) * (count - 1)))
    return samples


def say(question: str) -> tuple[int, str]:
    text = ANSWERS[question][2]
    return (500, "broken") if text is None else (200, text)


@needs_vlmeval
def test_the_kits_verdicts_are_ours_and_no_answer_is_never_right(scripted: Scripted, tmp_path: Path) -> None:
    samples = planted_samples()
    sets = export.sets(samples, range(len(samples)))
    assert [s.form for s in sets] == ["mcq", "yes_no", "vqa"]
    scripted.answer = say
    (tmp_path / "work").mkdir()
    (tmp_path / "work/student_AlignTI_MCQ.tsv").write_text("left over from another run")
    result = vlmeval.score_split(session(scripted, tmp_path), samples, sets, seed=1)
    questions = list(ANSWERS)
    answers = {questions[row]: answer for row, answer in result.answers.items()}
    assert set(answers) == set(ANSWERS) and len(scripted.images) == len(ANSWERS) + 2  # nothing is lost
    assert {questions[row] for row in result.verdicts} == {name for name in questions if not name.startswith("sum")}
    for row, verdict in result.verdicts.items():
        assert verdict == matches(answers[questions[row]], samples[row].turns[0].answer), questions[row]
    assert {questions[row] for row, verdict in result.verdicts.items() if verdict} == {
        "colour right", "colour with a point", "exist right"
    }  # fmt: skip
    assert {questions[row] for row in result.failed} == {"colour refused"} and "broken" in str(result.failed)
    assert {questions[row] for row in result.overlong} == {"colour endless", "exist endless"}
    assert answers["colour nothing"] == answers["colour refused"] == answers["colour endless"] == ""
    assert result.figures == {
        "yes_no/f1": pytest.approx(0.5),  # of two yes one said, of two said one right
        "yes_no/accuracy": pytest.approx(0.25),
        "yes_no/precision": pytest.approx(0.5),
        "yes_no/recall": pytest.approx(0.5),
    }
    journal = (tmp_path / "answers.jsonl").read_text()
    assert journal.count("\n") == len(ANSWERS) - 1 and len(journal) > 200_000  # all of the overlong ones; not the refused one


@needs_vlmeval
@pytest.mark.parametrize("form", ["ours", "file"])
def test_options_are_the_texts_that_they_are(form: str, scripted: Scripted, tmp_path: Path) -> None:
    """Numbers, of a kind with more options than another, and words that pandas takes for no value."""
    image = tiny._row("x", 0, {}).image
    kinds = {"count": ["1", "2", "3", "4", "05"], "price": ["2.50", "7.00"], "cell": ["n/a", "null", "nan"]}
    cases = [(kind, text) for kind, texts in kinds.items() for text in texts]
    samples = [
        Sample(f"s{i}", f"i{i}", kind, image, (Turn(f"<image>\nSay: {text}", text),)) for i, (kind, text) in enumerate(cases)
    ]
    (kit_set,) = export.sets(samples, range(len(samples)))
    if form == "ours":
        scripted.answer = lambda question: (200, question.removeprefix("Say: "))
        result = vlmeval.score_split(session(scripted, tmp_path), samples, [kit_set], seed=1)
        assert [result.verdicts[row] for row in kit_set.rows] == [True] * len(cases)
        return
    shown: list[str] = []

    def right_letter(prompt: str) -> tuple[int, str]:
        (text,) = re.findall(r"Say: (.+)$", prompt, re.MULTILINE)
        letters = {option: letter for letter, option in re.findall(r"^([A-E])\. (.+)$", prompt, re.MULTILINE)}
        shown.extend(letters)
        return 200, letters.get(text, "Z")

    scripted.answer = right_letter
    file = str(export.write(kit_set, samples, tmp_path / "AlignTI_Options.tsv", seed=1))
    figures = vlmeval.score_tasks(session(scripted, tmp_path), [file])
    assert set(shown) == {text for _, text in cases} and figures["AlignTI_Options/none/Overall"] == 1


@needs_vlmeval
def test_a_crash_half_way_keeps_the_answers_and_the_next_run_asks_the_rest(scripted: Scripted, tmp_path: Path) -> None:
    samples = planted_samples()
    sets = export.sets(samples, range(len(samples)))

    def breaking(question: str) -> tuple[int, str]:
        if len(scripted.questions) > 5:
            scripted.server.socket.close()  # the server is gone
        return say(question)

    journal = tmp_path / "answers.jsonl"
    scripted.answer = breaking
    with pytest.raises(TryAgainError, match=r"VLMEvalKit ended with 1.*kept"):
        vlmeval.score_split(session(scripted, tmp_path), samples, sets, seed=1)
    saved = {key for line in journal.read_text().splitlines() for key in json.loads(line)}
    assert 3 <= len(saved) < len(ANSWERS) - 1
    restarted = Scripted()
    restarted.answer = say
    threading.Thread(target=restarted.server.serve_forever, daemon=True).start()
    try:
        result = vlmeval.score_split(session(restarted, tmp_path), samples, sets, seed=1)
    finally:
        restarted.server.shutdown()
        restarted.server.server_close()
    assert len(restarted.questions) == len(ANSWERS) - len(saved)
    assert len(result.answers) == len(ANSWERS) and sum(result.verdicts.values()) == 3


@needs_vlmeval
def test_shown_in_other_orders_an_option_is_found_and_a_favourite_letter_is_not(scripted: Scripted, tmp_path: Path) -> None:
    """Colours are found wherever they stand; digits are always answered with A: right in one order, in none of all."""
    image = tiny._row("x", 0, {}).image
    kinds = {"colour": ["red", "blue", "grey"], "digit": ["one", "two", "three"]}
    cases = [(kind, word) for kind, words in kinds.items() for word in words]
    samples = [
        Sample(f"s{i}", f"i{i}", kind, image, (Turn(f"<image>\nWhich {kind}: {word}?", word),))
        for i, (kind, word) in enumerate(cases)
    ]
    (kit_set,) = export.sets(samples, range(len(samples)))

    def chosen(prompt: str) -> tuple[int, str]:
        kind, word = re.findall(r"Which (\w+): (\w+)\?", prompt)[0]
        letters = {text: letter for letter, text in re.findall(r"^([A-C])\. (\w+)$", prompt, re.MULTILINE)}
        return 200, letters[word] if kind == "colour" else "A"

    scripted.answer = chosen
    files = [
        str(export.write(kit_set, samples, tmp_path / "AlignTI_Options.tsv", seed=1)),
        str(export.write(kit_set, samples, tmp_path / "AlignTI_Circular.tsv", seed=1, rotations=True)),
    ]
    figures = vlmeval.score_tasks(session(scripted, tmp_path), files)
    ours = {}
    for name, metric in (("AlignTI_Options", "choice_vlmeval"), ("AlignTI_Circular", "choice_circular")):
        rows = list(vlmeval.table(tmp_path / f"work/student_{name}.tsv"))
        ours[name] = [
            Answer(
                r["prediction"],
                (r["answer"],),
                {c: r[c] for c in "ABC"},
                question=str(int(r["index"]) % export.ROTATION_OFFSET),
                category=r["category"],
            )
            for r in rows
        ]
        for kind in kinds:
            of_kind = [a for a in ours[name] if a.category == kind]
            assert 100 * figures[f"{name}/none/{kind}"] == pytest.approx(score(metric, of_kind)["score"])  # type: ignore[arg-type]
    assert figures["AlignTI_Options/none/colour"] == figures["AlignTI_Circular/none/colour"] == 1
    assert figures["AlignTI_Circular/none/digit"] == 0
    assert len(ours["AlignTI_Circular"]) == 3 * len(samples) == 3 * len(ours["AlignTI_Options"])
    digits = [a for a in ours["AlignTI_Circular"] if a.category == "digit"]
    assert score("choice_vlmeval", digits)["accuracy"] == pytest.approx(100 / 3)


def test_a_kit_that_is_not_there_is_one_sentence_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(InputError, match="`make kits`"):
        vlmeval.kit(full=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(vlmeval.FULL, raising=False)
    with pytest.raises(InputError, match="`make vlmeval-env`"):
        vlmeval.kit(full=True)
    monkeypatch.setenv(vlmeval.FULL, sys.executable)  # an interpreter without the kit
    with pytest.raises(InputError, match="has no VLMEvalKit: `make vlmeval-env`"):
        vlmeval.kit(full=True)


def test_the_mark_of_no_answer_is_in_no_option_and_no_verdict() -> None:
    assert not set(EMPTY_ANSWER) & set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ")
