"""The teacher's part of L_mcd (which samples, which tokens, what it says without them) and of L_va_kd; and training on it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from components.align_ti.batch import predicting
from components.config.load import load_settings
from components.dataset.shards import CAPTION, Samples
from components.distill.__main__ import distill
from components.distill.assemble import assemble
from components.distill.loader import Steps
from components.errors import DataError, Interrupted, SettingsError
from components.models.attribution import attributions
from components.models.checkpoint_folder import record
from components.models.load import load
from components.models.template import Template
from components.models.vlm import VLM
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, ROWS, SIGNALS, TEACHER
from components.records.teacher import TeacherChoice
from components.records.teacher_cache import SignalManifest
from components.teacher_cache import __main__ as stage
from components.teacher_cache import evidence as evidence_store
from components.teacher_cache import find_evidence
from components.teacher_cache.evidence import Evidence, collator, donor
from components.tracking.journal import Run
from tests import tiny
from tests.align_ti.test_terms import batch, edits
from tests.distill.conftest import write_params
from tests.distill.test_scale import StopsAt
from tests.models.conftest import NV
from tests.tried import rewrite

FOLDER = Path("artifacts/students/mcd")
ARM: dict[str, Any] = {"weights": {"sft": 1.0, "mcd": 1.0}, "student": "student", "seed": 1}
EVIDENCE = {"kinds": ["gradient", "random", "blurred"], "share": 0.3}


@pytest.fixture(scope="module")
def learnt(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workplace with a teacher that has learnt some of the answers."""
    root = tmp_path_factory.mktemp("learnt") / "workplace"
    shutil.copytree(prepared, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        torch.manual_seed(1)
        path = MODELS / "teachers/base"
        teacher, samples = load(path, "cpu"), Samples(DATASET, "train", ROWS)
        collate = collator(teacher.processor, Template(""), 64)
        examples = collate([samples[i] for i, kind in enumerate(samples.kinds) if kind != CAPTION][::2])
        optimiser = torch.optim.Adam(teacher.model.parameters(), lr=3e-3)
        vlm = VLM(teacher.model.train())
        for _ in range(40):
            hidden, _ = vlm.plain(examples, vlm.features(examples), keep=False)
            F.cross_entropy(vlm.head(hidden[predicting(examples.response)]), examples.input_ids[examples.response]).backward()
            optimiser.step()
            optimiser.zero_grad()
        teacher.model.save_pretrained(path)
        teacher_record = record(path, "teacher", "embedded", None, NV)
        students = ModelIndex.read(MODELS / "index.json").students
        ModelIndex(teachers={"base": teacher_record}, students=students).write(MODELS / "index.json")
        TeacherChoice(name="base", path=teacher_record.path, sha256=teacher_record.sha256).write(TEACHER / "choice.json")
        write_params(
            root,
            "distill",
            {"teacher_signals": {"source": "live", "kind": "top_k", "top_k": 4, "draws": 50, "evidence": EVIDENCE}},
        )
        write_params(root, "study", {"arms": {"mcd": ARM}})
        write_params(root, "evaluate", {"baselines": ["mcd"]})
    return root


@pytest.fixture
def mcd(learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own to work in."""
    root = tmp_path / "workplace"
    shutil.copytree(learnt, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("ALIGNTI_DEVICE", "cpu")
    return root


def trained(run: Run) -> bytes:
    settings = load_settings()
    distill("mcd", settings.arm("mcd"), settings, run)
    return (FOLDER / "model/model.safetensors").read_bytes()


def test_attributions_are_the_slopes_of_the_answers_log_probability() -> None:
    vlm, share = VLM(tiny.llava("qwen2", 1).double()).requires_grad_(False), 0.3
    b = batch([(1, 3, 3), (1, 5, 2)])
    other = edits(b, [(1, 3, 3), (1, 5, 2)], torch.float64).donor  # type: ignore[union-attr]
    others = vlm.embedded(other, vlm.features(other))

    def mean_log_probability(m: Tensor, row: int) -> Tensor:
        hidden = vlm.mixed(b, vlm.features(b), others, m)
        rows = b.response[row].nonzero()[:, 0]
        logits = vlm.head(hidden[row][rows - 1])
        return logits.log_softmax(-1).gather(1, b.input_ids[row, rows][:, None]).mean()

    shares = torch.full(b.input_ids.shape, share, dtype=torch.float64)
    attribution = attributions(vlm, b, vlm.features(b), others, shares)
    for row, token in [(0, 1), (0, 5), (1, 2), (1, 9)]:
        moved = torch.zeros_like(shares)
        moved[row, token] = 1e-3
        slope = (
            mean_log_probability(shares + moved, row) - mean_log_probability(shares - moved, row)
        ) / 2e-3  # RMSNorm is float32 inside
        assert float(attribution[row, token]) == pytest.approx(float(slope), rel=1e-2, abs=1e-5)
    assert attribution[0][b.attention_mask[0] == 0].abs().sum() == 0
    ends = (vlm.mixed(b, vlm.features(b), others, torch.full_like(shares, end)) for end in (1.0, 0.0))
    for mixed, alone in zip(ends, (b, other), strict=True):
        torch.testing.assert_close(mixed, vlm.plain(alone, vlm.features(alone), keep=False)[0])


def test_the_evidence_is_what_a_plain_reading_of_the_method_gives(mcd: Path) -> None:
    summary = stage.build_signals(load_settings()).evidence
    assert summary is not None and summary.asked == 12, "two samples of each of six images; two show a second one"
    teacher, samples = load(MODELS / "teachers/base", "cpu"), Samples(DATASET, "train", ROWS)
    collate, vlm = collator(teacher.processor, Template(""), 64), VLM(teacher.model)
    right = row = offset = 0
    for path in sorted(SIGNALS.glob("evidence-gradient-*")):
        tensors = load_file(path)
        right, row, offset = right + len(tensors["samples"]), 0, 0
        for line, effect in zip(tensors["samples"].tolist(), tensors["effects"].tolist(), strict=True):
            sample, partner, rows, places = line
            assert samples[sample].image_id != samples[partner].image_id
            b = collate([samples[sample]])
            other = donor(b, collate([samples[partner]]))
            prompt = collate.of_prompts([samples[sample]])
            written = teacher.model.generate(
                input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, max_new_tokens=rows, do_sample=False
            )[0, prompt.input_ids.shape[1] :]
            assert written.tolist() == b.input_ids[b.response].tolist(), "the teacher's own greedy answer"
            evidence = tensors["places"][offset : offset + places].tolist()
            candidates = int((b.instruction | b.visual).sum())
            assert 0 < places <= max(1, int(0.3 * candidates)) and bool((b.instruction | b.visual)[0, evidence].all())
            with torch.no_grad():
                e, o = (vlm.embedded(x, vlm.features(x))["inputs_embeds"][0] for x in (b, other))
                words = teacher.model.get_input_embeddings()(other.input_ids[0])
                torch.testing.assert_close(o[~b.visual[0]], words[~b.visual[0]])
                outputs = []
                for swapped in ([], [j for j in range(len(e)) if j not in evidence], evidence):
                    mixed = e.clone()
                    mixed[swapped] = o[swapped]
                    logits = teacher.model(inputs_embeds=mixed[None]).logits[0]
                    outputs.append(logits[predicting(b.response)[0]].softmax(-1))

            def js(p: Tensor, q: Tensor) -> Tensor:
                m = (p + q) / 2
                return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2

            whole, alone, without = outputs
            assert effect == pytest.approx(float((js(whole, without) - js(whole, alone)).mean()), abs=1e-5)
            for name, p in (("whole", whole), ("without", without)):
                stored, tokens = tensors[name][row : row + rows], tensors["tokens"][row : row + rows].long()
                torch.testing.assert_close(stored[:, :-1], p.gather(1, tokens), rtol=1e-3, atol=1e-5)
                assert stored.sum(1) == pytest.approx(1.0, abs=1e-4)
            row, offset = row + rows, offset + places
    assert 0 < summary.right["gradient"] == right < summary.asked


def test_the_edits_of_a_batch_are_drawn_by_halves_and_only_of_verified_samples(mcd: Path) -> None:
    stage.build_signals(load_settings())
    job = assemble("mcd", load_settings().arm("mcd"), load_settings())
    steps = Steps(job.samples, job.collator, job.order, job.distill, 0, 1, evidence=job.evidence)
    effects, (evidence,) = [], job.evidence
    assert isinstance(evidence, Evidence)
    table = {line[0]: effect for line, effect in zip(evidence._tensors["samples"], evidence._tensors["effects"], strict=True)}
    assert set(evidence._rows) <= {s for s, effect in table.items() if effect > 0} and 0 < len(evidence) <= len(table) / 2
    for step in range(12):
        ((b, _),) = steps[step]  # type: ignore[misc]
        edit = b.edits
        drawn = [sample for _, sample in job.order.batch(step)]
        assert edit is not None and edit.indices.tolist() == [i for i, s in enumerate(drawn) if s in evidence._rows]
        effects += edit.effect.tolist() if len(edit.indices) else []
        for row, index in enumerate(edit.indices.tolist()):
            assert edit.batch.ids[row] == b.ids[index]
            swapped = edit.keep[row] == 0
            share = int(swapped.sum()) / int((edit.batch.instruction | edit.batch.visual)[row].sum())
            assert (share <= 0.5) == bool(edit.effect[row])
        assert edit.whole.shape == (int(predicting(edit.batch.response).sum()), edit.tokens.shape[1] + 1)
    assert {True, False} == set(effects)


@pytest.mark.parametrize(
    ("effects", "share", "count"), [([0.3], 0.5, 1), ([0.1] * 5, 0.5, 2), ([0.1] * 100, 0.29, 29), ([-0.1] * 3, 0.5, 0)]
)
def test_a_share_of_the_samples_is_one_at_least_and_no_float_takes_one_away(
    effects: list[float], share: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = np.ones(len(effects), int)
    tensors = {"samples": np.stack([one.cumsum(), one, one, one], 1), "effects": np.array(effects, np.float32)}
    monkeypatch.setattr(evidence_store, "_read", lambda *_: tensors)
    kept: Any = SimpleNamespace(asked=len(effects), right={"gradient": len(effects)})
    none: Any = None
    with pytest.raises(DataError, match="none is left") if not count else nullcontext():
        assert len(Evidence(Path(), kept, "gradient", share, none, none)) == count


def test_edits_are_counted_among_the_samples_trained_on(mcd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage.build_signals(load_settings())
    write_params(mcd, "study", {"arms": {"mcd": ARM | {"mcd": {"verified": 0.01}}}})  # one of the split
    told = {}
    for rows in (None, 1):
        write_params(mcd, "distill", {"rows": rows})
        assert len(assemble("mcd", load_settings().arm("mcd"), load_settings()).evidence[0]) == 1  # type: ignore[arg-type]
        told[rows] = capsys.readouterr().out
    assert "L_mcd edits 1 of 16 samples\n" in told[None]
    assert "L_mcd edits 0 of 1 samples, and is 0 in every step; raise rows" in told[1]


def test_it_trains_and_resumes_to_the_same_bytes(mcd: Path) -> None:
    stage.build_signals(load_settings())
    expected = trained(Run(None))
    lines = [json.loads(line) for line in (FOLDER / "losses.jsonl").read_text().splitlines()]
    assert sum(line["mcd"] > 0 for line in lines) > 2
    shutil.rmtree(FOLDER)
    with pytest.raises(Interrupted):
        trained(StopsAt(3))
    assert trained(Run(None)) == expected
    (SIGNALS / "evidence-gradient-00000.safetensors").write_bytes(b"")
    shutil.rmtree(FOLDER)
    with pytest.raises(DataError, match="bytes are not those that the manifest names"):
        trained(Run(None))


def test_kept_image_dependence_gives_the_loss_and_gradient_of_one_more_pass(mcd: Path) -> None:
    live: dict[str, Any] = {"weights": {"va_kd": 1.0}, "student": "student", "seed": 1}
    write_params(mcd, "study", {"arms": {"live": live, "kept": live | {"va_kd": {"cached": True}}}})
    write_params(mcd, "evaluate", {"baselines": ["live"]})
    stage.build_signals(load_settings())
    results = []
    for name in ("live", "kept"):
        job = assemble(name, load_settings().arm(name), load_settings())
        assert bool(job.module.method.needs.views) == (name == "live")
        steps = Steps(job.samples, job.collator, job.order, job.distill, 0, 1, evidence=job.evidence)
        losses = [job.module(*micro).sums for step in range(4) for micro in steps[step]]  # type: ignore[union-attr]
        torch.stack(losses).sum().backward()
        results.append([torch.stack(losses).detach(), *(p.grad for p in job.module.parameters() if p.grad is not None)])
    assert float(results[0][0].abs().sum()) > 0
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_samples_that_check_rows_left_out_or_cut_are_those_of_training(mcd: Path) -> None:
    verdicts = np.load(ROWS / "train.npy")
    verdicts["turns"] = verdicts["turns"].clip(max=1)  # two have a second turn
    verdicts["turns"][[1, 10]] = 0
    rewrite("train", verdicts)
    signals = load_settings().distill.teacher_signals.model_dump()
    write_params(mcd, "distill", {"teacher_signals": signals | {"source": "cache"}})
    terms = {"sft": 1.0, "kd": 1.0, "mcd": 1.0, "va_kd": 1.0}
    write_params(mcd, "study", {"arms": {"mcd": ARM | {"weights": terms, "va_kd": {"cached": True}}}})
    found = stage.build_signals(load_settings())
    assert found.cache is not None and found.evidence is not None
    assert found.cache.samples == found.evidence.right["blurred"] == 14
    trained(Run(None))


def test_an_interrupted_search_goes_on_to_the_same_bytes(mcd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, write, calls = stage.build_signals(load_settings()), find_evidence._write, []
    shutil.rmtree(SIGNALS)

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(find_evidence, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.build_signals(load_settings())
    assert not SIGNALS.exists() and stage.build_signals(load_settings()) == expected and len(calls) == 7


def test_of_a_teacher_that_answers_nothing_right_an_arm_is_refused(mcd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_evidence.EvidencePass, "_right", lambda self, samples: [False] * len(samples))
    summary = stage.build_signals(load_settings()).evidence
    assert summary is not None and summary.right == {"gradient": 0, "random": 0, "blurred": 16}
    with pytest.raises(DataError, match="nothing to edit: of 12 samples the teacher answers 0 as the data do"):
        trained(Run(None))


def test_where_no_image_has_a_partner_that_is_said(mcd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_evidence, "_grid", lambda collate, sample: sample.image_id)
    stage.build_signals(load_settings())
    with pytest.raises(DataError, match=r"no sample has a partner, .*; raise images_per_shard"):
        trained(Run(None))


def test_without_the_block_there_is_none(mcd: Path) -> None:
    write_params(
        mcd, "distill", {"teacher_signals": {"source": "live", "kind": "top_k", "top_k": 4, "draws": 50, "evidence": None}}
    )
    with pytest.raises(SettingsError, match=r"arms.mcd.weights.mcd: the teacher's gradient evidence is not kept; give"):
        load_settings()
    write_params(mcd, "study", {"arms": {"mcd": ARM | {"weights": {"sft": 1.0}}}})
    stage.main()
    assert SignalManifest.read(SIGNALS / "manifest.json") == SignalManifest(cache=None)
