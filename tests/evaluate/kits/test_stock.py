"""The kit's own benchmarks over the bridge, on files in their own formats: planted answers have the score known by hand."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.errors import DataError, InputError, TryAgainError
from components.evaluate.benchmarks import BENCHMARKS
from components.evaluate.kits import vlmeval
from components.evaluate.kits.vlmeval_worker import GREY
from tests.evaluate import tiny
from tests.evaluate.kits.conftest import Scripted, needs_vlmeval, session
from tests.oracles.scoring import Answer, score

Row = dict[str, Any]
IMAGE = base64.b64encode(tiny._row("x", 0, {}).image or b"").decode()
COLOURS = ["red", "green", "blue", "grey"]
ORDERS = [COLOURS[turn:] + COLOURS[:turn] for turn in range(4)]


def choices(_: str) -> list[tuple[Row, str]]:
    """Half of four right: a letter, a letter in prose, the wrong letter, and silence."""
    replies = ["A", "The answer is B.", "D", ""]
    return [({**dict(zip("ABCD", COLOURS, strict=True)), "answer": "ABCD"[i], "category": "c"}, replies[i]) for i in range(4)]


def circular(_: str) -> list[tuple[Row, str]]:
    """Two questions in four orders: blue is found in each; the other is always answered with A, so not in each: half."""
    return [
        (
            {"index": q + turn * 10**6, **dict(zip("ABCD", order, strict=True)), "answer": "ABCD"[order.index("blue")]},
            "ABCD"[order.index("blue")] if q == 0 else "A",
        )
        for q in (0, 1)
        for turn, order in enumerate(ORDERS)
    ]


def words(_: str) -> list[tuple[Row, str]]:
    return [({"answer": "red"}, "Red"), ({"answer": "two"}, "two"), ({"answer": "red"}, "red car"), ({"answer": "red"}, "")]


def of_ten(_: str) -> list[tuple[Row, str]]:
    """Worth 1, 0.6, 0 and 0: all ten people, two of ten, none, and silence."""
    answers = [["stop"] * 10, ["ice"] * 2 + ["snow"] * 8, ["red"] * 10, ["red"] * 10]
    return [({"answer": str(ten)}, reply) for ten, reply in zip(answers, ["Stop", "ice", "blue", ""], strict=True)]


def numbers(_: str) -> list[tuple[Row, str]]:
    return [({"answer": "12"}, "12.5"), ({"answer": "20"}, "22"), ({"answer": "Yes"}, "yes"), ({"answer": "5%"}, "")]


def objects(_: str) -> list[tuple[Row, str]]:
    """One of two there is seen, one of two absent ones claimed: precision, recall and F1 of a half."""
    pairs = [("Yes", "Yes"), ("Yes", ""), ("No", "No, there is none."), ("No", "yes")]
    return [({"answer": a, "category": "random,popular" if i == 0 else "random"}, reply) for i, (a, reply) in enumerate(pairs)]


def pairs(_: str) -> list[tuple[Row, str]]:
    """One picture right twice, one once: accuracy 75, accuracy+ 50."""
    answers = [("i0", "Yes", "yes"), ("i0", "No", "no"), ("i1", "Yes", "Yes"), ("i1", "No", "yes")]
    return [({"answer": a, "category": "existence", "image_path": f"{i}.png"}, reply) for i, a, reply in answers]


def figures(_: str) -> list[tuple[Row, str]]:
    """Two figures, two questions each, one answer wrong: 75 per answer, 50 per figure, 50 per question."""
    names = [(f, q) for f in (0, 1) for q in (0, 1)]
    row = {"category": "VD", "l2-category": "chart"}
    replies = ["Yes", "Yes", "Yes", "No"]
    return [({**row, "index": f"VD_chart_x_0_{f}_{q}", "answer": "Yes"}, replies[i]) for i, (f, q) in enumerate(names)]


def read(_: str) -> list[tuple[Row, str]]:
    cases = [("['EXIT']", "It says Exit."), ("['12', 'twelve']", "twelve"), ("['open']", "closed"), ("['open']", "")]
    return [({"answer": a, "category": "Regular Text Recognition"}, answer) for a, answer in cases]


def answer(row: Row, reply: str) -> Answer:
    """The planted row as our own metrics take it."""
    options = {letter: row[letter] for letter in "ABCD" if letter in row}
    true = ast.literal_eval(row["answer"]) if row["answer"].startswith("[") else [row["answer"]]
    index = str(row["index"])
    question = index.rsplit("_", 1)[1] if "_" in index else str(int(index) % 10**6)
    image = row.get("image_path") or (index.split("_")[4] if "_" in index else index)
    return Answer(reply, tuple(true), options, image=image, question=question, category=row.get("category", ""))


# the kit's figure, and ours of the same answers; a share where the kit states one
CASES: dict[str, tuple[Callable[[str], list[tuple[Row, str]]], str, float, str, float]] = {
    "gqa": (words, "Overall", 50, "exact", 50),
    "sqa": (choices, "Overall", 0.5, "choice_vlmeval", 50),
    "textvqa": (of_ten, "Overall", 40, "vqa", 40),
    "pope": (objects, "Overall/Overall", 200 * 2 / (3 + 3), "pope_vlmeval", 200 * 2 / (3 + 3)),
    "mme": (pairs, "perception", 125, "mme", 125),
    "mmb": (circular, "Overall", 0.5, "choice_circular", 50),
    "mmstar": (choices, "Overall", 0.5, "choice_vlmeval", 50),
    "mmmu": (choices, "Overall", 0.5, "choice_vlmeval", 50),
    "ai2d": (choices, "Overall", 0.5, "choice_vlmeval", 50),
    "chartqa": (numbers, "Overall", 50, "relaxed", 50),
    "ocrbench": (read, "Text Recognition", 2, "ocrbench", 50),
    "hallusion": (figures, "Overall/qAcc", 50, "hallusion", 175 / 3),
    "seed": (choices, "Overall", 0.5, "choice_vlmeval", 50),
    "realworldqa": (choices, "Overall", 0.5, "choice_vlmeval", 50),
}
VIDEO = ("mvbench", "video_mme")


def plant(name: str, folder: Path) -> tuple[Path, dict[str, str], list[Answer]]:
    """The file of benchmark `name`, the model's answer to each question, and the same answers for our metrics."""
    rows, replies, answers = [], {}, []
    for index, (row, reply) in enumerate(CASES[name][0](name)):
        full = {"index": index, "image": IMAGE, "question": f"What, {name} {index}?", "split": "none", **row}
        if name in ("pope", "mme", "hallusion", "ocrbench", "gqa", "textvqa", "chartqa"):
            del full["split"]
        replies[full["question"]] = reply
        rows.append(full)
        answers.append(answer(full, reply))
    path = folder / f"{name}.tsv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path, replies, answers


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()[:8]


def test_every_benchmark_that_is_no_video_has_a_case() -> None:
    assert set(CASES) | set(VIDEO) == set(BENCHMARKS)


@needs_vlmeval
def test_the_light_kit_scores_its_own_benchmarks_as_we_do_and_as_is_known_by_hand(scripted: Scripted, tmp_path: Path) -> None:
    replies: dict[str, str] = {}
    tasks, ours = [], {}
    for name in CASES:
        path, spoken, ours[name] = plant(name, tmp_path)
        replies |= spoken
        tasks.append(f"{BENCHMARKS[name].kit_dataset}={path}")
    scripted.answer = lambda prompt: (200, replies[re.search(r"What, \w+ \d+\?", prompt).group()])  # type: ignore[union-attr]
    scores = vlmeval.score_tasks(session(scripted, tmp_path), tasks)
    assert len(scripted.questions) == len(replies)  # each once, and whichever way the kit words it
    assert any("Please select the correct answer from the options above" in prompt for prompt in scripted.questions)
    for name, (_, figure, kits, metric, expected) in CASES.items():
        of_task = {key: value for key, value in scores.items() if key.startswith(f"{BENCHMARKS[name].kit_dataset} (file ")}
        exact = [value for key, value in of_task.items() if key.endswith((f"not the kit's)/{figure}", f"/none/{figure}"))]
        assert exact == [pytest.approx(kits)], (name, of_task)
        ours_scored = score(metric, ours[name])  # type: ignore[arg-type]
        assert ours_scored["perception" if name == "mme" else "score"] == pytest.approx(expected), name
    hallusion = {
        key.rsplit("/", 1)[1]: v for key, v in scores.items() if key.startswith("HallusionBench") and "/Overall/" in key
    }
    assert hallusion == pytest.approx({"aAcc": 75, "fAcc": 50, "qAcc": 50})
    assert sum(key.endswith("/no answer") for key in scores) == sum("" in [s for _, s in CASES[n][0](n)] for n in CASES)


@needs_vlmeval
def test_questions_of_ones_own_need_no_more_than_the_four_columns(scripted: Scripted, tmp_path: Path) -> None:
    """Of two right answers each, one: a yes for two, an A for two, a word for two."""
    forms = {"closed": ("", ["yes", "no"]), "lettered": ("\tred\tblue", ["A", "B"]), "open": ("", ["red", "blue"])}
    for name, (options, right) in forms.items():
        lines = [f"{i}\t{IMAGE}\tWhat, {name} {i}?\t{answer}{options}" for i, answer in enumerate(right)]
        head = "index\timage\tquestion\tanswer" + ("\tA\tB" if options else "")
        (tmp_path / f"{name}.tsv").write_text("\n".join([head, *lines]) + "\n")
    replies = {"closed": "yes", "lettered": "A", "open": "red"}
    scripted.answer = lambda prompt: (200, next(answer for name, answer in replies.items() if name in prompt))
    files = [str(tmp_path / f"{name}.tsv") for name in forms]
    scores = vlmeval.score_tasks(session(scripted, tmp_path), files)
    assert scores["closed_POPE/Overall/acc"] == scores["closed_POPE/Overall/precision"] == 50
    assert scores["lettered/none/Overall"] == scores["open/exact match (ours)"] == 0.5


@needs_vlmeval
def test_a_benchmark_is_asked_without_its_images_as_a_control(scripted: Scripted, tmp_path: Path) -> None:
    path, replies, _ = plant("pope", tmp_path)
    scripted.answer = lambda prompt: (200, replies[re.search(r"What, \w+ \d+\?", prompt).group()])  # type: ignore[union-attr]
    scores = vlmeval.score_tasks(session(scripted, tmp_path), [f"POPE={path}"], blank=True)
    assert {key.split("/")[0] for key in scores if "no answer" not in key} == {
        f"POPE (file {digest(path)}, not the kit's), blank images"
    }
    (url,) = set(scripted.images)
    with (
        Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image,
        Image.open(io.BytesIO(base64.b64decode(IMAGE))) as planted,
    ):
        assert image.size == planted.size and image.getcolors() == [(planted.size[0] * planted.size[1], GREY)]


@needs_vlmeval
def test_a_benchmark_file_with_another_md5_is_not_taken_for_the_kits(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "LMUData"
    data.mkdir()
    plant("mmstar", tmp_path)[0].rename(data / "MMStar.tsv")
    monkeypatch.setenv(vlmeval.DATA, str(data))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody is there: the kit cannot fetch the right one
    with pytest.raises(TryAgainError, match="VLMEvalKit ended with 1"):
        vlmeval.score_tasks(session(scripted, tmp_path), ["MMStar"])
    assert not scripted.questions and "md5 does not match" in (tmp_path / "kit.log").read_text()


@needs_vlmeval
def test_what_the_kit_cannot_ask_a_student_is_said_in_a_sentence(scripted: Scripted, tmp_path: Path) -> None:
    video = BENCHMARKS["mvbench"].kit_dataset
    with pytest.raises(InputError, match=rf"no benchmark '{video}'.*make vlmeval-env"):
        vlmeval.score_tasks(session(scripted, tmp_path), [video])
    with pytest.raises(DataError, match="no such file"):
        vlmeval.score_tasks(session(scripted, tmp_path), ["MMStar=gone.tsv"])
