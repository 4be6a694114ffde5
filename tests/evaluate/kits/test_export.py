"""A split as the kit's TSV files."""

from __future__ import annotations

import ast
import base64
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from components.dataset.shards import Sample, Turn
from components.errors import DataError, InputError
from components.evaluate.kits import export, vlmeval
from tests.evaluate import tiny


def sample(number: int, kind: str, answer: str, image: bytes | None = tiny._row("x", 0, {}).image) -> Sample:
    mark = "<image>\n" if image else ""
    return Sample(f"s{number}", f"i{number}", kind, image, (Turn(f"{mark}What, {number}?", answer),))


def test_each_kind_gets_the_form_that_the_kit_scores_rightly() -> None:
    rows = [sample(0, "exist", "Yes"), sample(1, "exist", "no"), sample(2, "colour", "red"), sample(3, "colour", "blue")]
    rows += [sample(4, "sum", "six"), sample(5, "sum", "sixteen")]  # an answer `sixteen` names both: the kit could not choose
    rows += [sample(6, "one", "only"), sample(7, "text", "red", image=None)]
    rows += [sample(35, "lines", "one"), sample(36, "lines", "two\nlines")]
    rows += [sample(8 + i, "many", f"word{chr(97 + i // 26)}{chr(97 + i % 26)}") for i in range(27)]
    sets = export.sets(rows, range(len(rows)))
    assert [(s.form, s.rows) for s in sets] == [("mcq", [2, 3]), ("yes_no", [0, 1]), ("vqa", [4, 5, 6, *range(8, 37)])]


COLOURS = ["red", "green", "blue", "grey"]


def test_the_files_hold_what_the_kit_reads(tmp_path: Path) -> None:
    samples = [sample(0, "colour", "Red."), sample(1, "colour", "blue"), sample(2, "digit", "one"), sample(3, "digit", "two")]
    (kit_set,) = export.sets(samples, range(4))
    path = export.write(kit_set, samples, tmp_path / "mcq.tsv", seed=1)
    rows = list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))
    assert [(r["index"], r[r["answer"]], {r["A"], r["B"]}, r["category"]) for r in rows] == [
        ("0", "red", {"blue", "red"}, "colour"),
        ("1", "blue", {"blue", "red"}, "colour"),
        ("2", "one", {"one", "two"}, "digit"),
        ("3", "two", {"one", "two"}, "digit"),
    ]
    assert rows[0]["question"] == "What, 0?" and base64.b64decode(rows[0]["image"]) == samples[0].image
    assert vlmeval.check_tsv(path) == ("mcq", 4)


def test_several_images_are_a_list_and_those_among_words_keep_their_marks(tmp_path: Path) -> None:
    red, blue = sample(0, "compare", "same"), sample(1, "compare", "other")
    opened = replace(red, turns=(Turn("<image><image>\nAlike?", "same"),), more=(blue.image,))
    among = replace(blue, turns=(Turn("Is <image> like <image>?", "other"),), more=(red.image,))
    for samples, form, question in (([opened, blue], "mcq", "Alike?"), ([among, opened], "vqa", "Is <image> like <image>?")):
        (kit_set,) = export.sets(samples, range(2))
        path = export.write(kit_set, samples, tmp_path / "set.tsv", seed=1)
        first = next(vlmeval.table(path))
        images = [base64.b64decode(image) for image in ast.literal_eval(first["image"])]
        assert (kit_set.form, first["question"], images) == (form, question, list(samples[0].images))
        assert vlmeval.check_tsv(path) == (form, 2)


def test_options_stand_in_an_order_of_each_question_that_the_seed_decides(tmp_path: Path) -> None:
    samples = [sample(i, "colour", COLOURS[i % 4]) for i in range(200)]
    (kit_set,) = export.sets(samples, range(200))

    def orders(seed: int, rows: Sequence[int] = kit_set.rows) -> dict[str, list[str]]:
        path = export.write(export.KitSet("mcq", list(rows)), samples, tmp_path / "o.tsv", seed)
        table = list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))
        assert [r[r["answer"]] for r in table] == [COLOURS[int(r["index"]) % 4] for r in table]  # the letter moved along
        return {r["index"]: [r[letter] for letter in "ABCD"] for r in table}

    seeded = orders(seed=1)
    assert seeded == orders(seed=1) and seeded != orders(seed=2)
    assert orders(seed=1, rows=kit_set.rows[50:]) == {row: order for row, order in seeded.items() if int(row) >= 50}
    assert len({tuple(order) for order in seeded.values()}) == 24
    right = [order.index(COLOURS[int(row) % 4]) for row, order in seeded.items()]
    assert all(30 <= right.count(position) <= 70 for position in range(4))  # no letter is a good guess


def test_every_rotation_of_a_question_is_a_row(tmp_path: Path) -> None:
    samples = [sample(i, "colour", COLOURS[i]) for i in range(4)]
    (kit_set,) = export.sets(samples, range(4))
    path = export.write(kit_set, samples, tmp_path / "turned.tsv", seed=1, rotations=True)
    rows = list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))
    for row in range(4):
        rotations = [r for r in rows if int(r["index"]) % export.ROTATION_OFFSET == row]
        assert [int(r["index"]) // export.ROTATION_OFFSET for r in rotations] == [0, 1, 2, 3]
        assert {r["answer"] for r in rotations} == set("ABCD") and {r[r["answer"]] for r in rotations} == {COLOURS[row]}


def tsv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["index\timage\tquestion\tanswer", *rows]) + "\n")
    return path


IMAGE = base64.b64encode(tiny._row("x", 0, {}).image or b"").decode()
NO_PICTURE = base64.b64encode(b"x" * 100).decode()


def test_a_file_that_the_kit_would_mix_up_or_thin_out_is_refused_by_row(tmp_path: Path) -> None:
    rows = [f"1\t{IMAGE}\tq\tyes", f"1\t{IMAGE}\tr\tno", "2\t\tq\tno", "3\tgone.png\tq\tno", f"4\t{NO_PICTURE}\tq\tno"]
    twice = tsv(tmp_path / "twice.tsv", *rows)
    with pytest.raises(DataError) as refused:
        vlmeval.check_tsv(twice)
    named = ["index 1 stands 2 times", "index 2 has no image", "index 3: its image is missing", "index 4: its image is missing"]
    for problem in (*named, "nothing was asked"):
        assert problem in str(refused.value)
    assert vlmeval.check_tsv(tsv(tmp_path / "fine.tsv", f"1\t{IMAGE}\tq\tYes", "2\t1\tr\tno")) == (
        "yes_no",
        2,
    )  # 2 shares 1's image
    assert vlmeval.check_tsv(tsv(tmp_path / "open.tsv", f"1\t{IMAGE}\tq\ta red car")) == ("vqa", 1)
    for broken in (tmp_path / "none.tsv", tsv(tmp_path / "empty.tsv")):
        with pytest.raises(DataError):
            vlmeval.check_tsv(broken)


@pytest.mark.parametrize("row", ["\tq", '\t"q\tyes\n2\t1\tr\tno', "\tq\tyes\tno"])
def test_a_row_with_other_cells_than_the_header_is_refused(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match="index 1 has more or fewer cells than the header: a tab or a quote"):
        vlmeval.check_tsv(tsv(tmp_path / "mine.tsv", f"1\t{IMAGE}{row}"))


def test_a_file_may_have_a_byte_order_mark_and_is_utf_8(tmp_path: Path) -> None:
    path = tsv(tmp_path / "mine.tsv", f"1\t{IMAGE}\tq\tcaf\u00e9")
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert vlmeval.check_tsv(path) == ("vqa", 1)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"mine.tsv is no UTF-8 text .*; save it as UTF-8"):
        vlmeval.check_tsv(path)


def test_no_file_takes_the_place_of_another_or_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would have overwritten the first; the leaderboard would have shown the third as MMBench."""
    (tmp_path / "b").mkdir()
    first, second = (str(tsv(folder / "mine.tsv", f"1\t{IMAGE}\tq\tred")) for folder in (tmp_path, tmp_path / "b"))
    assert list(vlmeval.check_files([first, first, f"MMStar={second}"])) == ["mine", "MMStar"]
    swept = tmp_path / "lr=0.1/swept.tsv"
    swept.parent.mkdir()
    swept.write_bytes(Path(first).read_bytes())
    assert list(vlmeval.check_files([str(swept), f"MMStar={swept}"])) == ["swept", "MMStar"]
    monkeypatch.chdir(tmp_path)
    assert list(vlmeval.check_files(["lr=0.1/swept.tsv", "MMStar=lr=0.1/swept.tsv"])) == ["swept", "MMStar"]
    for tasks in ([first, second], [f"MMStar={first}", f"MMStar={second}"]):
        with pytest.raises(InputError, match=r"mine.tsv and .*b/mine.tsv would both be data set (mine|MMStar): rename one"):
            vlmeval.check_files(tasks)
    lettered = tmp_path / "lettered.tsv"
    lettered.write_text(f"index\timage\tquestion\tanswer\tA\tB\n1\t{IMAGE}\tq\tA\tred\tblue\n2\t1\tq\tred\tred\tblue\n")
    with pytest.raises(DataError, match="the answer of index 2 is not the letter of one of its options"):
        vlmeval.check_files([str(lettered)])  # the kit would count every answer as wrong
    named = tsv(tmp_path / "MMBench_DEV_EN.tsv", f"1\t{IMAGE}\tq\tred")
    with pytest.raises(InputError, match=rf"--task MMBench_DEV_EN={named} scores it by its rule"):
        vlmeval.check_files([str(named)])
