"""The chain on a hub-style folder, as `family: pretrained` runs it: obtain, open, search the layer, train, export, answer."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from components.align_ti import terms
from components.align_ti.batch import Batch, Edits
from components.align_ti.step import AlignTI, Method, total
from components.align_ti.terms import CORE
from components.config.irs import IrsSettings
from components.config.models import Checkpoint
from components.dataset.shards import ImageRow, Samples, Turn
from components.distill.export import export
from components.distill.teacher import FrozenTeacher
from components.irs.search import measure
from components.models.download import obtain
from components.models.families import inputs, parts
from components.models.load import Loaded, check_pair, load
from components.models.template import Template
from components.models.vlm import VLM
from components.records.distill import Cost
from tests.families import toy
from tests.families.table import documented
from tests.models.conftest import write_dataset

TITLE = "chain"
IRS = IrsSettings(
    seed=0, images=3, instructions_per_image=2, batch_size=4, overlays=1,
    rule="irs", layer=None, weighting="mean", instruction_rows="all",
)  # fmt: skip
QUESTIONS = ("what digit is at a1 ?", "is b2 green ?")


def obtained(family: str, folder: Path, seed: int, layers: int) -> Loaded:
    source = Checkpoint(source=str(toy.folder(family, seed, layers)), revision=None)
    return load(obtain(source, folder), "cpu")


def dataset(folder: Path) -> Samples:
    """Three images of three shapes, two questions on each."""
    rows = []
    for i, size in enumerate([(40, 20), (16, 16), (20, 40)]):
        about = tuple((f"{i}-{j}", "digit_at", (Turn(f"<image>\n{q}", "red"),)) for j, q in enumerate(QUESTIONS))
        rows.append(ImageRow(f"image-{i}", toy.png(*size, i), about))
    return Samples(write_dataset(folder, rows), "train")


def trained(student: Loaded, teacher: Loaded, layer: int, route: str) -> list[float]:
    """The loss before and after three steps on one batch, all four terms."""
    pupil = VLM(student.model).train()
    eos = student.processor.tokenizer.eos_token_id
    method = Method(dict.fromkeys(CORE, 1.0), eos=eos, draws=2, route=route, shared_vocabulary=check_pair(teacher, student))
    module = AlignTI(pupil, FrozenTeacher(VLM(teacher.model), layer, shares_tower=False), method)
    batch = toy.collator(student.model.config.model_type)(toy.SAMPLES)
    optimiser = torch.optim.AdamW(pupil.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        terms = module(batch, [*range(len(toy.SAMPLES))])
        loss = total(terms.sums, terms.counts, torch.ones(4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert (terms.counts > 0).all() and (terms.sums > 0).all()
    return losses


def edited(batch: Batch) -> Batch:
    """With edits of all samples: half of an image's tokens those of the image in other colours."""
    assert batch.pixel_values is not None
    other, rows = replace(batch, pixel_values=-batch.pixel_values), int(batch.response.sum())
    keep = ~(batch.visual & (torch.arange(batch.visual.shape[1]) % 2 == 0))
    tokens = torch.arange(4).expand(rows, 4)
    places, effect = torch.arange(len(keep)), torch.arange(len(keep)) % 2 == 0
    whole, without = torch.linspace(0, 1, 10 * rows).view(2, rows, 5).softmax(-1)
    return replace(batch, edits=Edits(batch, other, keep.float(), places, effect, tokens, whole, without))


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_embeddings_that_are_mixed_give_either_end(family: str) -> None:
    vlm = VLM(load(toy.folder(family, 1, 3), "cpu").model)
    batch = edited(toy.collator(vlm.model.config.model_type)(toy.SAMPLES))
    assert batch.edits is not None
    other = batch.edits.donor
    with torch.no_grad():
        given = vlm.embedded(other, vlm.features(other))
        actual = [vlm.mixed(batch, vlm.features(batch), given, torch.full(batch.visual.shape, end)) for end in (1.0, 0.0)]
        expected = [vlm.plain(b, vlm.features(b), keep=False)[0] for b in (batch, other)]
    real = batch.attention_mask.bool()
    for hidden, alone in zip(actual, expected, strict=True):
        torch.testing.assert_close(hidden[real], alone[real], rtol=1e-4, atol=1e-5)
    assert (expected[0][real] - expected[1][real]).abs().max() > 1e-3


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_every_further_term_takes_a_step(family: str) -> None:
    teacher, student = load(toy.folder(family, 1, 3), "cpu"), load(toy.folder(family, 2, 2), "cpu")
    batch = edited(toy.collator(student.model.config.model_type)(toy.SAMPLES))
    weights = {name: 1.0 for name in terms.names() if name not in CORE}
    shared = check_pair(teacher, student)

    def step() -> None:
        module = AlignTI(
            VLM(student.model), FrozenTeacher(VLM(teacher.model), 1, False), Method(weights, shared_vocabulary=shared)
        )
        outputs = module(batch, [1, 2, 3])
        values = dict(zip(module.method.terms, outputs.sums.tolist(), strict=True))
        assert all(0 < values[name] < math.inf for name in weights), values
        outputs.sums.sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())

    if VLM(student.model).head.cap is not None:
        with pytest.raises(ValueError, match="no Gram matrix"):
            step()
        del weights["relation"]
    step()


def check(family: str) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, student = obtained(family, folder / "t", 1, 3), obtained(family, folder / "s", 2, 2)
        groups = parts(student.model)
        everything = {id(p) for p in student.model.parameters()}
        assert {id(p) for of in groups.values() for p in of} == everything and all(groups.values())
        layer = measure(teacher, dataset(folder / "data"), Template(""), IRS).layer
        losses = trained(student, teacher, layer, "continuation")
        assert losses[-1] < losses[0], losses
        student.model.eval()
        template = toy.collator(family).template
        export(folder / "out", student, template, "# card", [], Cost(train_seconds=0, peak_memory_mib=0, device="cpu", steps=4))
        again = AutoModelForImageTextToText.from_pretrained(folder / "out/model")
        assert type(again) is type(student.model)
        for key, weight in student.model.state_dict().items():
            assert torch.equal(weight, again.state_dict()[key]), key
        opened = load(folder / "out/model", "cpu")
        prompts = toy.Collator(opened.processor, Template(""), 400, train=False)(toy.SAMPLES)
        options = {
            "input_ids": prompts.input_ids,
            "attention_mask": prompts.attention_mask,
            "pixel_values": prompts.pixel_values,
            **inputs(opened.model, prompts),
        }
        written = [model.generate(**options, max_new_tokens=4, do_sample=False) for model in (student.model, opened.model)]
        assert torch.equal(*written) and written[0].shape[1] > prompts.input_ids.shape[1]
    return "yes"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_from_two_folders_to_a_student(family: str) -> None:
    assert check(family) == documented(family, TITLE)
