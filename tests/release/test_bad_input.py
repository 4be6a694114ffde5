"""The table of docs/students.md: each wrong input goes the way that the stages take it, to one sentence and one exit code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from components.config.models import Checkpoint
from components.dataset.shards import Samples
from components.distill import export as distilled
from components.models import download as obtaining
from components.models.collate import Collator
from components.models.download import obtain
from components.models.load import check_images, load
from components.models.template import Template
from components.process import exit_from
from components.records.distill import Cost
from components.records.paths import DATASET, STUDENTS
from tests.families import toy
from tests.release.conftest import COMMIT, ROOT

PAGE = ROOT / "docs/students.md"
MODELS = Path("artifacts/models/teachers")
WEIGHTS = "model.safetensors"


def documented() -> dict[str, tuple[int, str]]:
    """Case -> exit code, sentence."""
    text = PAGE.read_text(encoding="utf-8").partition("test_bad_input.py -->")[2].partition("<!-- end")[0]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    return {case: (int(code), sentence) for case, code, sentence in rows}


def of_the_hub(answer: Exception | Path) -> Callable[[], None]:
    """The stage obtain_models on a hub id, the hub's client giving this answer."""

    def go() -> None:
        def snapshot(*_: object, **__: object) -> str:
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(obtaining, "snapshot_download", snapshot)
            obtain(Checkpoint(source="org/model", revision=COMMIT), MODELS / "theirs")

    return go


def of_a_folder(damage: Callable[[Path], object], style: str = "vicuna") -> Callable[[], None]:
    """A user's own folder, damaged: brought here, opened, and what its first batch needs."""

    def go() -> None:
        damage(Path("theirs"))
        path = obtain(Checkpoint(source="theirs", revision=None), MODELS / "theirs")
        loaded = load(path, "cpu")
        check_images(loaded)
        Collator(loaded.processor, Template("", style=style), 400, train=True)  # type: ignore[arg-type]

    return go


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def half_a_snapshot(folder: Path) -> Path:
    named = {"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(named))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def float8_weight(weights: dict[str, torch.Tensor]) -> None:
    key = next(iter(weights))
    weights[key] = weights[key].to(torch.float8_e4m3fn)


def say(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def pickles(folder: Path) -> Path:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    return folder


def a_shard() -> None:
    flipped(next((DATASET / "train").glob("*.arrow")))
    Samples(DATASET, "train")


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device", "x")


def copied_to_a_full_disk() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obtaining.shutil, "copy2", full)
        obtain(Checkpoint(source="theirs", revision=None), MODELS / "theirs")


def written_to_a_full_disk() -> None:
    student = toy.loaded("llava_onevision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilled, "save", full)
        cost = Cost(train_seconds=0, peak_memory_mib=0, device="cpu", steps=1)
        distilled.export(STUDENTS / "kd", student, Template(""), "# card", [], cost)


CASES: dict[str, Callable[[], None]] = {
    "a hub id that is wrong": of_the_hub(hub.RepositoryNotFoundError("404", response=response(404))),
    "a hub id that is gated": of_the_hub(hub.GatedRepoError("gated", response=response(403))),
    "no network": of_the_hub(hub.LocalEntryNotFoundError("no network")),
    "a download that breaks off": of_the_hub(ConnectionResetError("reset by peer")),
    "a snapshot half of which is there": lambda: of_the_hub(half_a_snapshot(Path("theirs")))(),
    "a file of weights cut short": of_a_folder(lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-99])),
    "a file of weights with a broken header": of_a_folder(lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 999)),
    "weights in a dtype that is not read": of_a_folder(lambda f: rewrite(f, float8_weight)),
    "quantised weights": of_a_folder(lambda f: say(f, "config.json", quantization_config={"quant_method": "gptq"})),
    "pickled weights on the hub": lambda: of_the_hub(pickles(Path("theirs")))(),
    "pickled weights in a folder": of_a_folder(pickles),
    "weights that are not all there": of_a_folder(lambda f: rewrite(f, lambda w: w.pop(next(k for k in w if "o_proj" in k)))),
    "a tokenizer without chat template, style `processor`": of_a_folder(without_template, "processor"),
    "a processor that writes other image tokens than the model expects": of_a_folder(
        lambda f: say(f, "processor_config.json", num_image_tokens=9)
    ),
    "a shard of the data set with a flipped byte": a_shard,
    "a full disk while a model is copied": copied_to_a_full_disk,
    "a full disk while a student is written": written_to_a_full_disk,
}


def test_the_table_and_the_cases_are_the_same() -> None:
    assert list(documented()) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_one_exit_code_and_nothing_half_written(
    case: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy.folder("llava_onevision", 2, 2), "theirs")
    previous = set(Path("artifacts").rglob("*"))
    with pytest.raises(SystemExit) as end:
        exit_from(CASES[case])
    kind, _, message = capsys.readouterr().err.splitlines()[-1].partition(": ")
    code, sentence = documented()[case]
    assert end.value.code == code == (75 if kind == "TryAgainError" else 2)
    pattern = ".+".join(map(re.escape, sentence.split("…")))
    assert re.fullmatch(pattern, message), message
    new = set(Path("artifacts").rglob("*")) - previous
    complete = {path for path in new if (MODELS / "theirs" / WEIGHTS).is_file()}  # brought here whole, and refused when opened
    assert new == complete and not [path for path in new if path.name.startswith(".")]
