"""What a term may read beside logits: attention maps and hidden states with gradients, views, a module of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from components.align_ti import terms
from components.align_ti.step import AlignTI, Method
from components.align_ti.terms import Needs
from components.align_ti.watch import Map, Watch
from components.distill.ddp_module import Replica
from components.distill.teacher import FrozenTeacher
from components.errors import ModelError
from components.models.attention import AttentionProbe, probing, recomputing
from components.models.load import load
from components.models.vlm import VLM
from tests import tiny
from tests.align_ti.examples import EXAMPLES, MAPS, Attention, Hidden
from tests.families import toy
from tests.families.test_masks import eager_maps

SAMPLES = [(1, 3, 3), (0, 2, 2), (1, 5, 2)]
KEYS = [11, 12, 13]


def pair(dtype: torch.dtype = torch.float64) -> tuple[VLM, VLM]:
    return VLM(tiny.llava("qwen2", 1).to(dtype)), VLM(tiny.llava("qwen2", 2, hidden=48, layers=3).to(dtype))


def batch(samples: list[tuple[int, int, int]] = SAMPLES) -> Any:
    return tiny.batch(samples, dtype=torch.float64)


def step(student: VLM, teacher: VLM, *names: str, **options: Any) -> AlignTI:
    torch.manual_seed(0)
    weights = dict.fromkeys(names, 1.0)
    method = Method(weights, eos=tiny.EOS, shared_vocabulary=tiny.VOCABULARY, **options)
    return AlignTI(student, FrozenTeacher(teacher, 1, False), method).double()


def gradients(module: AlignTI, b: Any, keys: list[int] = KEYS) -> list[Tensor]:
    module.zero_grad()
    module(b, keys).sums.sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_gradient_by_finite_differences(name: str, route: str) -> None:
    """Beside L_tpa, whose ribbon must not enter what is read."""
    student, teacher = pair()
    module, b = step(student, teacher, name, "tpa", route=route), batch()
    module.progress = 0.5
    draws = module.draw(b, KEYS)
    index = list(module.method.terms).index(name)
    module.zero_grad()
    module(b, KEYS, draws).sums[index].backward()
    moved = [p for p in module.parameters() if p.grad is not None]
    stream = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=stream, dtype=p.dtype) * p.detach().abs().mean() for p in moved]
    slope = float(sum((p.grad * d).sum() for p, d in zip(moved, direction, strict=True)))

    def value(shift: float) -> float:
        with torch.no_grad():
            for p, d in zip(moved, direction, strict=True):
                p.add_(d, alpha=shift)
            loss = float(module(b, KEYS, draws).sums[index])
            for p, d in zip(moved, direction, strict=True):
                p.sub_(d, alpha=shift)
        return loss

    assert abs(slope) > 1e-3
    assert (value(1e-4) - value(-1e-4)) / 2e-4 == pytest.approx(slope, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_routes_read_the_same(name: str) -> None:
    student, teacher = pair()
    results = []
    for route in ("continuation", "expanded"):
        module = step(student, teacher, name, "tpa", route=route)
        module.progress = 0.5
        results.append(gradients(module, batch()))
    for continued, expanded in zip(*results, strict=True):
        torch.testing.assert_close(continued, expanded, rtol=1e-5, atol=1e-7)  # RMSNorm is float32 inside


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    """Twice, so that what a first pass left open would show in the second; and beside a view, whose pass is not read."""
    student, teacher = pair()
    module = step(student, teacher, name, "blind", "tpa", route="expanded")
    module.progress = 0.5
    student.train()
    plain = gradients(module, batch())
    student.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": partial(recomputing, student.model)})
    for _ in range(2):
        for got, expected in zip(gradients(module, batch()), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        gradients(module, batch([(1, 1, 1)]), [4])  # another shape in between


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_maps_of_grouped_heads_windows_and_capped_scores_have_gradients(family: str) -> None:
    """Against the stock model's own maps, plain and under gradient checkpointing; PaliGemma's Gemma 2 caps its scores."""
    eager = eager_maps(family)
    b = toy.batch(family)
    results = []
    for checkpointed in (False, True):
        model = load(toy.folder(family), "cpu", torch.float64).model
        vlm = VLM(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": partial(recomputing, model)})
            model.train()
        watch = Watch((Map(0), Map(1, "response"), Map(0, "visual", each_row=True)))
        with vlm.watched(b, watch) as watched:
            vlm.plain(b, vlm.features(b), keep=False)
        for map_, read in watched.maps.items():
            expected = eager[map_.layer][0].mean(0)[getattr(b, map_.rows)[0]][:, b.visual[0]]
            actual = read[0, : len(expected), : expected.shape[1]] if map_.each_row else read[0, : expected.shape[1]]
            torch.testing.assert_close(actual.double(), expected if map_.each_row else expected.mean(0), rtol=1e-5, atol=1e-7)
        sum(read.square().sum() for read in watched.maps.values()).backward()
        results.append([torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()])
    assert any(g.any() for g in results[0])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-9)


def test_looks_at_one_layer_stack() -> None:
    vlm, _ = pair()
    b = batch()
    alone, outer, inner = (AttentionProbe.from_masks(b.instruction, b.pictures) for _ in range(3))
    with torch.no_grad():
        with probing(vlm.model, [1], alone):
            vlm.plain(b, vlm.features(b), keep=False)
        with probing(vlm.model, [0, 1], outer):
            with probing(vlm.model, [1], inner):
                vlm.plain(b, vlm.features(b), keep=False)
            assert set(inner.maps) == {1} and set(outer.maps) == {0, 1}
        vlm.plain(b, vlm.features(b), keep=False)
    assert torch.equal(outer.maps[1], alone.maps[1]) and torch.equal(inner.maps[1], alone.maps[1])


def test_hidden_states_are_the_stock_models() -> None:
    vlm, _ = pair()
    b = batch()
    with vlm.watched(b, Watch(hidden=(0,))) as watched:
        vlm.plain(b, vlm.features(b), keep=False)
    stock = vlm.model(
        input_ids=b.input_ids, pixel_values=b.pixel_values, attention_mask=b.attention_mask, output_hidden_states=True
    )
    real = b.attention_mask.bool()
    torch.testing.assert_close(watched.hidden[0][real], stock.hidden_states[1][real])


def test_a_layer_that_is_not_there_is_named() -> None:
    vlm, _ = pair()
    with (
        pytest.raises(ModelError, match=r"layers \[2, 5\] of a model whose layers are 0..1"),
        vlm.watched(batch(), Watch((Map(2),), hidden=(5, 1))),
    ):
        pass


def test_a_terms_module_is_trained_and_is_no_part_of_the_student() -> None:
    student, teacher = pair()
    module = step(student, teacher, "hidden")
    (projection,) = module.term_modules.parameters()
    assert projection.shape == (48, 32)
    replica = Replica(module, ranks=2)
    for samples in (SAMPLES, [(0, 2, 2)]):
        replica.zero_grad()
        replica(batch(samples), KEYS[: len(samples)])[0].sum().backward()
        missing = [n for n, p in replica.named_parameters() if p.grad is None and "vision_tower" not in n]
        assert not missing, "a rank of several has a gradient for every parameter"
        assert bool(projection.grad.any()) == (samples is SAMPLES)
    assert not any("term_modules" in name for name in student.state_dict())
    assert any("term_modules" in name for name in module.state_dict())


def test_needs_add_up() -> None:
    both = terms.union([Attention.needs, Hidden.needs, *terms.needs_of(["sft", "iva"])])
    assert both.teacher and both.visual and both.attention and both.response and not both.ribbon and both.live_teacher
    assert both.in_student == Watch(MAPS, (0,)) and both.in_teacher == Watch(MAPS, (1,))
    for name in (name for name, default in vars(Needs()).items() if isinstance(default, bool)):
        without, needing = Needs(**{name: False}), Needs(**{name: True})
        assert getattr(without | needing, name) and getattr(needing | without, name) and not getattr(without | without, name)
