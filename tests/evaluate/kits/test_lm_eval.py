"""lm-eval on a tiny student: the same answers and verdicts as the stage `evaluate`, and a journal that knows images apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from components.config.load import load_settings
from components.dataset.shards import Samples
from components.errors import DataError, InputError
from components.evaluate import fingerprint
from components.evaluate.generate import answers, questions
from components.evaluate.kits import lm_eval, lm_eval_tasks, measure
from components.evaluate.kits.measure import Bench
from components.evaluate.metrics import matches
from components.models.load import load, load_processor
from components.models.template import Template
from components.records.paths import DATASET, STUDENTS
from tests.evaluate import tiny
from tests.evaluate.kits.conftest import needs_lm_eval

CPU = torch.device("cpu")


@pytest.fixture
def root(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lm_eval_tasks.split.cache_clear()
    return workplace


def measured(journal: Path, tasks: list[str], batch_size: int = 7) -> lm_eval.Measured:
    new_tokens = load_settings().evaluate.max_new_tokens
    return lm_eval.evaluate(STUDENTS / "sft/model", CPU, tasks, [], batch_size, new_tokens, journal)


@needs_lm_eval
def test_its_answers_and_verdicts_are_ours_and_text_is_measured_too(root: Path) -> None:
    """Every other reference is not what the student answers: it would be right everywhere. The first one reads as a list."""
    samples = Samples(DATASET, "test")
    rows = questions(samples)
    references = {samples[row].id: samples[row].turns[0].answer for row in rows[::2]}
    references[samples[rows[0]].id] = "[0.1, 0.25]"
    shutil.rmtree(DATASET)
    samples = Samples(tiny.save_dataset(DATASET, images=8, references=references), "test")
    result = measured(root / "answers.jsonl", [lm_eval.QUESTIONS, *lm_eval.TEXT])
    expected = answers(load(STUDENTS / "sft/model", "cpu"), samples, rows, Template(""), 64, load_settings().evaluate, "tests")
    assert [result.answers[row] for row in rows] == expected
    assert [result.verdicts[row] for row in rows] == [
        matches(answer, samples[row].turns[0].answer) for row, answer in zip(rows, expected, strict=True)
    ]
    assert 0 < sum(result.verdicts.values()) < len(rows) < 2 * len(set(expected))
    assert set(result.figures) == {"alignti_language/word_perplexity", "alignti_manners/acc"}
    assert result.figures["alignti_language/word_perplexity"] > 1 and 0 <= result.figures["alignti_manners/acc"] <= 1


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ '<|endoftext|>' if m['role'] == 'assistant' }} {% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)


@needs_lm_eval
def test_a_student_with_a_template_of_its_own_is_asked_and_read_in_that(root: Path) -> None:
    settings = root / "params/models.yaml"
    params = settings.read_text().replace("style: vicuna", "style: processor").replace('system: ""', "system: List a red yes.")
    settings.write_text(params)
    processor = load_processor(STUDENTS / "sft/model")
    processor.chat_template = TEMPLATE.replace("<image>", processor.image_token)
    processor.save_pretrained(STUDENTS / "sft/model")
    result = lm_eval.evaluate(
        STUDENTS / "sft/model",
        CPU,
        [lm_eval.QUESTIONS, "alignti_language"],
        [],
        7,
        load_settings().evaluate.max_new_tokens,
        root / "a.jsonl",
        system="List a red yes.",
    )
    bench = Bench(load_settings())
    template = Template.from_settings(bench.settings.models.template)
    expected = answers(
        load(STUDENTS / "sft/model", "cpu"), bench.samples, bench.rows, template, 64, bench.settings.evaluate, "tests"
    )
    assert [result.answers[row] for row in bench.rows] == expected and len(set(expected)) > 6
    texts = lm_eval_tasks.conversations(model=str(STUDENTS / "sft/model"))["test"]["text"]
    turn = bench.samples[bench.rows[0]].turns[0]
    question = lm_eval_tasks.question_of(turn)
    assert texts[0] == f"system:List a red yes. user:{question} assistant:{turn.answer}"
    assert result.figures["alignti_language/word_perplexity"] > 1
    ours = fingerprint.prompt_hash(processor, bench.samples, bench.rows, template)
    kits = measure._fingerprint(bench, STUDENTS / "sft/model", bench.rows, "lm-eval").prompt_hash
    settings.write_text(params.replace("style: processor", "style: vicuna"))
    switched = measure._fingerprint(Bench(load_settings()), STUDENTS / "sft/model", bench.rows, "lm-eval")
    assert switched.prompt_hash == kits == ours  # kits ask with the saved template, whatever the settings say


@needs_lm_eval
def test_what_the_journal_has_is_not_generated_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.hf_vlms import HFMultimodalLM

    generated = HFMultimodalLM._model_multimodal_generate
    batches: list[int] = []

    def killed(self: HFMultimodalLM, inputs: dict[str, torch.Tensor], *args: object, **kwargs: object) -> object:
        batches.append(len(inputs["input_ids"]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generated(self, inputs, *args, **kwargs)

    uninterrupted = measured(root / "whole.jsonl", [lm_eval.QUESTIONS], batch_size=8)
    monkeypatch.setattr(HFMultimodalLM, "_model_multimodal_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(root / "cut.jsonl", [lm_eval.QUESTIONS], batch_size=8)
    assert measured(root / "cut.jsonl", [lm_eval.QUESTIONS], batch_size=8) == uninterrupted
    assert batches == [8, 8, 8, 8, 8]  # 32 questions: two batches, one killed, two to go


ARC = """---
configs:
- config_name: ARC-Easy
  data_files:
  - {split: train, path: ARC-Easy/test.jsonl}
  - {split: validation, path: ARC-Easy/test.jsonl}
  - {split: test, path: ARC-Easy/test.jsonl}
---
"""  # as the hub's card of allenai/ai2_arc lists them


@needs_lm_eval
def test_a_task_of_the_kits_own_is_found_by_name_and_scores_local_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right whatever the model: three questions with one choice. Wrong: the second of two equal choices, as the first wins."""
    texts = [["red"], ["blue"], ["grey"], ["red", "red"]]
    rows = [
        {
            "id": str(i),
            "question": "Which?",
            "choices": {"text": t, "label": list("AB")[: len(t)]},
            "answerKey": "AB"[len(t) - 1],
        }
        for i, t in enumerate(texts)
    ]
    (root / "arc/ARC-Easy").mkdir(parents=True)
    (root / "arc/README.md").write_text(ARC)
    (root / "arc/ARC-Easy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    from lm_eval import tasks

    def manager(include_path: str, include_defaults: bool, kind: type = tasks.TaskManager, **_: object) -> tasks.TaskManager:
        assert include_defaults  # thousands of files; the test reads the one folder of them that it needs
        return kind(include_path=[include_path, str(Path(tasks.__file__).parent / "arc")], include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", manager)

    def score(task: str) -> dict[str, float]:
        return lm_eval.evaluate(STUDENTS / "sft/model", CPU, [], [task], 4, 8, root / "a.jsonl").figures

    assert score(f"arc_easy={root / 'arc'}") == {
        f"arc_easy (data: {root / 'arc'})/{name}": 0.75 for name in ("acc", "acc_norm")
    }


@needs_lm_eval
def test_a_stock_task_or_its_data_that_is_not_there_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks

    class Manager:  # the kit's own reads thousands of files to know its tasks
        all_tasks = ("arc_easy",)

    monkeypatch.setattr(tasks, "TaskManager", lambda **_: Manager())
    for task, error, message in (
        ("arc_hard", InputError, "no task 'arc_hard'"),
        ("arc_easy=gone", DataError, "gone: no such folder"),
    ):
        with pytest.raises(error, match=message):
            lm_eval.evaluate(STUDENTS / "sft/model", CPU, [], [task], 4, 8, root / "a.jsonl")


def test_without_the_kit_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lm-eval is not installed here: `make kits`"):
        lm_eval.installed()


@needs_lm_eval
def test_a_broken_image_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(document: dict[str, object]) -> object:
        raise DataError(f"sample {document['id']}: image does not decode")

    monkeypatch.setattr(lm_eval_tasks, "image", broken)
    with pytest.raises(DataError, match="does not decode"):
        measured(root / "a.jsonl", [lm_eval.QUESTIONS])


def test_manners_offers_one_answer_of_the_right_kind(root: Path) -> None:
    samples = Samples(DATASET, "test")
    kinds: dict[str, set[str]] = {}
    for row in questions(samples):
        kinds.setdefault(samples[row].kind, set()).add(lm_eval_tasks.normalise(samples[row].turns[0].answer))
    documents = lm_eval_tasks.manners()["test"]
    by_question = {lm_eval_tasks.question_of(samples[r].turns[0]): samples[r].kind for r in questions(samples)}
    assert len(documents) == len(questions(samples)) and len(set(documents["right"])) > 1
    for document in documents:
        of_kind = kinds[by_question[document["question"]]]
        assert [choice in of_kind for choice in document["choices"]] == [index == document["right"] for index in range(4)]
