"""The stage `cache_teacher`, and `distill` from what it kept: the same training, no teacher; what does not match is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.align_ti.batch import predicting
from components.align_ti.sampled import Sampled
from components.align_ti.top_k import TopK, top_k
from components.align_ti.visual_weights import visual_weights
from components.config.load import load_settings
from components.dataset.shards import CAPTION, Samples, Turn
from components.distill import __main__ as stage
from components.distill.teacher import FrozenTeacher
from components.errors import DataError, ModelError, SettingsError, TryAgainError
from components.models.collate import Collator
from components.models.load import load
from components.models.template import Template
from components.models.vlm import VLM
from components.process import locked
from components.records.paths import DATASET, ROWS, RUNS, SIGNALS, STUDENTS
from components.records.teacher_cache import SignalCache, SignalFacts, SignalManifest
from components.teacher_cache import __main__ as signals_stage
from components.teacher_cache import store
from components.teacher_cache.build import Shard, TeacherPass
from components.teacher_cache.store import ATTENTION, VISUAL, VISUAL_ROWS, Signals, facts, packed, read_manifest
from components.tracking.journal import Run
from tests.distill.conftest import write_params
from tests.families import toy
from tests.models.conftest import NV

TEACHER = Path("artifacts/models/teachers/base")
ALL_TOKENS = 1000  # more than there are


def configure(
    root: Path, source: str = "cache", top_k: int = ALL_TOKENS, kind: str = "top_k", draws: int = 50, **others: Any
) -> None:
    teacher_signals = {"source": source, "kind": kind, "top_k": top_k, "draws": draws, "evidence": None}
    write_params(root, "distill", {"teacher_signals": teacher_signals, **others})


def distill(arm: str) -> dict[str, torch.Tensor]:
    settings = load_settings()
    stage.distill(arm, settings.arm(arm), settings, Run(None))
    return load_file(STUDENTS / arm / "model/model.safetensors")


def without_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("components.distill.assemble.load_teacher", refuse)


def build_cache() -> SignalCache:
    cache = signals_stage.build_signals(load_settings()).cache
    assert cache is not None
    return cache


def opened() -> Signals:
    return Signals(SIGNALS, read_manifest(SIGNALS, facts(load_settings())).shards)


def test_where_the_live_teacher_is_asked_for_only_a_note_is_left(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SIGNALS.mkdir()
    (SIGNALS / "shard-00000.safetensors").write_text("of an earlier run")
    signals_stage.main()
    assert json.loads((SIGNALS / "manifest.json").read_text()) == {"cache": None}
    assert [path.name for path in SIGNALS.iterdir()] == ["manifest.json"]
    assert "source is live" in capsys.readouterr().out
    configure(workplace)
    with pytest.raises(DataError, match=r"holds no signals.*`dvc repro cache_teacher` makes it anew"):
        distill("kd")


def test_with_all_tokens_kept_training_is_the_same_and_needs_no_teacher(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ("sft", "kd", "kd_uniform", "kd_iva")
    live = {arm: distill(arm) for arm in arms}
    losses = {arm: (STUDENTS / arm / "losses.jsonl").read_text() for arm in arms}
    start = load_file("artifacts/models/students/student/model.safetensors")
    configure(workplace)
    signals_stage.main()
    assert "error of KL(teacher || student): text" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        without_a_teacher(patch)
        for arm in arms:
            weights = distill(arm)
            for name, weight in live[arm].items():
                moved = (weight - start[name]).norm()
                assert (weights[name] - weight).norm() <= 1e-3 * moved + 1e-6, (arm, name)
            for cached_line, live_line in zip(
                (STUDENTS / arm / "losses.jsonl").read_text().splitlines(), losses[arm].splitlines(), strict=True
            ):
                assert json.loads(cached_line) == pytest.approx(json.loads(live_line), rel=1e-3), arm
            assert (arm == "sft") == (
                weights.keys() == live[arm].keys() and all(torch.equal(weights[n], live[arm][n]) for n in weights)
            )
        assert "top_k" in (STUDENTS / "kd/model/README.md").read_text()
        with pytest.raises(AssertionError, match="the teacher was loaded"):
            distill("kd_tpa")
    assert "this arm runs the live teacher for all its terms" in capsys.readouterr().out


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -3)])
def test_what_is_read_back_is_the_teachers_word_in_any_company(workplace: Path, order: slice) -> None:
    configure(workplace)
    cache = build_cache()
    teacher = load(TEACHER, "cpu")
    samples = Samples(DATASET, "train")
    chosen = [samples[i] for i, kind in enumerate(samples.kinds) if kind != CAPTION][order]
    text = sum(len(row) for row in _text_rows(teacher, samples))
    visual = 6 * NV + 4 * 2 * NV  # once per image, but where an answer stands before the second
    assert (cache.samples, cache.rows, cache.dtype) == (16, text + visual, "float32")
    batch = Collator(teacher.processor, Template(""), 64, train=True)(chosen)
    cached, attention = opened().look_up(batch, visual=True, with_attention=True)
    frozen = FrozenTeacher(VLM(teacher.model), 1, False)
    with torch.no_grad():
        hidden, _, look = frozen.plain(batch, frozen.features(batch, None), keep=False, with_attention=True)
        for rows in (predicting(batch.response), batch.visual):
            expected, got = top_k(frozen.head(hidden[rows]), ALL_TOKENS), cached.at(rows)
            assert isinstance(got, TopK)
            back = torch.zeros_like(expected.log_probs).scatter(1, expected.tokens, expected.log_probs)
            torch.testing.assert_close(back.gather(1, got.tokens), got.log_probs, rtol=1e-4, atol=1e-5)
    assert look is not None and attention is not None
    torch.testing.assert_close(visual_weights(attention, batch.pictures), visual_weights(look, batch.pictures))
    none, nothing = opened().look_up(batch, visual=False, with_attention=False)
    assert len(none.rows) == int(predicting(batch.response).sum()) and nothing is None


def _text_rows(teacher: Any, samples: Samples) -> list[list[int]]:
    collator = Collator(teacher.processor, Template(""), 64, train=True)
    chosen = [samples[i] for i, kind in enumerate(samples.kinds) if kind != CAPTION]
    return [row.response.nonzero()[0].tolist() for row in collator.encode(chosen)]


def test_the_error_of_cutting_is_reported_and_falls_with_k(workplace: Path) -> None:
    caches = {}
    for k in (2, 8, ALL_TOKENS):
        configure(workplace, top_k=k)
        caches[k] = build_cache()
        assert sum(path.stat().st_size for path in SIGNALS.glob("*.safetensors")) == caches[k].size_bytes
    for kind in ("text", "visual"):
        few, more, every = (caches[k].errors[kind] for k in (2, 8, ALL_TOKENS))
        assert few.mean_error > more.mean_error > 10 * every.mean_error and every.max_error < 1e-5
        assert few.mean_mass_beyond > more.mean_mass_beyond > every.mean_mass_beyond == 0
        assert few.kl == pytest.approx(every.kl) and few.max_error <= few.kl * few.rows
    assert (caches[8].dtype, caches[ALL_TOKENS].dtype) == ("float16", "float32")
    assert caches[8].size_bytes < caches[ALL_TOKENS].size_bytes / 2


def test_draws_are_unbiased_take_less_room_and_serve_drawn_rows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    caches = {}
    for draws in (2, 255):
        configure(workplace, kind="sampled", draws=draws)
        caches[draws] = signals_stage.build_signals(load_settings()).cache
    few, many = caches[2], caches[255]
    assert few is not None and many is not None
    assert few.size_bytes < many.size_bytes and many.rows == few.rows and many.dtype == "float16"
    for kind in ("text", "visual"):
        assert many.errors[kind].mean_error < few.errors[kind].mean_error and many.errors[kind].mean_mass_beyond == 0
        assert abs(many.errors[kind].bias) < 0.02 * many.errors[kind].kl
    teacher, samples = load(TEACHER, "cpu"), Samples(DATASET, "train")
    batch = Collator(teacher.processor, Template(""), 64, train=True)(
        [samples[i] for i, kind in enumerate(samples.kinds) if kind != CAPTION][::-5]
    )
    signals, _ = opened().look_up(batch, visual=True, with_attention=False)
    vlm = VLM(teacher.model)
    with torch.no_grad():
        p = vlm.head(vlm.plain(batch, vlm.features(batch), keep=False)[0]).softmax(-1)
    for rows in (predicting(batch.response), batch.visual):
        word = signals.at(rows)
        assert isinstance(word, Sampled) and (word.counts.sum(1) == 255).all()
        assert ((word.counts / 255 - p[rows].gather(1, word.tokens)).abs() < 1.01 / 255)[word.counts > 0].all()
        torch.testing.assert_close(word.entropy, torch.special.entr(p[rows]).sum(1), rtol=1e-3, atol=1e-3)
    shared = load_settings().distill.iva.model_dump()
    losses = {}
    for source in ("live", "cache"):
        configure(workplace, source, kind="sampled", draws=255, iva=shared | {"rows": 2})
        signals_stage.main()
        distill("kd_iva")
        losses[source] = [json.loads(line) for line in (STUDENTS / "kd_iva/losses.jsonl").read_text().splitlines()]
    assert "255 draws of" in (output := capsys.readouterr().out) and "bias" in output
    for live, cached in zip(losses["live"], losses["cache"], strict=True):
        assert cached["total"] == pytest.approx(live["total"], abs=2e-3) and cached["iva"] != live["iva"]


def test_a_cache_of_anything_else_is_refused_by_name(workplace: Path) -> None:
    configure(workplace, top_k=4)
    signals_stage.build_signals(load_settings())
    manifest = SignalManifest.read(SIGNALS / "manifest.json")
    assert manifest.cache is not None
    other = {"students": {"another": "0"}, "precision": "bf16", "layer": 0, "rows": "words", "temperature": 2.0, "top_k": 5}
    other |= {"evidence": {"share": 0.1}}
    other |= {"kind": "sampled", "draws": 7}
    for name in SignalFacts.model_fields:
        changed = manifest.cache.facts.model_copy(update={name: other.get(name, "0")})
        SignalManifest(cache=manifest.cache.model_copy(update={"facts": changed})).write(SIGNALS / "manifest.json")
        with pytest.raises(DataError, match=rf"settings: {name} is .* there, .* here; `dvc repro cache_teacher`"):
            distill("kd")
    manifest.write(SIGNALS / "manifest.json")
    configure(workplace, top_k=6)
    with pytest.raises(DataError, match="top_k is 4 there, 6 here"):
        distill("kd")


def test_a_damaged_shard_and_an_unknown_sample_are_refused(workplace: Path) -> None:
    configure(workplace, top_k=4)
    signals_stage.build_signals(load_settings())
    samples = Samples(DATASET, "train")
    collator = Collator(load(TEACHER, "cpu").processor, Template(""), 64, train=True)
    sample = next(samples[i] for i, kind in enumerate(samples.kinds) if kind != CAPTION)
    batch = collator([sample, samples[samples.kinds.index(CAPTION)]])
    with pytest.raises(DataError, match=f"sample {batch.ids[1]}: the teacher's signals do not have it"):
        opened().look_up(batch, visual=True, with_attention=True)
    batch = collator([sample])
    batch.input_ids[0, -2] += 1
    with pytest.raises(DataError, match=f"sample {sample.id}: .* with these tokens"):
        opened().look_up(batch, visual=True, with_attention=True)

    shard = SIGNALS / "shard-00001.safetensors"
    original = shard.read_bytes()
    for content in (original[:-7], original[:-1] + bytes([original[-1] ^ 1])):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"shard-00001.safetensors: its bytes are not those"):
            opened()
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.safetensors.*`dvc repro cache_teacher`"):
        opened()


def test_an_interrupted_build_goes_on_with_the_shard_that_it_was_at(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(workplace, top_k=4)
    expected = signals_stage.build_signals(load_settings())
    shutil.rmtree(SIGNALS)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writes: list[str] = []

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        writes.append(path.name)
        full_disk() if len(writes) == 2 else save_file(tensors, path)

    monkeypatch.setattr(store, "save_file", write)
    with pytest.raises(OSError, match="No space left"):
        signals_stage.build_signals(load_settings())
    assert not SIGNALS.exists()
    (draft,) = (path for path in (RUNS / "signals").iterdir() if path.is_dir())
    assert [path.name for path in draft.iterdir()] == ["shard-00000.safetensors"]
    with locked(Path(f"{draft}.lock"), "the test"), pytest.raises(TryAgainError, match="another process is making"):
        signals_stage.build_signals(load_settings())
    assert signals_stage.build_signals(load_settings()) == expected  # the shards' sha256 among it
    assert writes == [f".shard-{n:05d}.safetensors.tmp" for n in (0, 1, 1)]


def test_an_interrupted_build_of_other_batches_is_not_gone_on_from(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(workplace, kind="sampled", micro_batch_size=1)
    expected = signals_stage.build_signals(load_settings())
    shutil.rmtree(SIGNALS)
    configure(workplace, kind="sampled", micro_batch_size=4)  # whose draws are others
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("components.teacher_cache.approximation.measure", interrupt)
        signals_stage.build_signals(load_settings())
    configure(workplace, kind="sampled", micro_batch_size=1)
    assert signals_stage.build_signals(load_settings()) == expected  # the shards' sha256 among it


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_what_no_cache_serves_is_refused_before_any_work(workplace: Path) -> None:
    configure(workplace, divergence={"kind": "forward", "mix": 0.5, "temperature": 1.0})
    study = json.loads(load_settings().study.model_dump_json())
    arms = study["arms"]
    arms["kd"]["divergence"] = {"kind": "reverse", "mix": 0.5, "temperature": 2.0}
    arms["kd_iva"]["iva"] = {"weighting": "layer", "layer": 0}
    for arm in ("sft", "align_ti"):  # one has no use for the cache, the other runs the live teacher
        arms[arm]["divergence"] = arms["kd"]["divergence"]
    write_params(workplace, "study", study)
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    assert str(refusal.value).count("or set teacher_signals.source to live") == 3
    for message in (
        "arms.kd: divergence.kind is reverse",
        "arms.kd: divergence.temperature differs",
        "arms.kd_iva: iva differs",
    ):
        assert message in str(refusal.value)
    configure(workplace, source="live")
    load_settings()
    study["arms"] = {"kd": {**arms["kd"], "divergence": None}}
    write_params(workplace, "study", study)
    write_params(workplace, "evaluate", {"baselines": ["kd"]})
    configure(workplace, iva={"weighting": "layer", "layer": 2})
    with pytest.raises(ModelError, match=r"iva.layer is 2, but teacher .* has layers 0..1"):
        signals_stage.build_signals(load_settings())


def test_a_sample_is_weighed_by_another_ones_attention(workplace: Path) -> None:
    arm = {"weights": {"sft": 1.0, "iva": 1.0}, "student": "student", "seed": 1}
    iva = load_settings().distill.iva.model_dump() | {"change": "other_image"}
    write_params(workplace, "study", {"arms": {"own": arm, "other": arm | {"iva": iva}}})
    write_params(workplace, "evaluate", {"baselines": ["own"]})
    with pytest.raises(SettingsError, match=r"arms\.other: iva\.change is other_image, and only the cache has other samples'"):
        load_settings()
    configure(workplace)
    signals_stage.main()
    samples = [sample for sample in Samples(DATASET, "train", ROWS) if sample.kind != CAPTION]
    rows = [i // 2 for i in range(16)]  # two samples on each, the last two of two images
    student = load(Path("artifacts/models/students/student"), "cpu")
    batch = Collator(student.processor, Template(""), 64, train=True)(samples)
    attention = opened().look_up(batch, visual=True, with_attention=True)[1]
    assert attention is not None and len(attention.unique(dim=0)) == len(samples)
    for change, expected in {
        "other_instruction": attention.unflatten(0, (-1, 2)).flip(1).flatten(0, 1),
        "other_image": torch.cat([attention[:12].roll(-2, 0), attention[12:].roll(-2, 0)]),
    }.items():
        signals = opened()
        signals.substitute_attention(change, rows)
        substituted = signals.look_up(batch, visual=True, with_attention=True)[1]
        assert substituted is not None and torch.equal(substituted, expected)
    own_weights, other_weights = distill("own"), distill("other")
    assert any(not torch.equal(own_weights[name], other_weights[name]) for name in own_weights)


def test_a_sample_of_one_visual_token_is_no_part_of_the_one_before_it() -> None:
    signals = Signals.__new__(Signals)
    table = torch.zeros(4, 6, dtype=torch.int64)
    table[:, VISUAL_ROWS], table[:, ATTENTION] = torch.tensor([2, 1, 0, 2]), torch.tensor([0, 2, 3, 3])
    signals._shards = [{"samples": table, "attention": torch.tensor([0.5, 0.5, 1.0, 0.25, 0.75])}]
    assert signals.equal_weights == 1  # the first


@pytest.mark.parametrize(("family", "blocks"), [("llava_onevision", 1), ("gemma3", 1), ("paligemma", 2)])
def test_questions_share_an_images_rows_where_these_do_not_see_them(family: str, blocks: int) -> None:
    """PaliGemma's image tokens attend to the whole prompt, so those of each question are its own."""
    first = toy.sample("wide", "red one", (40, 20))
    samples = [first, replace(first, id="other", turns=(Turn("<image>\nlist the grid .", "no"),))]
    teacher = load(toy.folder(family), "cpu")
    asked = SignalFacts.model_construct(layer=1, precision="fp32", kind="top_k", top_k=ALL_TOKENS, temperature=1.0)
    collate = Collator(teacher.processor, Template(""), 400, train=True)
    teacher_pass = TeacherPass(VLM(teacher.model), collate, asked, teacher.vocabulary, 40.0, None)
    shard = Shard()
    shard.add(teacher_pass, samples)
    assert len({row[VISUAL] for row in shard.samples}) == blocks
    stored = packed(shard.distributions)["log_probs"]
    for sample, row in zip(samples, shard.samples, strict=True):
        batch, hidden, _ = teacher_pass.forward([sample])
        (own,) = teacher_pass.encode(hidden[batch.visual], torch.zeros(row[VISUAL_ROWS]))
        assert isinstance(own, TopK)
        assert torch.allclose(stored[row[VISUAL] :][: len(own)], own.log_probs, atol=1e-4), sample.id


def test_a_student_with_another_chat_template_is_refused_before_any_work(workplace: Path) -> None:
    """Its tokens are not those that the signals would be kept under, nor its positions those of the evidence."""
    template = Path("artifacts/models/students/student/chat_template.jinja")
    template.write_text(template.read_text().replace("USER:", "describe"))
    write_params(workplace, "models", {"template": {"style": "processor", "system": ""}})
    configure(workplace)
    with pytest.raises(ModelError, match="chat templates write one conversation differently"):
        signals_stage.build_signals(load_settings())
