"""The whole step against a reference written plainly: one separate forward pass per alternative, full logits, float64."""

from __future__ import annotations

import pytest
import torch

from components.align_ti.batch import predicting
from components.align_ti.ribbon import continuation_mask, expanded_mask, left_out, plan
from components.align_ti.step import AlignTI, Method, total
from components.align_ti.terms import CORE
from components.distill.teacher import FrozenTeacher
from components.models.attention import AttentionProbe, probing
from components.models.vlm import VLM
from tests import tiny

SAMPLES = [(1, 3, 3), (0, 2, 2), (1, 5, 2), (1, 1, 1)]
KEYS = [11, 12, 13, 14]
ALL = dict.fromkeys(CORE, 1.0)
FAMILIES = ["qwen2", "qwen3", "llama"]


def pair(family: str, dtype: torch.dtype = torch.float64) -> tuple[VLM, VLM]:
    return VLM(tiny.llava(family, 1).to(dtype)), VLM(tiny.llava(family, 2, hidden=48, layers=3).to(dtype))


def batch(dtype: torch.dtype = torch.float64, samples: list[tuple[int, int, int]] = SAMPLES):
    return tiny.batch(samples, dtype=dtype)


def step(student: VLM, teacher: VLM, shared: bool = False, **options) -> AlignTI:
    options = {"weights": ALL, "eos": tiny.EOS, "shared_vocabulary": tiny.VOCABULARY, **options}
    return AlignTI(student, FrozenTeacher(teacher, 1, shared), Method(**options))


def gradients(student: VLM, loss: torch.Tensor) -> list[torch.Tensor]:
    student.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in student.parameters() if p.grad is not None]


def stock_logits(vlm: VLM, input_ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
    return vlm.model(input_ids=input_ids, pixel_values=pixels).logits


def reference(student: VLM, teacher: VLM, b, draws: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(4,) means: docs/method.md read out sample by sample through the stock forward, one pass per drawn alternative."""

    def kl(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
        p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
        return (p * (p / q).log()).sum(-1)

    terms: list[list[torch.Tensor]] = [[], [], [], []]
    images = iter([] if b.pixel_values is None else b.pixel_values)
    rows, spread = iter(draws.tolist()), iter(weights.tolist())
    for i in range(len(b.input_ids)):
        length = int(b.attention_mask[i].sum())
        ids = b.input_ids[i : i + 1, :length]
        pixels = next(images)[None] if b.visual[i].any() else None
        student_logits = stock_logits(student, ids, pixels)[0]
        with torch.no_grad():
            teacher_logits = stock_logits(teacher, ids, pixels)[0]
        for t in b.response[i].nonzero().flatten().tolist():
            terms[0].append(-student_logits[t - 1].log_softmax(-1)[ids[0, t]])
            terms[1].append(kl(teacher_logits[t - 1], student_logits[t - 1]))
            for token in next(rows):
                if token == tiny.EOS:
                    continue
                changed = torch.cat([ids[:, :t], torch.tensor([[token]])], dim=1)
                student_after = stock_logits(student, changed, pixels)[0, -1]
                with torch.no_grad():
                    teacher_after = stock_logits(teacher, changed, pixels)[0, -1]
                terms[3].append(kl(teacher_after, student_after))
        if pixels is not None:
            terms[2].append(
                sum(next(spread) * kl(teacher_logits[t], student_logits[t]) for t in b.visual[i].nonzero().flatten().tolist())
            )
    return torch.stack([torch.stack(term).mean() for term in terms])


def fixed_draws(b) -> torch.Tensor:
    """Repeats, gold hits and EOS at every step; never the image token, which the stock forward would look for pixels for."""
    gold = b.input_ids[:, 1:][b.response[:, 1:]]
    other = torch.randint(5, tiny.VOCABULARY, (len(gold),), generator=torch.Generator().manual_seed(3))
    return torch.stack(
        [other, gold, other, torch.where(torch.arange(len(gold)) % 2 == 0, tiny.EOS, other + 1 - (other == 39).long() * 3)],
        dim=1,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_step_equals_separate_forward_passes(family: str, route: str) -> None:
    student, teacher = pair(family)
    b = batch()
    draws = fixed_draws(b)
    probe = AttentionProbe.from_masks(b.instruction, b.pictures)
    with torch.no_grad(), probing(teacher.model, [1], probe):
        teacher.plain(b, teacher.features(b), keep=False)
    attention = probe.maps[1]
    spread = torch.cat([row / row.sum() for row in attention if row.sum() > 0])

    terms = step(student, teacher, route=route)(b, KEYS, draws)
    means = reference(student, teacher, b, draws, spread)
    torch.testing.assert_close(terms.sums / terms.counts, means, rtol=1e-9, atol=1e-11)

    weights = torch.tensor([1.0, 0.7, 1.3, 0.9], dtype=torch.float64)
    step_gradients = gradients(student, total(terms.sums, terms.counts, weights))
    reference_gradients = gradients(student, (weights * means).sum())
    for got, expected in zip(step_gradients, reference_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)  # RMSNorm is float32 inside


@pytest.mark.parametrize("family", FAMILIES)
def test_ribbon_rows_equal_separate_passes_and_gold_rows_are_untouched(family: str) -> None:
    vlm, _ = pair(family)
    b = batch()
    ribbon = plan(fixed_draws(b), b.input_ids, b.response, tiny.EOS)
    features = vlm.features(b)
    with torch.no_grad():
        plain, cache = vlm.plain(b, features, keep=True)
        continued = vlm.continued(cache, ribbon.tokens, ribbon.positions, continuation_mask(ribbon, b.attention_mask))
        expanded = vlm.expanded(b, features, ribbon.tokens, ribbon.positions, expanded_mask(ribbon, b.attention_mask))
        T = b.input_ids.shape[1]
        real = b.attention_mask.bool()
        torch.testing.assert_close(expanded[:, :T][real], plain[real], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(expanded[:, T:][ribbon.valid], continued[ribbon.valid], rtol=1e-10, atol=1e-12)
        images = (b.visual.any(1).cumsum(0) - 1).tolist()
        for i, e in ribbon.valid.nonzero().tolist():
            position = int(ribbon.positions[i, e])
            ids = torch.cat([b.input_ids[i : i + 1, :position], ribbon.tokens[i, e].view(1, 1)], dim=1)
            pixels = b.pixel_values[images[i]][None] if b.visual[i].any() else None
            alone = stock_logits(vlm, ids, pixels)[0, -1]
            torch.testing.assert_close(vlm.head(continued[i, e][None])[0], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_identical_teacher_and_student_have_nothing_to_align(route: str) -> None:
    student = VLM(tiny.llava("qwen2", 1))
    teacher = VLM(tiny.llava("qwen2", 1))
    terms = step(student, teacher, route=route)(batch(torch.float32), KEYS)
    # Not exactly 0: kernels may sum in another order from one call to the next, by where their operands lie in memory.
    torch.testing.assert_close(terms.sums[1:], torch.zeros(3), atol=1e-5, rtol=0)
    assert terms.sums[0] > 1 and terms.counts.min() > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [(1.0, 0.7, 1.3, 0.9), (0.0, 0.0, 0.0, 1.0)], ids=["all terms", "tpa alone"])
def test_a_ribbon_that_leaves_its_rows_takes_the_same_step(
    family: str, weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for least in (0, 10**9):
        monkeypatch.setattr("components.align_ti.step.SHARED_FROM", least)
        student, teacher = pair(family)
        terms = step(student, teacher, weights=dict(zip(CORE, weights, strict=True)))(batch(), KEYS)
        assert terms.ribbon_rows > 0
        loss = total(terms.sums, terms.counts, torch.tensor(weights, dtype=torch.float64))
        results.append((terms.sums.detach(), *gradients(student, loss)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("flex_on_a_cpu")
def test_flex_attention_takes_the_same_step(family: str) -> None:
    results = []
    for flexes in (False, True):
        student, teacher = pair(family)
        student.train()
        if flexes:
            student.flex()
        terms = step(student, teacher, route="expanded")(batch(), KEYS)
        assert terms.ribbon_rows > 0
        weights = torch.tensor([1.0, 0.7, 1.3, 0.9], dtype=torch.float64)
        results.append((terms.sums.detach(), *gradients(student, total(terms.sums, terms.counts, weights))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels, forward and backward, are for a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_compiled_on_a_gpu(family: str) -> None:
    results = []
    b = batch(torch.float32).to(torch.device("cuda"))
    for flexes in (False, True):
        # Its kernels take heads of 16 and more.
        student, teacher = (VLM(tiny.llava(family, seed, hidden=64).cuda()) for seed in (1, 2))
        if flexes:
            student.flex()
        terms = step(student, teacher, route="expanded")(b, KEYS)
        results.append((terms.sums.detach(), *gradients(student, total(terms.sums, terms.counts, terms.sums.new_ones(4)))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-3)  # TF32 inside


@pytest.mark.parametrize(
    "options",
    [{}, {"draw_temperature": 1.5, "top_k": 12, "top_p": 0.9, "max_expanded_length": 16, "alternatives": "shuffled"}],
)
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_routes_agree_on_what_is_drawn(options: dict, source: str) -> None:
    student, teacher = pair("qwen2")
    b = batch()
    routes = ("continuation", "expanded")
    continued, expanded = (step(student, teacher, route=route, source=source, **options)(b, KEYS) for route in routes)
    assert continued.counts.tolist() == expanded.counts.tolist() and continued.ribbon_rows == expanded.ribbon_rows > 0
    assert continued.steps_left_out == expanded.steps_left_out and bool(continued.steps_left_out) == bool(options)
    torch.testing.assert_close(continued.sums, expanded.sums)


OPTIONS = {"draw_temperature": 1.5, "top_k": 12, "top_p": 0.9, "max_expanded_length": 16}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "capped"])
@pytest.mark.parametrize("split", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_loss_does_not_depend_on_how_the_batch_is_split(split: list[int], options: dict) -> None:
    student, teacher = pair("qwen3")
    module = step(student, teacher, **options)
    weights = torch.tensor([1.0, 0.7, 1.3, 0.9], dtype=torch.float64)
    full = module(batch(), KEYS)
    expected_loss = total(full.sums, full.counts, weights)
    expected_gradients = gradients(student, expected_loss)

    start, parts = 0, []
    full_batch = batch()
    for size in split:
        parts.append((tiny.part(full_batch, start, start + size), KEYS[start : start + size]))
        start += size
    draws = [module.draw(part, keys) for part, keys in parts]
    assert sum(left_out(drawn) for drawn in draws) == full.steps_left_out
    assert bool(full.steps_left_out) == bool(options)
    counts = sum(module.count(part, drawn) for (part, _), drawn in zip(parts, draws, strict=True))
    assert counts.tolist() == full.counts.tolist()
    student.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for (part, keys), drawn in zip(parts, draws, strict=True):
        share = total(module(part, keys, drawn).sums, counts, weights)
        share.backward()
        loss += share.detach()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-10, atol=1e-12)
    accumulated = [p.grad for p in student.parameters() if p.grad is not None]
    for got, expected in zip(accumulated, expected_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)  # RMSNorm is float32 inside


@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_wrong_alternatives_are_all_but_those_that_the_data_have(route: str) -> None:
    student, teacher = pair("qwen2")
    b = batch()
    plain, wrong = (step(student, teacher, route=route, draws=60, alternatives=which) for which in (None, "wrong"))
    gold = b.input_ids[:, 1:][b.response[:, 1:]][:, None]
    draws = plain.draw(b, KEYS)
    assert (draws == gold).any()
    assert torch.equal(wrong.draw(b, KEYS), draws.masked_fill(draws == gold, tiny.EOS))
    assert float(wrong(b, KEYS).counts[3]) == float(((draws != gold) & (draws != tiny.EOS)).sum())


def test_sharing_the_tower_changes_nothing() -> None:
    student, teacher = pair("qwen2")
    student.model.model.vision_tower.requires_grad_(False)
    teacher.model.model.vision_tower.load_state_dict(student.model.model.vision_tower.state_dict())
    with_sharing, without = (step(student, teacher, shared)(batch(), KEYS) for shared in (True, False))
    torch.testing.assert_close(with_sharing.sums, without.sums, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("source", ["student", "teacher", "gold"])
@pytest.mark.parametrize("replacement", [True, False])
def test_sources_of_alternatives(source: str, replacement: bool) -> None:
    student, teacher = pair("llama")
    module = step(student, teacher, source=source, replacement=replacement)
    b = batch()
    draws = module.draw(b, KEYS)
    gold = b.input_ids[:, 1:][b.response[:, 1:]]
    if source == "gold":
        assert torch.equal(draws, gold[:, None])
        assert module(b, KEYS).ribbon_rows == 0
        return
    assert draws.shape == (len(gold), 4)
    if not replacement:
        assert all(len(set(row)) == 4 for row in draws.tolist())
    model = student if source == "student" else teacher
    with torch.no_grad():
        hidden, _ = model.plain(b, model.features(b), keep=False)
    likely = model.head(hidden[predicting(b.response)]).softmax(-1).gather(1, draws)
    assert likely.mean() > 2 / tiny.VOCABULARY  # drawn from that model, not uniformly
    assert module(b, KEYS).counts[3] == (draws != tiny.EOS).sum()


def test_uniform_weights_are_a_plain_mean_over_visual_rows() -> None:
    student, teacher = pair("qwen2")
    b = batch()
    terms = step(student, teacher, options={"iva": {"uniform": True}})(b, KEYS)
    logits = []
    for vlm in (teacher, student):
        hidden, _ = vlm.plain(b, vlm.features(b), keep=False)
        logits.append(vlm.head(hidden[b.visual]).log_softmax(-1))
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    torch.testing.assert_close(terms.sums[2] / terms.counts[2], expected)


def test_a_cap_counts_what_it_keeps_and_does_not_touch_the_other_terms() -> None:
    student, teacher = pair("qwen2")
    b = batch()
    uncapped, some, none = (step(student, teacher, max_expanded_length=cap)(b, KEYS) for cap in (1000, 16, 1))
    assert uncapped.steps_left_out == 0 < some.steps_left_out < none.steps_left_out == int(b.response.sum())
    assert uncapped.counts[3] > some.counts[3] > none.counts[3] == 0 and none.sums[3] == 0 == none.ribbon_rows
    for capped in (some, none):
        torch.testing.assert_close(capped.sums[:3], uncapped.sums[:3])
        assert capped.counts[:3].tolist() == uncapped.counts[:3].tolist()


def test_tiny_chunks_change_nothing() -> None:
    student, teacher = pair("qwen2")
    weights = torch.ones(4, dtype=torch.float64)
    results = []
    for chunk_mib in (40.0, 3 * tiny.VOCABULARY * 4 / 2**20):
        terms = step(student, teacher, chunk_mib=chunk_mib)(batch(), KEYS)
        results.append((terms.sums.detach(), gradients(student, total(terms.sums, terms.counts, weights))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)
    for gradient, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)  # RMSNorm is float32 inside


def test_total_divides_each_term_by_its_own_count_and_survives_a_term_without_units() -> None:
    sums, counts = torch.tensor([6.0, 4.0, 0.0, 9.0]), torch.tensor([3.0, 4.0, 0.0, 2.0])
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5])
    assert float(total(sums, counts, weights)) == pytest.approx(2.0 + 2.0 + 0.0 + 2.25)


NO_EOS = object()


@pytest.mark.parametrize(
    ("samples", "counts"),
    [
        ([(0, 2, 3)], [3, 3, 0]),  # no image anywhere
        ([(0, 2, 3), (0, 1, 1)], [4, 4, 0]),
        ([(1, 2, 0)], [0, 0, 1]),  # no response token
        ([(0, 2, 0)], [0, 0, 0]),  # nothing at all to learn from
        ([(1, 2, 0), (1, 2, 2)], [2, 2, 2]),  # an empty response beside another
        ([(1, 2, 1)], [1, 1, 1]),  # a response of only EOS
        ([(1, 2, 1), NO_EOS], [1, 1, 1]),  # one response token, cut off before its EOS
        ([(1, 0, 2)], [2, 2, 1]),  # an image that no instruction follows: all its tokens weigh the same
    ],
)
@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_odd_batches_have_a_defined_result(samples: list, counts: list[int], route: str) -> None:
    student, teacher = pair("qwen2")
    b = batch(samples=[sample for sample in samples if sample is not NO_EOS])
    if NO_EOS in samples:
        b.input_ids[b.response] = 17
    terms = step(student, teacher, route=route)(b, list(range(len(b.input_ids))))
    assert terms.counts[:3].tolist() == counts
    assert bool(terms.counts[3]) == bool(counts[0])
    assert terms.sums.isfinite().all()
    assert [bool(s) for s in terms.sums[:3]] == [bool(c) for c in counts]
    loss = total(terms.sums, terms.counts, torch.ones(4))
    assert all(g.isfinite().all() for g in gradients(student, loss))


@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_an_empty_response_leaves_the_text_terms_of_its_neighbours_alone(route: str) -> None:
    student, teacher = pair("qwen2")
    alone = step(student, teacher, route=route)(batch(samples=[(0, 2, 3)]), [5])
    beside = batch(samples=[(0, 2, 3), (0, 4, 0)])
    both = step(student, teacher, route=route)(beside, [5, 6])
    assert both.counts.tolist() == alone.counts.tolist()
    torch.testing.assert_close(both.sums, alone.sums)


def test_terms_of_weight_zero_are_not_computed() -> None:
    student, _ = pair("qwen2")
    only_sft = AlignTI(student, None, Method(weights={**dict.fromkeys(CORE, 0.0), "sft": 1.0}, eos=tiny.EOS))
    terms = only_sft(batch(), KEYS)
    assert terms.sums[0] > 0 and terms.sums[1:].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="need a teacher"):
        AlignTI(student, None, Method(weights=ALL))


def test_the_teacher_is_no_part_of_the_module() -> None:
    student, teacher = pair("qwen2")
    module = step(student, teacher)
    assert len(list(module.parameters())) == len(list(student.parameters()))
    assert all(key.startswith("student.") for key in module.state_dict())
    module.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_values_are_pinned() -> None:
    """A change of any number here is a change of the method."""
    student, teacher = pair("qwen2", torch.float32)
    terms = step(student, teacher)(batch(torch.float32), KEYS)
    assert terms.counts.tolist() == PINNED_COUNTS
    assert (terms.sums / terms.counts).tolist() == pytest.approx(PINNED_MEANS, rel=1e-4)


PINNED_COUNTS = [8.0, 8.0, 3.0, 32.0]
PINNED_MEANS = [3.66941, 1.31009, 1.16974, 1.40290]


@pytest.mark.parametrize("term", CORE)
@pytest.mark.parametrize("route", ["continuation", "expanded"])
def test_gradient_of_each_term_by_finite_differences(term: str, route: str) -> None:
    """Along one random direction of all the student's parameters; the draws are held fixed, as the method does."""
    student, teacher = pair("llama")
    module = step(student, teacher, route=route)
    b = batch()
    draws = fixed_draws(b)
    only = torch.tensor([float(name == term) for name in CORE], dtype=torch.float64)

    def loss() -> torch.Tensor:
        terms = module(b, KEYS, draws)
        return total(terms.sums, terms.counts, only)

    student.zero_grad()
    loss().backward()
    moved = [p for p in student.parameters() if p.grad is not None]
    stream = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=stream, dtype=p.dtype) * p.detach().abs().mean() for p in moved]
    analytic = float(sum((p.grad * d).sum() for p, d in zip(moved, direction, strict=True)))

    def loss_at(shift: float) -> float:
        with torch.no_grad():
            for p, d in zip(moved, direction, strict=True):
                p.add_(d, alpha=shift)
            value = float(loss())
            for p, d in zip(moved, direction, strict=True):
                p.sub_(d, alpha=shift)
        return value

    numeric = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert numeric == pytest.approx(analytic, rel=5e-3, abs=1e-3)
