"""The stage `write_answers`, and `distill` on what the teacher wrote: sequence-level KD."""

from __future__ import annotations

import json
import shutil
import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.load import load_settings
from components.dataset.shards import CAPTION, Samples
from components.distill.__main__ import distill
from components.distill.assemble import assemble
from components.distill.loader import Steps
from components.errors import DataError, Interrupted, SettingsError
from components.io import sha256, write_text
from components.models.families import prompt
from components.models.load import load
from components.models.writing import Writer
from components.records.paths import ANSWERS, DATASET, ROWS
from components.records.record import jsonl
from components.records.teacher_answers import Answered, AnswerManifest
from components.teacher_answers import __main__ as stage
from components.teacher_answers.store import Answers, facts
from components.tracking.journal import Run
from tests.distill.conftest import write_params
from tests.distill.test_scale import StopsAt

GREEDY = {"samples": 1, "temperature": 0.0, "top_p": None, "max_new_tokens": 40}
DRAWN = GREEDY | {"samples": 2, "temperature": 1.0}
ARM: dict[str, Any] = {"weights": {"sft": 1.0}, "student": "student", "seed": 1, "answers": "teacher"}
FOLDER = Path("artifacts/students/seqkd")


@pytest.fixture
def seqkd(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_params(workplace, "distill", {"teacher_answers": DRAWN})
    write_params(workplace, "study", {"arms": {"seqkd": ARM}})
    write_params(workplace, "evaluate", {"baselines": ["seqkd"]})
    monkeypatch.setenv("ALIGNTI_DEVICE", "cpu")
    return workplace


def lines() -> dict[int, Answered]:
    answered = [Answered.model_validate_json(line) for part in sorted(ANSWERS.glob("part-*")) for line in part.open()]
    return {line.sample: line for line in answered}


def trained(run: Run) -> bytes:
    settings = load_settings()
    distill("seqkd", settings.arm("seqkd"), settings, run)
    return (FOLDER / "model/model.safetensors").read_bytes()


def test_where_none_are_asked_for_only_a_note_is_left(seqkd: Path) -> None:
    stage.main()
    assert lines()
    write_params(seqkd, "distill", {"teacher_answers": None})
    write_params(seqkd, "study", {"arms": {"seqkd": ARM | {"answers": None}}})
    stage.main()
    assert json.loads((ANSWERS / "manifest.json").read_text()) == {"written": None}
    assert [path.name for path in ANSWERS.iterdir()] == ["manifest.json"]


def test_each_answer_and_its_log_probability_are_the_teachers(seqkd: Path) -> None:
    stage.main()
    written = AnswerManifest.read(ANSWERS / "manifest.json").written
    samples, answered = Samples(DATASET, "train", ROWS), lines()
    assert written is not None and set(answered) == {i for i, kind in enumerate(samples.kinds) if kind != CAPTION}
    counts = [len(answers) for line in answered.values() for answers in line.answers]
    assert written.answers == sum(counts) + written.cut_off and 0 < written.cut_off <= 2 * len(answered) < written.answers
    job = assemble("seqkd", load_settings().arm("seqkd"), load_settings())
    teacher = load(Path("artifacts/models/teachers/base"), "cpu")
    several = [row for row, line in answered.items() if max(map(len, line.answers), default=0) > 1][:3]
    assert several
    for row in several:
        answers, log_probs = max(
            zip(answered[row].answers, answered[row].log_probs, strict=True), key=lambda pair: len(pair[0])
        )
        for turn, (tokens, log_prob) in enumerate(zip(answers, log_probs, strict=True)):
            given = prompt(teacher.model, job.collator.of_prompts([samples[row]], [answers[:turn]]))
            prompt_length = given["input_ids"].shape[1]
            input_ids = torch.cat([given["input_ids"], torch.tensor([tokens])], dim=1)
            with torch.no_grad():
                logits = teacher.model(**given | {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}).logits
            each = logits[0, prompt_length - 1 : -1].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
            assert log_prob == pytest.approx(float(each.sum()), rel=1e-4)


def test_epochs_take_one_answer_after_another_and_samples_without_any_are_left_out(seqkd: Path) -> None:
    stage.main()
    job, answered = assemble("seqkd", load_settings().arm("seqkd"), load_settings()), lines()
    assert {len(line.answers) for line in answered.values()} == {0, 1, 2}
    assert job.order.samples == [sample for sample, line in answered.items() if line.answers]
    steps = Steps(job.samples, job.collator, job.order, job.distill, 0, 1, None, job.answers)
    for step in range(8):  # two epochs
        ((batch, _),) = steps[step]  # type: ignore[misc]
        for row, (key, sample) in enumerate(job.order.batch(step)):
            answers = answered[sample].answers
            taken = answers[job.order.epoch(key) % len(answers)]
            assert batch.input_ids[row][batch.response[row]].tolist() == [token for answer in taken for token in answer]
    write_params(seqkd, "distill", {"teacher_answers": GREEDY | {"max_new_tokens": 1}})
    stage.main()
    with pytest.raises(DataError, match=r"none of the teacher's 16 answers has an end; raise"):
        trained(Run(None))


def test_filters_keep_what_is_right_or_likely_up_to_the_first_that_is_not(seqkd: Path) -> None:
    stage.main()
    answer_facts = facts(load_settings())

    def conversations(keep: Any) -> dict[int, list[list[list[int]]]]:
        return Answers(ANSWERS, answer_facts, keep)._conversations

    written = {i: line for i, line in lines().items() if line.answers}
    assert conversations(None) == {i: line.answers for i, line in written.items()}
    per_token = {
        tuple(ids): total / len(ids)
        for line in written.values()
        for answers, totals in zip(line.answers, line.log_probs, strict=True)
        for ids, total in zip(answers, totals, strict=True)
    }
    median = statistics.median(total for line in written.values() for totals in per_answer(line) for total in totals)
    likely = conversations("likely")
    for i, line in written.items():
        assert likely.get(i, []) == [
            answers[:count]
            for answers in line.answers
            if (count := len(list(takewhile(lambda ids: per_token[tuple(ids)] >= median, answers))))
        ]
    assert 0 < sum(map(len, likely.values())) < sum(len(line.answers) for line in written.values())

    first = min(written)
    part = next(iter(sorted(ANSWERS.glob("part-*"))))
    turns = Samples(DATASET, "train", ROWS)[first].turns
    assert written[first].right == [
        [text.split() == turn.answer.split() for text, turn in zip(texts, turns, strict=False)]
        for texts in written[first].texts
    ]
    changed = [line.model_copy(update={"right": [[i == first] * len(a) for a in line.answers]}) for i, line in lines().items()]
    part.write_text("".join(f"{line.model_dump_json()}\n" for line in changed))
    manifest = AnswerManifest.read(ANSWERS / "manifest.json")
    assert manifest.written is not None
    files = {part.name: sha256([part])}
    AnswerManifest(written=manifest.written.model_copy(update={"files": files})).write(ANSWERS / "manifest.json")
    assert conversations("right") == {first: written[first].answers}
    with pytest.raises(DataError, match=r"none of the teacher's [\d,]+ answers is right and has an end; raise"):
        Answers(ANSWERS, answer_facts, "right").answered([i for i in written if i != first])


def per_answer(line: Answered) -> list[list[float]]:
    pairs = zip(line.answers, line.log_probs, strict=True)
    return [[total / len(ids) for ids, total in zip(answers, totals, strict=True)] for answers, totals in pairs]


def test_a_line_separator_in_an_answer_is_no_end_of_line(seqkd: Path) -> None:
    stage.main()
    part = next(iter(sorted(ANSWERS.glob("part-*"))))
    odd = [line.model_copy(update={"texts": [["a\u2028b\u0085c"] * len(a) for a in line.answers]}) for line in lines().values()]
    write_text(part, jsonl(odd))
    assert Answered.read_lines(part) == odd


def test_interrupted_goes_on_and_so_does_the_training_on_them(seqkd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PART", 4)
    stage.main()
    outputs = {path.name: path.read_bytes() for path in ANSWERS.iterdir()}
    shutil.rmtree(ANSWERS)
    write, calls = Writer.write, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.generate(load_settings())
    assert not ANSWERS.exists()
    stage.generate(load_settings())
    assert {path.name: path.read_bytes() for path in ANSWERS.iterdir()} == outputs
    assert len(calls) == 6 + 8 - 4, "what was written of it is not written again"
    bytes_of = trained(Run(None))
    shutil.rmtree(FOLDER)
    with pytest.raises(Interrupted):
        trained(StopsAt(3))
    assert trained(Run(None)) == bytes_of


def test_what_an_interrupted_stage_wrote_for_another_length_is_not_gone_on_with(
    seqkd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "PART", 4)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerManifest, "write", None)  # after the last part
        with pytest.raises(TypeError):
            stage.generate(load_settings())
    write_params(seqkd, "models", {"max_length": 40})
    stage.generate(load_settings())
    made = assemble("seqkd", load_settings().arm("seqkd"), load_settings())
    longest = [made.answers.conversation(i, 0) for i in made.order.samples]  # type: ignore[union-attr]
    assert made.collator([made.samples[i] for i in made.order.samples], longest).input_ids.shape[1] <= 40


@pytest.mark.parametrize(
    ("arm", "distills", "message"),
    [
        ({}, {"teacher_answers": None}, "arms.seqkd.answers: the teacher writes none"),
        (
            {"weights": {"kd": 1.0}},
            {"teacher_signals": {"source": "cache", "kind": "top_k", "top_k": 4, "draws": 50, "evidence": None}},
            "arms.seqkd.answers: the cache holds the teacher at the data's answers",
        ),
        ({"answers": None, "answer_filter": "right"}, {}, "answer_filter: it is of the teacher's answers"),
        ({}, {"micro_batch_tokens": 64}, "set micro_batch_tokens to null"),
        ({}, {"teacher_answers": GREEDY | {"samples": 2}}, "greedy answers are all the same"),
    ],
)
def test_what_cannot_be_combined_is_refused(seqkd: Path, arm: dict[str, Any], distills: dict[str, Any], message: str) -> None:
    write_params(seqkd, "study", {"arms": {"seqkd": ARM | arm}})
    write_params(seqkd, "distill", distills)
    with pytest.raises(SettingsError, match=message):
        load_settings()


def test_answers_of_other_settings_and_damaged_ones_are_refused(seqkd: Path) -> None:
    stage.main()
    write_params(seqkd, "distill", {"teacher_answers": GREEDY})
    with pytest.raises(DataError, match=r"asked is .* there, .* here; `dvc repro write_answers`"):
        trained(Run(None))
    write_params(seqkd, "distill", {"teacher_answers": DRAWN})
    (ANSWERS / "part-00000.jsonl").write_text("")
    with pytest.raises(DataError, match="missing or has other bytes"):
        trained(Run(None))
