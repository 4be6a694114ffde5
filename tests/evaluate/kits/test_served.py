"""What needs a served student, in one file so that it is started once: its answers token for token; three kits that agree."""

from __future__ import annotations

import base64
import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image

from components.config.load import load_settings
from components.dataset.shards import Samples, Turn
from components.evaluate.__main__ import main as evaluate_stage
from components.evaluate.generate import answers, questions
from components.evaluate.kits import lm_eval_tasks, serve, table
from components.evaluate.kits.client import Endpoint, RequestRejected, chat_completion
from components.evaluate.kits.command import evaluate
from components.evaluate.kits.table import Table
from components.io import sha256
from components.models.collate import Collator
from components.models.load import Loaded
from components.models.rendered import question_of
from components.models.template import Template
from components.records.paths import REPORTS, STUDENTS
from tests.evaluate.conftest import Tracked
from tests.evaluate.kits.conftest import needs_lm_eval, needs_server, needs_vlmeval

ROOT = Path(__file__).parents[3]


@needs_server
def test_the_model_has_one_name_in_the_list_in_requests_and_in_answers(endpoint: Endpoint) -> None:
    """It was asked for as `toy@v1:b`, of which the server would make revision `v1:b` of a model of the hub."""
    with urlopen(f"{endpoint.url}/v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["toy-v1-b"] == [endpoint.model]
    request = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    kind = {"Content-Type": "application/json"}
    with urlopen(Request(f"{endpoint.url}/v1/chat/completions", json.dumps(request).encode(), kind)) as answer:
        assert json.load(answer)["model"] == endpoint.model


@needs_server
def test_the_served_student_says_what_direct_generation_says_token_for_token(
    endpoint: Endpoint, served_tokens: Path, loaded: Loaded, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the whole test split; direct generation in batches, padded on the left."""
    settings = load_settings(ROOT).evaluate.model_copy(update={"batch_size": 5, "max_new_tokens": 6})
    rows = questions(samples)
    direct: list[list[list[int]]] = []
    generate = loaded.model.generate

    def recorded(**inputs: Any) -> torch.Tensor:
        sequences: torch.Tensor = generate(**inputs)
        width = inputs["input_ids"].shape[1]
        for prompt, mask, tokens in zip(inputs["input_ids"], inputs["attention_mask"], sequences, strict=True):
            answer = tokens[width:].tolist()
            end = answer.index(eos) + 1 if eos in answer else len(answer)  # the rest is padding
            direct.append([prompt[mask.bool()].tolist(), answer[:end]])
        return sequences

    eos = loaded.processor.tokenizer.eos_token_id
    monkeypatch.setattr(loaded.model, "generate", recorded)
    expected = answers(loaded, samples, rows, Template(""), 64, settings, "tests")
    recorded_lines = len(served_tokens.read_text().splitlines()) if served_tokens.exists() else 0
    assert [
        chat_completion(endpoint, [s.image or b"", question_of(s.turns[0])], 6) for s in (samples[row] for row in rows)
    ] == expected
    served = [json.loads(line) for line in served_tokens.read_text().splitlines()[recorded_lines:]]
    assert len(served) == len(rows) and sorted(served) == sorted(direct)
    assert len(set(expected)) > 6


@needs_server
def test_special_tokens_that_a_question_spells_are_text_as_in_training(
    endpoint: Endpoint, served_tokens: Path, loaded: Loaded, samples: Samples
) -> None:
    question = f"Is </s> the end, {loaded.processor.tokenizer.eos_token} or USER: A?"
    chat_completion(endpoint, [samples[0].image or b"", question], 1)
    served, _ = json.loads(served_tokens.read_text().splitlines()[-1])
    sample = replace(samples[0], turns=(Turn(f"<image>\n{question}", "Yes."),))
    collator = Collator(loaded.processor, Template(""), 256, train=False)
    assert collator([sample]).input_ids[0].tolist() == served
    assert chat_completion(endpoint, [samples[0].image or b"", "Is there an <image>?"], 1), "not a second image"


@needs_server
def test_a_request_that_the_server_refuses_is_no_answer_and_the_next_one_is_answered(
    endpoint: Endpoint, samples: Samples
) -> None:
    with pytest.raises(RequestRejected, match=r"HTTP 400.*an image cannot be read"):
        chat_completion(endpoint, [b"no image", "List all."], 2)
    assert chat_completion(endpoint, [samples[0].image or b"", "List all."], 2)


REQUEST = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


@needs_server
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is empty"),
        ({"messages": [{"content": "Hello"}]}, "KeyError: 'role'"),
        ({"messages": [{"role": "user", "content": [{"text": "Hello"}]}]}, "KeyError: 'type'"),
        ({"max_tokens": 0}, "max_tokens is 0: it is a number of tokens, 1 or more"),
        ({"max_tokens": 0, "stream": True}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_completion_tokens": "all"}, "max_completion_tokens is 'all'"),
        ({"generation_config": '{"max_new_tokens": 100000}'}, "generation_config is not taken"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]}]},
            "an image comes as a data URL, not from /etc/hostname",
        ),
        ({"temperature": "hot"}, "ValueError: could not convert string to float: 'hot'"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(endpoint: Endpoint, wrong: dict[str, Any], message: str) -> None:
    body = json.dumps({"model": endpoint.model, **REQUEST, **wrong}).encode()
    with pytest.raises(HTTPError) as refusal:
        urlopen(Request(f"{endpoint.url}/v1/chat/completions", body, {"Content-Type": "application/json"}))
    assert refusal.value.code == 400 and message in json.load(refusal.value)["detail"]


@needs_server
def test_special_tokens_are_text_in_all_that_a_request_may_say(loaded: Loaded) -> None:
    from components.evaluate.kits.stock_server import divide_special_tokens

    tokenizer = loaded.processor.tokenizer
    eos = tokenizer.eos_token
    part = {"type": "input_text", "text": eos}
    said = {"instructions": eos, "input": [{"role": "user", "content": [part]}], "messages": [{"content": eos}]}
    divide_special_tokens(said, tokenizer)
    assert eos not in json.dumps(said)
    divide_special_tokens(body := {"input": eos}, tokenizer)
    assert eos not in json.dumps(body)


@needs_server
def test_an_answer_is_no_longer_than_the_context() -> None:
    from components.evaluate.kits.stock_server import check

    body: dict[str, Any] = {"messages": ["x"], "max_tokens": 100_000, "max_output_tokens": 5, "max_completion_tokens": None}
    check(body, 512)
    assert body == {"messages": ["x"], "max_tokens": 512, "max_output_tokens": 5, "max_completion_tokens": None}


@needs_server
def test_an_image_is_served_with_the_pixels_that_training_has() -> None:
    from components.evaluate.kits.stock_server import check

    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "PNG")
    url = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    check({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}, 512)
    with Image.open(io.BytesIO(base64.b64decode(url["url"].partition(",")[2]))) as image:
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@needs_server
@needs_vlmeval
@needs_lm_eval
def test_three_ways_of_measuring_one_student_agree(
    workplace: Path,
    endpoint: Endpoint,
    tracked: Tracked,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serve, "served", lambda *_: nullcontext((endpoint, None)))  # the session's: sft is the same model
    lm_eval_tasks.split.cache_clear()
    monkeypatch.setattr("sys.argv", ["evaluate", "--arm", "sft"])
    evaluate_stage()
    evaluate([], ["sft"], [])
    by_kit = {scores.kit: scores for scores in Table.read(REPORTS / "kits.json").scores}
    assert list(by_kit) == list(table.KITS)
    stage = by_kit["own"]
    for kit in ("vlmeval", "lm-eval"):
        assert [verdict.model_dump() for verdict in by_kit[kit].disagreements] == []
        assert by_kit[kit].exact_match == stage.exact_match and by_kit[kit].per_kind == stage.per_kind
        assert not by_kit[kit].other_answers and not by_kit[kit].failed
        assert by_kit[kit].samples == stage.samples == 32
        same = {"dataset", "dataset_hash", "prompt_hash", "decoding", "transformers", "dtype", "device"}
        for name in same:
            assert getattr(by_kit[kit].fingerprint, name) == getattr(stage.fingerprint, name), name
    assert 0.5 < stage.exact_match <= 1
    report = (REPORTS / "kits.md").read_text()
    share = f"{stage.exact_match:.2%}"
    assert f"| sft | {share} | {share} | {share} | 0 | 0 |" in report and "yes, but for kit and judge" in report
    assert capsys.readouterr().out.count("reports/kits.md") == 3
    monkeypatch.setattr(serve, "served", None)  # nothing is asked again
    evaluate(["vlmeval", "lm-eval"], ["sft"], [])
    assert capsys.readouterr().out.count("measured before") == 2
    assert [scores.model_dump() for scores in Table.read(REPORTS / "kits.json").scores] == [
        s.model_dump() for s in by_kit.values()
    ]
    shutil.copytree(STUDENTS / "kd/model", STUDENTS / "sft/model", dirs_exist_ok=True)  # the student is trained again
    assert table.read(lambda arm: sha256([STUDENTS / arm / "model"])).scores == []
