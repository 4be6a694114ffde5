"""A fingerprint changes with whatever changes a score, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from components.config.evaluate import EvaluateSettings
from components.config.load import load_settings
from components.dataset.shards import Samples
from components.evaluate.fingerprint import differences, digest, for_evaluate
from components.evaluate.generate import questions
from components.models.load import Loaded, load
from components.models.template import Template
from components.records.evaluate import Fingerprint
from tests.evaluate import tiny

FIRST = Fingerprint(
    kit="alignti",
    kit_version="1",
    dataset="digits/test",
    dataset_hash="a" * 64,
    prompt_hash="b" * 64,
    decoding={"do_sample": False, "max_new_tokens": 8},
    judge="exact match",
    transformers="5.23.0",
    dtype="float32",
    device="cpu",
)


@pytest.fixture(scope="module")
def settings() -> EvaluateSettings:
    return load_settings(Path(__file__).parents[2]).evaluate


def test_what_the_stage_measured_is_on_record(loaded: Loaded, samples: Samples, settings: EvaluateSettings) -> None:
    record = for_evaluate(loaded, samples, questions(samples), Template(""), settings)
    assert (record.kit, record.dataset, record.dtype, record.device) == ("alignti", "tests/test", "float32", "cpu")
    assert record.transformers == transformers.__version__
    assert record.decoding == {"do_sample": False, "max_new_tokens": settings.max_new_tokens}
    assert len(record.kit_version) == 12 and len(record.dataset_hash) == len(record.prompt_hash) == 64


def test_two_models_measured_alike_agree_and_what_differs_is_named(
    loaded: Loaded, model_folder: Path, samples: Samples, settings: EvaluateSettings, tmp_path: Path
) -> None:
    rows = questions(samples)
    first = for_evaluate(loaded, samples, rows, Template(""), settings)
    other = load(tiny.save_model(tmp_path / "other", seed=5), "cpu")
    assert for_evaluate(other, samples, rows, Template(""), settings) == first
    changed = {
        "prompt hash": for_evaluate(loaded, samples, rows, Template("A system."), settings),
        "decoding": for_evaluate(loaded, samples, rows, Template(""), settings.model_copy(update={"max_new_tokens": 5})),
        "dtype": for_evaluate(load(model_folder, "cpu", torch.bfloat16), samples, rows, Template(""), settings),
    }
    for name, fingerprint in changed.items():
        (line,) = differences(fingerprint, first)
        assert line.startswith(f"{name}: ")
    another = Samples(tiny.save_dataset(tmp_path / "data", images=3), "test")
    assert {line.split(":")[0] for line in differences(for_evaluate(loaded, another, [0], Template(""), settings), first)} == {
        "dataset hash",
        "prompt hash",
    }


@pytest.mark.parametrize("name", Fingerprint.model_fields)
def test_every_field_counts(name: str) -> None:
    value = {"temperature": 0.2} if name == "decoding" else "other"
    (line,) = differences(FIRST.model_copy(update={name: value}), FIRST)
    assert line.startswith(name.replace("_", " "))
    assert "other, not" in line or "temperature=0.2, not do_sample=False max_new_tokens=8" in line


def test_without_a_fingerprint_nothing_compares() -> None:
    assert differences(FIRST, FIRST) == []
    assert differences(None, FIRST) == differences(FIRST, None) == differences(None, None) != []


WORDS = st.lists(st.sampled_from(["", "a", "b", "ab"]), max_size=4)


@given(WORDS, WORDS)
def test_a_digest_tells_lists_of_texts_apart(left: list[str], right: list[str]) -> None:
    assert (digest(left) == digest(right)) == (left == right)
