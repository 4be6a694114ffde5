"""Several images in one sample, over two turns: as the family's own processor writes them, each token its own image's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from components.align_ti.batch import Batch
from components.align_ti.step import AlignTI, Method
from components.align_ti.terms import CORE
from components.dataset.shards import IMAGE, Sample, Turn
from components.distill.teacher import FrozenTeacher
from components.models.attention import AttentionProbe, probing
from components.models.collate import Collator
from components.models.families import prompt
from components.models.image_processor import IMAGE_INPUTS, decode_images
from components.models.load import check_pair, load
from components.models.template import Template
from components.models.vlm import VLM
from tests.families import toy
from tests.families.table import documented
from tests.families.test_visual_tokens import entering

TITLE = "several images"
SEVERAL = toy.SAMPLES[3]


def check(family: str) -> str:
    processor, vlm = toy.loaded(family).processor, VLM(toy.loaded(family).model)
    styles: list[Literal["vicuna", "processor"]] = ["vicuna"] if processor.chat_template is None else ["vicuna", "processor"]
    for style in styles:
        collator = toy.collator(family, style=style)
        collated = collator([SEVERAL])
        text = collator.template.render(SEVERAL.turns, [processor.image_token] * 3).text
        options: dict[str, Any] = {"add_special_tokens": collator.template.wants_special_tokens}
        stock = processor(images=[decode_images(SEVERAL)], text=[text], return_tensors="pt", **options)
        if family != "paligemma":  # whose own puts all images before the text
            assert torch.equal(collated.input_ids, stock["input_ids"])
        assert torch.equal(collated.pixel_values.flatten(), stock["pixel_values"].flatten())
        for name in set(IMAGE_INPUTS) & set(stock):
            assert collated.image_inputs[name].tolist() == torch.as_tensor(stock[name]).tolist()
    batch = toy.alone(family, 3)
    other = toy.batch(family, [replace(SEVERAL, image_id="other", more=(SEVERAL.more[0], toy.png(40, 20, 9)))])
    first, second = (entering(vlm, each, vlm.features(each)) for each in (batch, other))
    changed, last_image = (first != second).any(-1), batch.pictures == 3
    # A row of LLaVA-NeXT's ends in a token that is the same in every image.
    assert not changed[~last_image].any() and changed[last_image].float().mean() > 0.6 and last_image.sum() > 1
    return "yes"


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_they_are_read_as_the_familys_own_processor_writes_them(family: str) -> None:
    assert check(family) == documented(family, TITLE)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_images_side_by_side_among_words_are_two(family: str) -> None:
    """Qwen's position ids go by runs of visual tokens, a run for each image."""
    sample = replace(SEVERAL, turns=(Turn(f"is {IMAGE}{IMAGE} red ?", "no"), Turn(f"and {IMAGE}", "red")))
    vlm, batch = VLM(toy.loaded(family).model), toy.batch(family, [sample])
    with torch.no_grad():
        hidden, _ = vlm.plain(batch, vlm.features(batch), keep=False)
        stock = vlm.model(**prompt(vlm.model, batch)).logits
    torch.testing.assert_close(vlm.head(hidden), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_prompt_of_an_image_is_what_a_server_of_the_exported_student_reads(family: str) -> None:
    """The saved chat template, and the family's own processor, which in PaliGemma's writes BOS and a newline."""
    processor, collator = load(toy.folder(family), "cpu").processor, toy.collator(family, train=False)
    saved = collator.template.jinja.replace(IMAGE, processor.image_token)
    (sample,) = (s for s in toy.SAMPLES if s.id == "small")
    content = [{"type": "image"}, {"type": "text", "text": "what digit ?"}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=saved, tokenize=False, add_generation_prompt=True
    )
    served = processor(images=[decode_images(sample)], text=[text], return_tensors="pt")
    assert torch.equal(collator([sample]).input_ids, served["input_ids"])
    processor.chat_template = saved
    again = Collator(processor, Template("", style="processor"), 400, train=True)
    for read, trained in zip(again.encode(toy.SAMPLES[:3]), toy.collator(family).encode(toy.SAMPLES[:3]), strict=True):
        assert read.input_ids.tolist() == trained.input_ids.tolist() and read.response.tolist() == trained.response.tolist()


def conversation(*counts: int) -> Sample:
    """Turns with so many images each."""
    turns = tuple(Turn(f"{IMAGE * count}what at a{turn} ?", f"red {turn}") for turn, count in enumerate(counts))
    images = [toy.png(*size, seed) for seed, size in enumerate([(40, 20), (16, 16), (20, 40), (32, 32)][: sum(counts)])]
    return Sample(f"{counts}", f"{counts}", "digit_at", images[0] if images else None, turns, tuple(images[1:]))


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("route", ["continuation", "expanded"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_all_terms_on_rows_of_none_to_four_images_equal_separate_forward_passes(family: str, route: str) -> None:
    """One stock pass for each alternative, in its token's place: what follows changes nothing before it."""
    pupil, master = (load(toy.folder(family, seed, layers), "cpu", torch.float64) for seed, layers in ((2, 2), (1, 3)))
    samples = [conversation(*counts) for counts in [(0,), (1,), (1, 1), (2, 1), (0, 2, 2)]]
    batch = toy.batch(family, samples)
    teacher = FrozenTeacher(VLM(master.model), 1, shares_tower=False)
    method = Method(dict.fromkeys(CORE, 1.0), draws=2, route=route)
    method = replace(method, eos=pupil.processor.tokenizer.eos_token_id, shared_vocabulary=check_pair(master, pupil))
    gold = batch.input_ids[:, 1:][batch.response[:, 1:]]
    draws = torch.stack([gold, torch.randint(40, 280, gold.shape, generator=torch.Generator().manual_seed(3))], dim=1)
    outputs = AlignTI(VLM(pupil.model), teacher, method)(batch, [*range(len(samples))], draws)

    terms: dict[str, list[Tensor]] = {name: [] for name in CORE}
    drawn = iter(draws.tolist())
    for sample in samples:
        single = toy.batch(family, [sample])

        def logits(model: Any, position: int | None = None, token: int = 0, single: Batch = single) -> Tensor:
            ids = single.input_ids.clone()
            if position is not None:
                ids[0, position] = token
            scores: Tensor = model(**{**prompt(model, single), "input_ids": ids}).logits[0]
            return scores[:, : method.shared_vocabulary]

        with torch.no_grad():
            student_logits, teacher_logits = logits(pupil.model), logits(master.model)
            for t in single.response[0].nonzero().flatten().tolist():
                terms["sft"].append(-student_logits[t - 1].log_softmax(-1)[single.input_ids[0, t]])
                terms["kd"].append(kl(teacher_logits[t - 1], student_logits[t - 1]))
                for token in next(drawn):
                    if token != method.eos:
                        terms["tpa"].append(kl(*(logits(model, t, token)[t] for model in (master.model, pupil.model))))
            look = AttentionProbe.from_masks(single.attention_mask.bool(), single.pictures, each_row=True)
            with probing(master.model, [1], look):
                teacher.vlm.plain(single, teacher.vlm.features(single), keep=False)
        columns = single.pictures[0][single.pictures[0] > 0]
        for number in range(1, len(sample.images) + 1):
            visual = (single.pictures[0] == number).nonzero().flatten()
            after = single.instruction[0] & (torch.arange(len(single.instruction[0])) > visual.max())
            attention = look.maps[1][0][after][:, columns == number].mean(0)
            terms["iva"].append((attention / attention.sum() * kl(teacher_logits[visual], student_logits[visual])).sum())
    assert outputs.counts.tolist() == [float(len(terms[name])) for name in CORE] and len(terms["iva"]) == 0 + 1 + 2 + 3 + 4
    expected = torch.stack([torch.stack(terms[name]).sum() for name in CORE])
    torch.testing.assert_close(outputs.sums, expected, rtol=1e-6, atol=1e-8)
