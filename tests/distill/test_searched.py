"""IVA by what the layer search picks: the search, both routes, the live teacher and the cache, its card and its logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from components.config.load import load_settings
from components.distill.__main__ import distill
from components.distill.teacher import FrozenTeacher
from components.errors import SettingsError
from components.irs import __main__ as search
from components.models.vlm import VLM
from components.records.irs import LayerChoice
from components.records.paths import IRS, SIGNALS, STUDENTS
from components.teacher_cache import __main__ as signals
from components.teacher_cache.store import facts, read_manifest
from components.tracking.journal import Run
from tests import tiny
from tests.distill.conftest import write_params
from tests.models.conftest import NV

SEARCHED = {"weighting": "searched", "layer": None}
CENTRED = {"rule": "given", "layer": 1, "weighting": "centred", "instruction_rows": "words"}


@pytest.fixture
def searched(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace after `search_layer`, asked for centred attention over the question's words."""
    for name, value in {"TRACKING_URI": "journal", "DEVICE": "cpu", "THREADS": "1"}.items():
        monkeypatch.setenv(f"ALIGNTI_{name}", value)
    write_params(workplace, "irs", {"images": 8, "instructions_per_image": 2, "overlays": 1, **CENTRED})
    write_params(workplace, "distill", {"iva": SEARCHED})
    search.main()
    return workplace


def losses(arm: str) -> list[dict[str, float]]:
    settings = load_settings()
    distill(arm, settings.arm(arm), settings, Run(None))
    return [json.loads(line) for line in (STUDENTS / arm / "losses.jsonl").read_text().splitlines()]


def test_the_pick_trains_on_both_routes_and_the_card_says_which(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picked = LayerChoice.read(IRS / "layer.json").picked
    assert (picked.rule, picked.layer, picked.weighting, picked.rows) == ("given", 1, "centred", "words")
    by_rule = losses("align_ti")
    card = (STUDENTS / "align_ti/model/README.md").read_text()
    assert "centred attention of the teacher's layer 1 over the question's words, as the rule `given`" in card
    assert '"searched": {' in card and '"background": "' in card
    write_params(searched, "distill", {"gradient_checkpointing": True})
    for checkpointed, plain in zip(losses("align_ti"), by_rule, strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-3)
    write_params(searched, "distill", {"iva": {"weighting": "irs", "layer": None}, "gradient_checkpointing": False})
    paper = losses("align_ti")
    assert paper[0]["iva"] != pytest.approx(by_rule[0]["iva"], rel=1e-3) and paper[0]["kd"] == pytest.approx(by_rule[0]["kd"])
    assert '"searched": {' not in (STUDENTS / "align_ti/model/README.md").read_text()


def test_how_many_tokens_the_weights_come_to_is_logged(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, float] = {}
    monkeypatch.setattr(Run, "metrics", lambda self, values, step=None: logged.update(values))
    losses("kd_uniform")
    concentration = {name: value for name, value in logged.items() if name.startswith("iva/")}
    assert concentration == pytest.approx({"iva/effective_tokens": NV, "iva/top5": 1.0})


def test_the_cache_gives_the_same_training_as_the_live_teacher(searched: Path) -> None:
    live = losses("kd_iva")
    weights = load_file(STUDENTS / "kd_iva/model/model.safetensors")
    write_params(
        searched,
        "distill",
        {"teacher_signals": {"source": "cache", "kind": "top_k", "top_k": 1000, "draws": 50, "evidence": None}},
    )
    signals.main()
    cache = read_manifest(SIGNALS, facts(load_settings()))
    assert (cache.facts.layer, cache.facts.rows) == (1, "words") and cache.facts.background and cache.equal_weights == 0
    for cached_line, live_line in zip(losses("kd_iva"), live, strict=True):
        assert cached_line == pytest.approx(live_line, rel=1e-3)
    start = load_file("artifacts/models/students/student/model.safetensors")
    for name, weight in load_file(STUDENTS / "kd_iva/model/model.safetensors").items():
        assert (weight - weights[name]).norm() <= 1e-3 * (weights[name] - start[name]).norm() + 1e-6, name
    study = json.loads(load_settings().study.model_dump_json())
    study["arms"]["kd_iva"]["iva"] = {"weighting": "irs", "layer": None}
    write_params(searched, "study", study)
    with pytest.raises(SettingsError, match=r"arms.kd_iva: iva differs from that of params/distill.yaml"):
        load_settings()


def test_the_rule_irs_searches_for_what_irs_says(searched: Path) -> None:
    """Training by `searched` under the paper's rule is training by `irs`, to the bit."""
    write_params(searched, "irs", {"rule": "irs", "layer": None, "weighting": "mean", "instruction_rows": "all"})
    search.main()
    expected = losses("kd_iva")
    weights = (STUDENTS / "kd_iva/model/model.safetensors").read_bytes()
    write_params(searched, "distill", {"iva": {"weighting": "irs", "layer": None}})
    assert losses("kd_iva") == expected
    assert (STUDENTS / "kd_iva/model/model.safetensors").read_bytes() == weights


def test_weights_by_gradient_are_what_each_token_adds_to_the_answer() -> None:
    """Slopes of the mean log-probability of the answer as one token's embedding leaves the mean of its image, cut off at 0."""
    vlm, h = VLM(tiny.llava("qwen2", 1).double()), 1e-3
    batch = tiny.batch([(1, 3, 3), (0, 2, 2), (1, 5, 2)], dtype=torch.float64)
    frozen = FrozenTeacher(vlm, 0, False, gradient=True)
    with torch.no_grad():
        *_, weights = frozen.plain(batch, frozen.features(batch, None), keep=False, with_attention=True)
        embeddings = vlm.embedded(batch, vlm.features(batch))["inputs_embeds"]
    assert weights is not None and weights.shape == (3, tiny.NV) and not weights[1].any() and bool((weights > 0).any())
    for sample in (0, 2):
        visual = batch.visual[sample].nonzero()[:, 0]
        answer = batch.response[sample].nonzero()[:, 0]
        mean = embeddings[sample, visual].mean(0)

        def log_prob(shift: float, token: int, sample: int = sample, answer: Tensor = answer, mean: Tensor = mean) -> float:
            moved = embeddings[sample].clone()
            moved[token] += shift * (moved[token] - mean)
            with torch.no_grad():
                log_probs = vlm.model(inputs_embeds=moved[None]).logits[0, answer - 1].log_softmax(-1)
            return float(log_probs.gather(1, batch.input_ids[sample, answer][:, None]).mean())

        for index, token in enumerate(visual.tolist()):
            slope = (log_prob(h, token) - log_prob(-h, token)) / (2 * h)
            assert float(weights[sample, index]) == pytest.approx(max(0.0, slope), rel=2e-2, abs=1e-4)
