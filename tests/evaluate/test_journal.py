"""Answers on disk as they come: a killed evaluation goes on where it stopped, with the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config.load import load_settings
from components.dataset.shards import Samples
from components.evaluate import generate
from components.evaluate.__main__ import main
from components.evaluate.generate import answers, questions
from components.evaluate.journal import Journal
from components.models.load import Loaded
from components.models.template import Template
from components.records.paths import RUNS, SCORES
from tests.evaluate.conftest import Tracked

TEXTS = st.dictionaries(st.text(min_size=1), st.text(), max_size=4)


@settings(max_examples=20)  # each answer waits for the disk
@given(batches=st.lists(TEXTS, max_size=4), cut=st.integers(0, 400))
def test_wherever_the_file_is_cut_whole_lines_are_kept_and_writing_goes_on(
    tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, str]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "answers.jsonl"
    written = Journal(path)
    ends = [0]
    for batch in batches:
        written.add(batch)
        ends.append(path.stat().st_size)
    size = min(cut, ends[-1])
    with path.open("r+b") as file:
        file.truncate(size)
    complete = sum(end <= size for end in ends) - 1
    expected: dict[str, str] = {}
    for batch in batches[:complete]:
        expected |= batch
    reopened = Journal(path)
    assert reopened.answers == expected
    reopened.add({"more": "\u2028 line\nbreaks"})
    assert Journal(path).answers == expected | {"more": "\u2028 line\nbreaks"}


@pytest.mark.parametrize("damage", [b"\0\0\n", b'{"c": \n', b"[1]\n", b"\xff\n"])
def test_what_is_behind_a_damaged_line_is_asked_for_again(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"a": "one"}\n' + damage + b'{"b": "two"}\n')
    assert Journal(path).answers == {"a": "one"} and path.read_bytes() == b'{"a": "one"}\n'


def test_only_what_was_not_answered_is_generated(
    loaded: Loaded, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = load_settings(Path(__file__).parents[2]).evaluate.model_copy(update={"batch_size": 5, "max_new_tokens": 6})
    rows = questions(samples)
    uninterrupted = answers(loaded, samples, rows, Template(""), 64, evaluate, "tests")
    calls = 0
    generated = loaded.model.generate

    def killed(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return generated(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "generate", killed)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answers(loaded, samples, rows, Template(""), 64, evaluate, "tests", Journal(path))
    assert len(Journal(path).answers) == 15
    resumed = answers(loaded, samples, rows, Template(""), 64, evaluate, "tests", Journal(path))
    assert resumed == uninterrupted
    assert calls == 4 + 4  # 32 questions are 7 batches: three done, one killed, four to go


def test_the_killed_stage_goes_on_to_the_same_bytes(workplace: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    params = workplace / "params/evaluate.yaml"
    params.write_text(params.read_text().replace("batch_size: 250", "batch_size: 10"))
    monkeypatch.setattr("sys.argv", ["evaluate", "--arm", "kd"])
    main()
    expected = {file.name: file.read_bytes() for file in (SCORES / "kd").iterdir()}
    assert not list((RUNS / "evaluate/kd").glob("*.jsonl"))  # nothing is left to go on from
    real = generate.Collator.__call__
    batches: list[int] = []

    def counting(self: generate.Collator, batch: list[object]) -> object:
        if not self.train:  # questions, and not references
            batches.append(len(batch))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(generate.Collator, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        main()
    main()
    assert batches == [10, 10, 10, 10, 2]
    assert {file.name: file.read_bytes() for file in (SCORES / "kd").iterdir()} == expected
