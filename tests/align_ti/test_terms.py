"""Every loss term held to the same rules. The terms are the files of components/align_ti/terms, and those of examples.py.

A new term adds one line to CASES: its loss written plainly in float64 from whole logits, maps and hidden states. All else
(gradients, splitting, two ranks, chunks, both routes, checkpointing, what a batch without units gives) is asked of it here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from components.align_ti import terms
from components.align_ti.batch import Edits, predicting
from components.align_ti.cached import Cached
from components.align_ti.row_weights import ROW_WEIGHTS, in_top
from components.align_ti.step import AlignTI, Method, total
from components.align_ti.terms.received import middle_layers, random_layers
from components.align_ti.top_k import top_k
from components.align_ti.visual_weights import visual_weights
from components.distill.ddp_module import Replica
from components.distill.teacher import FrozenTeacher
from components.models.attention import AttentionProbe, probing, recomputing
from components.models.vlm import VLM
from tests import tiny
from tests.align_ti import field_terms
from tests.align_ti.examples import EXAMPLES, MAPS, named
from tests.distill.test_stage import FIELD
from tests.families import toy

SAMPLES = [(1, 3, 3), (0, 2, 2), (1, 5, 2), (1, 1, 1)]
TEXT_FIRST = [(0, 2, 2), (1, 3, 3), (1, 5, 2), (1, 1, 1)]  # a first rank that takes one sample has no image
KEYS = [11, 12, 13, 14]
ROUTES = ["continuation", "expanded"]
PROGRESS = 0.1

RankResults = dict[str, tuple[Tensor, Tensor, list[Tensor]]]


@dataclass
class FormulaInputs:
    """What a plain formula reads: logits (B, T, V) of both models, the batch, the teacher's attention."""

    batch: Any
    student: Tensor
    teacher: Tensor
    attention: Tensor  # (B, Nv), the teacher's at layer 1
    module: AlignTI
    models: tuple[VLM, VLM]
    keys: list[int] = field(default_factory=lambda: KEYS)

    def kl(self, rows: Tensor) -> Tensor:
        p, q = self.teacher[rows].softmax(-1), self.student[rows].softmax(-1)
        return (p * (p / q).log()).sum(-1)

    def stock(self, kernel: str = "sdpa", **edited: Any) -> list[Any]:
        """Both stock models' own outputs, without a padding mask: padding is on the right, and attention causal."""
        given = {"input_ids": self.batch.input_ids, "pixel_values": self.batch.pixel_values} | edited
        outputs = []
        for vlm in self.models:
            vlm.model.set_attn_implementation(kernel)
            outputs.append(vlm.model(**given, output_attentions=kernel == "eager", output_hidden_states=True))
            vlm.model.set_attn_implementation("sdpa")
        return outputs


def _sft(inputs: FormulaInputs) -> Tensor:
    gold = inputs.batch.input_ids[:, 1:][inputs.batch.response[:, 1:]]
    return -inputs.student[predicting(inputs.batch.response)].log_softmax(-1)[range(len(gold)), gold].sum()


def _kd(inputs: FormulaInputs) -> Tensor:
    return inputs.kl(predicting(inputs.batch.response)).sum()


def _weighted_kd(name: str, inputs: FormulaInputs) -> Tensor:
    rows = predicting(inputs.batch.response)
    p, q = inputs.teacher[rows].softmax(-1), inputs.student[rows].softmax(-1).detach()
    gold = inputs.batch.input_ids[:, 1:][inputs.batch.response[:, 1:]]
    unsure, doubts = (-(x * x.log()).sum(-1) / math.log(x.shape[-1]) for x in (q, p))
    weights = {
        "entropy": doubts,
        "certainty": (-doubts).exp(),
        "confidence": 1 - p[range(len(gold)), gold],
        "unsure": unsure,
        "divergence": inputs.kl(rows).detach(),
        "accepted": torch.tensor(
            [1 if int(b.argmax()) in a.topk(5).indices.tolist() else 0.01 for a, b in zip(p, q, strict=True)]
        ),
    }
    return (weights[name] * inputs.kl(rows)).sum()


def _kd_of_top(inputs: FormulaInputs) -> Tensor:
    """Of each answer of R rows the ceil(R / 2) of which the student is least sure, R / so many times each."""
    losses = []
    for sample in range(len(SAMPLES)):
        rows = predicting(inputs.batch.response[sample : sample + 1])[0]
        q = inputs.student[sample][rows].softmax(-1).detach()
        kl = inputs.kl(torch.arange(len(SAMPLES))[:, None].eq(sample) & rows)
        top = (-(q * q.log()).sum(-1)).topk(math.ceil(len(q) / 2)).indices
        losses.append(kl[top].mean() * len(q))
    return torch.stack(losses).sum()


def _iva(inputs: FormulaInputs) -> Tensor:
    return (visual_weights(inputs.attention, inputs.batch.pictures) * inputs.kl(inputs.batch.visual)).sum()


def _labels(inputs: FormulaInputs) -> Tensor:
    rows = predicting(inputs.batch.response)
    return F.cross_entropy(inputs.student[rows], inputs.teacher[rows].argmax(-1), reduction="sum")


def _iva_by(name: str, inputs: FormulaInputs) -> Tensor:
    losses = []
    for sample in inputs.batch.visual.any(1).nonzero()[:, 0].tolist():
        rows = torch.arange(len(inputs.batch.visual))[:, None].eq(sample) & inputs.batch.visual
        p, kl = inputs.teacher[rows].softmax(-1), inputs.kl(rows)
        weights = kl.detach() if name == "divergence" else -(p * p.log()).sum(-1)
        losses.append((weights / weights.sum() * kl).sum())
    return torch.stack(losses).sum()


def _uniform(inputs: FormulaInputs) -> Tensor:
    return (inputs.kl(inputs.batch.visual) / tiny.NV).sum()


def _attention(inputs: FormulaInputs) -> Tensor:
    student, teacher = (output.attentions for output in inputs.stock("eager"))
    losses = []
    for sample, layer_rows in product(inputs.batch.visual.any(1).nonzero()[:, 0].tolist(), MAPS):
        rows, columns = getattr(inputs.batch, layer_rows.rows)[sample], inputs.batch.visual[sample]
        a, b = (maps[layer_rows.layer][sample].mean(0)[rows][:, columns] for maps in (student, teacher))
        a, b = (a.flatten(), b.flatten()) if layer_rows.each_row else (a.mean(0), b.mean(0))
        losses.append(1 - (a @ b) / (a.norm() * b.norm()))
    return torch.stack(losses).sum() / len(MAPS)


def _hidden(inputs: FormulaInputs) -> Tensor:
    student, teacher = inputs.stock()
    (projection,) = inputs.module.term_modules.parameters()
    rows = inputs.batch.visual
    return ((student.hidden_states[1] @ projection.T - teacher.hidden_states[2])[rows] ** 2).mean(-1).sum() / tiny.NV


def _blind(inputs: FormulaInputs) -> Tensor:
    blind = inputs.stock(pixel_values=torch.zeros_like(inputs.batch.pixel_values))
    losses = []
    for sample in inputs.batch.visual.any(1).nonzero()[:, 0].tolist():
        real = inputs.batch.attention_mask[sample].bool()
        moves = [
            (seeing.hidden_states[-1] - blank.hidden_states[-1])[sample][real].norm()
            for seeing, blank in zip(inputs.stock(), blind, strict=True)
        ]
        losses.append((moves[0] - moves[1]) ** 2)
    return PROGRESS * torch.stack(losses).sum()


@dataclass(frozen=True)
class Case:
    """One term with options."""

    term: str
    formula: Callable[[FormulaInputs], Tensor] | None  # None: its reference is one pass per alternative, in test_step.py
    options: dict[str, Any] = field(default_factory=dict)
    highest: float = float("inf")  # of its mean
    aligned: float | None = 0.0  # its mean where the student is the teacher; None: whatever it is
    rtol: float = 1e-9  # to its formula
    held: bool = False  # the student moves something that its gradient leaves out: no finite differences


CASES = {
    "sft": Case("sft", _sft, aligned=None),
    "kd": Case("kd", _kd),
    **{
        f"kd by {name}": Case("kd", partial(_weighted_kd, name), {"row_weight": name}, held=name in ("unsure", "divergence"))
        for name in ROW_WEIGHTS
    },
    "kd pooled": Case("kd", lambda inputs: _kd(inputs) + inputs.kl(inputs.batch.visual).sum(), {"pooled": True}),
    "kd against labels": Case("kd", _labels, {"divergence": {"kind": "argmax", "mix": 0.5, "temperature": 1.0}}, aligned=None),
    "kd of top rows": Case("kd", _kd_of_top, {"row_weight": "unsure", "top": 0.5}),
    "kd jsd": Case("kd", None, {"divergence": {"kind": "jsd", "mix": 0.5, "temperature": 1.0}}, highest=0.6932),
    "iva": Case("iva", _iva),
    "iva uniform": Case("iva", _uniform, {"uniform": True}),
    "iva of drawn rows": Case("iva", None, {"rows": 2}),
    "iva by entropy": Case("iva", partial(_iva_by, "entropy"), {"by": "entropy"}),
    "iva by divergence": Case("iva", partial(_iva_by, "divergence"), {"by": "divergence"}, held=True),
    "iva permuted": Case("iva", field_terms.permuted_iva, {"change": "permuted"}),
    "iva reverse": Case("iva", None, {"divergence": {"kind": "reverse", "mix": 0.5, "temperature": 1.0}}),
    "tpa": Case("tpa", None),
    "hybrid": Case("hybrid", field_terms.hybrid, aligned=None),
    "hybrid rising": Case("hybrid", partial(field_terms.hybrid, soft=0.35), {"soft": 0.7, "rising": True}, aligned=None),
    "hybrid by confidence": Case("hybrid", field_terms.hybrid_by_confidence, {"row_weight": "confidence"}, aligned=None),
    "hybrid, shuffled": Case(
        "hybrid",
        partial(field_terms.hybrid_by_confidence, shuffled=True),
        {"row_weight": "confidence", "shuffled": True},
        aligned=None,
    ),
    "hybrid of risk": Case("hybrid", partial(field_terms.hybrid, risk=0.1), {"risk": 0.1}, aligned=None),
    "tad": Case("tad", field_terms.tad),
    "dkd": Case("dkd", field_terms.dkd),
    "dkd, shuffled": Case("dkd", partial(field_terms.dkd, shuffled=True), {"shuffled": True}),
    "taid": Case("taid", field_terms.taid, held=True),
    "va_kd": Case("va_kd", field_terms.va_kd),
    **{f"va_kd by {by}": Case("va_kd", partial(field_terms.va_kd, by=by), {"by": by}) for by in ("blank", "entropy", "random")},
    "va_kd, cached": Case("va_kd", partial(field_terms.va_kd, by="cached"), {"cached": True}),
    "mcd": Case("mcd", field_terms.mcd, highest=1.0, aligned=None),
    "relation": Case("relation", field_terms.relation, highest=2.0),
    "relation centred": Case("relation", partial(field_terms.relation, centred=True), {"centred": True}, highest=2.0),
    "relation permuted": Case(
        "relation", partial(field_terms.relation, permuted=True), {"permuted": True}, highest=2.0, aligned=None
    ),
    "affinity": Case("affinity", field_terms.affinity, highest=2.0, rtol=1e-6),
    "cka": Case("cka", field_terms.cka, highest=2.0, rtol=1e-6),
    "cka permuted": Case(
        "cka", partial(field_terms.cka, permuted=True), {"permuted": True}, highest=2.0, aligned=None, rtol=1e-6
    ),
    "received": Case(
        "received",
        partial(field_terms.received, pairs=((0, (1,)), (1, (0, 1)))),
        {"layers": ((0, (1,)), (1, (0, 1)))},
        highest=4.0,
        aligned=None,
        rtol=1e-5,
    ),
    "received permuted": Case(
        "received",
        partial(field_terms.received, pairs=((0, (1,)),), permuted=True),
        {"layers": ((0, (1,)),), "permuted": True},
        highest=2.0,
        aligned=None,
        rtol=1e-5,
    ),
    "received in the first layer": Case(
        "received",
        partial(field_terms.received, rows="instruction", pairs=((0, (0, 1)),), sinks=True),
        {"rows": "instruction", "layers": ((0, (0, 1)),), "sinks": True},
        highest=2.0,
        aligned=None,
        rtol=1e-5,
    ),
    "attention": Case("attention", _attention, highest=2.0, rtol=1e-5),  # eager attention takes its softmax in float32
    "hidden": Case("hidden", _hidden, aligned=None),
    "blind": Case("blind", _blind),
}


def test_every_term_has_a_case() -> None:
    assert {case.term for case in CASES.values()} == {*terms.names(), *EXAMPLES}


def test_the_table_of_the_docs_is_what_the_cases_say() -> None:
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text().partition("## What the tests hold")[2]
    rows = {cells[1].strip(" `"): cells for line in text.splitlines() if len(cells := line.split("|")) > 9}
    cache_support = {name: cells[7].strip() for name, cells in rows.items() if name in terms.names()}
    assert set(cache_support) == {*terms.names()}
    killed = {*terms.CORE, *(term for arm in FIELD.values() for term in arm["weights"])}
    for name, support in cache_support.items():
        needs = terms.term_class(name)().needs
        served = "live" if needs.live_teacher else "yes" if needs.teacher else "its own" if needs.edits else "none needed"
        assert support.partition(",")[0] == served, name
        assert [cell.strip() for cell in rows[name][3:7]] == ["yes"] * 4, name  # the tests below run every case
        assert int(re.findall(r"\d+", rows[name][8])[0]) == len(toy.FAMILIES) - (name == "relation"), name
        assert rows[name][9].strip() == ("yes" if name in killed else "stopped"), name
        tolerances = [case.rtol for case in CASES.values() if case.term == name and case.formula]
        assert not tolerances or re.match(r"[^,;]*", rows[name][2].strip())[0] == f"1e-{-math.log10(max(tolerances)):.0f}", name


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def pair(dtype: torch.dtype = torch.float64, family: str = "qwen2") -> tuple[VLM, VLM]:
    return VLM(tiny.llava(family, 1).to(dtype)), VLM(tiny.llava(family, 2, hidden=48, layers=3).to(dtype))


def batch(samples: list[tuple[int, int, int]] = SAMPLES, dtype: torch.dtype = torch.float64) -> Any:
    plain = tiny.batch(samples, dtype=dtype)
    dependence = torch.rand(plain.response.shape, generator=torch.Generator().manual_seed(4), dtype=dtype) * plain.response
    return replace(plain, edits=edits(plain, samples, dtype), dependence=dependence)


def edits(b: Any, samples: list[tuple[int, int, int]], dtype: torch.dtype) -> Edits | None:
    """Of the samples with an image and an answer, some tokens of which are those of a batch by another seed."""
    indices = [index for index, (images, _, R) in enumerate(samples) if images and R]
    if not indices:
        return None
    chosen = [samples[index] for index in indices]
    original, donor = (tiny.batch(chosen, seed, dtype) for seed in (0, 9))
    T = original.response.shape[1]
    original = replace(  # as they stand in the whole batch
        original,
        ids=[b.ids[index] for index in indices],
        input_ids=b.input_ids[indices][:, :T],
        attention_mask=b.attention_mask[indices][:, :T],
        pixel_values=b.pixel_values[[sum(images for images, _, _ in samples[:index]) for index in indices]],
    )
    donor = replace(donor, input_ids=torch.where(original.instruction, donor.input_ids, original.input_ids))
    stream = torch.Generator().manual_seed(3)
    keep = torch.rand(original.input_ids.shape, generator=stream) < 0.5
    keep |= ~(original.instruction | original.visual)
    effect = torch.tensor([index % 2 == 0 for index in indices])
    rows = int(original.response.sum())
    tokens = torch.stack([torch.randperm(tiny.VOCABULARY, generator=stream)[:3] for _ in range(rows)])
    whole, without = torch.rand(2, rows, 4, generator=stream, dtype=dtype).softmax(-1)
    return Edits(original, donor, keep.to(dtype), torch.tensor(indices), effect, tokens, whole, without)


def step(student: VLM, teacher: VLM | None, case: Case, signals: Any = None, **options: Any) -> AlignTI:
    torch.manual_seed(0)  # of a term's own module
    method = Method({case.term: 1.0}, {case.term: case.options}, eos=tiny.EOS, shared_vocabulary=tiny.VOCABULARY, **options)
    frozen = None if teacher is None else FrozenTeacher(teacher, 1, False)
    module = AlignTI(student, frozen, method, signals).double()
    module.progress = PROGRESS
    return module


def of(module: AlignTI, case: Case) -> int:
    return list(module.method.terms).index(case.term)


def loss(module: AlignTI, b: Any, **options: Any) -> Tensor:
    outputs = module(b, options.pop("keys", KEYS), **options)
    return total(outputs.sums, outputs.counts, module.method.weight_vector())


def gradients(module: AlignTI, value: Tensor) -> list[Tensor]:
    module.zero_grad()
    value.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(actual: list[Tensor], expected: list[Tensor], **tolerances: float) -> None:
    for value, target in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, target, **({"rtol": 1e-4, "atol": 1e-7} | tolerances))  # RMSNorm is float32 inside


def test_it_equals_its_plain_formula(case: Case) -> None:
    if case.formula is None:
        pytest.skip("its reference stands elsewhere: alternatives in test_step.py, divergences in test_divergence.py")
    student, teacher = pair()
    b = batch()
    module = step(student, teacher, case)
    probe = AttentionProbe.from_masks(b.instruction, b.pictures)
    with torch.no_grad(), probing(teacher.model, [1], probe):
        teacher_hidden, _ = teacher.plain(b, teacher.features(b), keep=False)
    student_hidden, _ = student.plain(b, student.features(b), keep=False)
    expected = case.formula(
        FormulaInputs(b, student.head(student_hidden), teacher.head(teacher_hidden), probe.maps[1], module, (student, teacher))
    )
    outputs = module(b, KEYS)
    torch.testing.assert_close(outputs.sums[of(module, case)], expected, rtol=case.rtol, atol=1e-12)
    same(gradients(module, outputs.sums[of(module, case)]), gradients(module, expected))


def test_the_risk_of_an_answer_ends_where_the_next_question_begins() -> None:
    student, teacher = pair()
    b, case = batch([(1, 3, 6)]), CASES["hybrid of risk"]
    b.response[0, int(b.response[0].nonzero()[2])] = False  # two answers, of two and of three tokens
    module = step(student, teacher, case)
    student_hidden, teacher_hidden = (vlm.plain(b, vlm.features(b), keep=False)[0] for vlm in (student, teacher))
    inputs = FormulaInputs(
        b, student.head(student_hidden), teacher.head(teacher_hidden), student_hidden, module, (student, teacher)
    )
    torch.testing.assert_close(module(b, KEYS[:1]).sums[of(module, case)], field_terms.hybrid(inputs, risk=0.1))


def test_the_top_share_of_a_samples_rows_is_rounded_up_and_no_further() -> None:
    for percent, size in product((20, 30, 60, 72), (1, 25, 50, 150)):
        sample = torch.zeros(size, dtype=torch.long)
        assert int(in_top(torch.rand(size), sample, percent / 100).sum()) == -(-percent * size // 100), (percent, size)


def test_random_layers_are_as_many_as_the_middle_ones_and_the_same_each_time() -> None:
    middle, chosen = middle_layers(24, 28), random_layers(24, 28)
    assert chosen == random_layers(24, 28) and chosen != middle
    assert [len(layers) for _, layers in chosen] == [len(layers) for _, layers in middle]
    assert all(0 <= layer < 24 and len({*layers}) == len(layers) and max(layers) < 28 for layer, layers in chosen)
    assert {layer for layer, _ in chosen}.isdisjoint(layer for layer, _ in middle)
    assert len({layer for layer, _ in chosen}) == len(middle)
    assert len(random_layers(2, 2)) == 1


@pytest.mark.parametrize(("depth", "first", "window"), [(24, 8, 2), (28, 9, 3), (32, 11, 3), (36, 12, 4), (40, 13, 5)])
def test_middle_layers_are_the_published_ones(depth: int, first: int, window: int) -> None:
    chosen = terms.term_class("received")(layers="middle").at_depth(24, depth).layers
    assert [layer for layer, _ in chosen] == [*range(8, 15)]
    assert [layers for _, layers in chosen] == [tuple(range(first + j, first + j + window)) for j in range(7)]
    assert all(layer < 3 for layer, _ in terms.term_class("received")().at_depth(3, 3).layers)


@pytest.mark.parametrize("route", ROUTES)
def test_its_gradient_by_finite_differences(case: Case, route: str) -> None:
    """Along one random direction of all trained parameters; the draws are held fixed, as the method does."""
    if case.held:
        pytest.skip("its gradient is the formula's, which is not that of its value")
    student, teacher = pair()
    module, b = step(student, teacher, case, route=route), batch()
    draws = module.draw(b, KEYS) if module.method.needs.ribbon else None
    if draws is not None:
        draws[draws == tiny.PAD] = tiny.PAD + 4  # the embedding of padding has no gradient
    slopes = gradients(module, loss(module, b, draws=draws))
    stream = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=stream, dtype=p.dtype) * p.detach().abs().mean() for p in module.parameters()]

    def loss_at(shift: float) -> float:
        with torch.no_grad():
            for p, d in zip(module.parameters(), direction, strict=True):
                p.add_(d, alpha=shift)
            value = float(loss(module, b, draws=draws))
            for p, d in zip(module.parameters(), direction, strict=True):
                p.sub_(d, alpha=shift)
        return value

    slope = float(sum((g * d).sum() for g, d in zip(slopes, direction, strict=True)))
    assert (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4 == pytest.approx(slope, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("split", [[1, 3], [1, 1, 1, 1]])
def test_it_does_not_depend_on_how_the_batch_is_split(case: Case, split: list[int]) -> None:
    student, teacher = pair()
    module, full = step(student, teacher, case), batch()
    outputs = module(full, KEYS)
    expected = gradients(module, total(outputs.sums, outputs.counts, module.method.weight_vector()))
    parts = list(pieces(full, split))
    draws = [module.draw(b, keys) if module.method.needs.ribbon else None for b, keys in parts]
    counts = sum(module.count(b, drawn) for (b, _), drawn in zip(parts, draws, strict=True))
    assert counts.tolist() == outputs.counts.tolist()
    shares = [module(b, keys, drawn).sums for (b, keys), drawn in zip(parts, draws, strict=True)]
    torch.testing.assert_close(sum(shares), outputs.sums, rtol=1e-9, atol=1e-12)
    same(gradients(module, total(sum(shares), counts, module.method.weight_vector())), expected)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> RankResults:
    """Of every case: sums and counts over both ranks, and gradients."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (str(folder),), nprocs=2)
    results: RankResults = torch.load(folder / "found.pt")
    return results


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        named(patch)
        results = {name: _step(rank, case) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, f"{folder}/found.pt")
    dist.destroy_process_group()


def _step(rank: int, case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a step of training does, with its part of the batch."""
    module = step(*pair(), case)
    wrapped = DistributedDataParallel(Replica(module, ranks=2), broadcast_buffers=False)
    b, keys = list(pieces(batch(TEXT_FIRST), [1, 3]))[rank]
    sums, counts, _ = wrapped(b, keys)
    dist.all_reduce(counts)
    total(sums, counts, module.method.weight_vector() * 2).backward()  # DDP takes the mean over ranks
    sums = sums.detach()
    dist.all_reduce(sums)
    return sums, counts, [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_process_does(name: str, on_two_ranks: RankResults) -> None:
    """The first of them without an image, so that it has no units of some terms."""
    module = step(*pair(), CASES[name])
    alone = module(batch(TEXT_FIRST), KEYS)
    sums, counts, slopes = on_two_ranks[name]
    assert counts.tolist() == alone.counts.tolist()
    torch.testing.assert_close(sums, alone.sums.detach(), rtol=1e-9, atol=1e-12)
    same(slopes, gradients(module, total(alone.sums, alone.counts, module.method.weight_vector())))


def pieces(b: Any, split: list[int]) -> Any:
    start = 0
    for size in split:
        edits_here = None if b.edits is None else part_of(b.edits, start, size)
        yield replace(tiny.part(b, start, start + size), edits=edits_here), KEYS[start : start + size]
        start += size


def part_of(full: Edits, start: int, size: int) -> Edits | None:
    """Edits of a piece of the batch."""
    inside = [row for row, index in enumerate(full.indices.tolist()) if start <= index < start + size]
    if not inside:
        return None
    both = (tiny.part(b, inside[0], inside[-1] + 1) for b in (full.batch, full.donor))
    rows = torch.isin(full.batch.response.nonzero()[:, 0], torch.tensor(inside))
    per_row = (getattr(full, name)[rows] for name in ("tokens", "whole", "without"))
    return Edits(*both, full.keep[inside], full.indices[inside] - start, full.effect[inside], *per_row)


def test_chunks_change_nothing(case: Case) -> None:
    student, teacher = pair()
    plain, chunked = (
        step(student, teacher, case, **options) for options in ({}, {"chunk_mib": 3 * tiny.VOCABULARY * 4 / 2**20})
    )
    values = [loss(module, batch()) for module in (plain, chunked)]
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    same(gradients(plain, values[0]), gradients(chunked, values[1]))


def test_bf16_changes_it_little(case: Case) -> None:
    """Under autocast, as the stage trains in bf16: what a term does itself it does in float32."""
    values = []
    for bf16 in (False, True):
        module, b = step(*pair(torch.float32), case).float(), batch(dtype=torch.float32)
        for p in module.live_teacher.vlm.parameters():
            p.data = p.data.float()
        draws = torch.full((sum(R for _, _, R in SAMPLES), 4), 9) if module.method.needs.ribbon else None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(module, b, draws=draws)
        assert value.dtype == torch.float32 and all(g.isfinite().all() for g in gradients(module, value))
        values.append(float(value.detach()))
    assert values[1] == pytest.approx(values[0], rel=0.1)


@pytest.mark.parametrize("samples", [[(0, 2, 0)], [(0, 2, 3)], [(1, 2, 0)]], ids=["nothing", "no image", "no response"])
@pytest.mark.parametrize("route", ROUTES)
def test_without_units_it_is_zero_and_has_a_graph(case: Case, samples: list[tuple[int, int, int]], route: str) -> None:
    student, teacher = pair()
    module = step(student, teacher, case, route=route)
    outputs = module(batch(samples), [7])
    index = of(module, case)
    assert outputs.sums[index].isfinite() and outputs.sums[index].requires_grad
    if not outputs.counts[index]:
        assert outputs.sums[index] == 0
        assert not any(g.any() for g in gradients(module, outputs.sums[index]))


def test_it_is_in_its_range(case: Case) -> None:
    student, teacher = pair()
    module = step(student, teacher, case)
    outputs = module(batch(), KEYS)
    assert 0 < float((outputs.sums / outputs.counts)[of(module, case)].detach()) <= case.highest


@pytest.mark.parametrize("route", ROUTES)
def test_an_identical_teacher_leaves_nothing_to_align(case: Case, route: str) -> None:
    if case.aligned is None:
        pytest.skip("it does not compare the two models, or not as they are")
    student, teacher = (VLM(tiny.llava("qwen2", 1).double()) for _ in range(2))
    module = step(student, teacher, case, route=route)
    outputs = module(batch(), KEYS)
    assert float(outputs.sums[of(module, case)].detach()) == pytest.approx(case.aligned, abs=1e-6)


class Cache:
    """The teacher's whole distributions, kept: what `signals` are with k = V."""

    def __init__(self, teacher: VLM) -> None:
        self.teacher = teacher

    def look_up(self, b: Any, visual: bool, with_attention: bool) -> tuple[Cached, Tensor | None]:
        probe = AttentionProbe.from_masks(b.instruction, b.pictures)
        with torch.no_grad(), probing(self.teacher.model, [1], probe):
            hidden, _ = self.teacher.plain(b, self.teacher.features(b), keep=False)
        rows = predicting(b.response) | (b.visual if visual else False)
        index = torch.full(rows.shape, -1)
        index[rows] = torch.arange(int(rows.sum()))
        return Cached(top_k(self.teacher.head(hidden[rows]), tiny.VOCABULARY), index), probe.maps[1] if with_attention else None


def test_a_cache_serves_it_or_is_refused(case: Case) -> None:
    student, teacher = pair()
    if case.term == "sft":
        return
    kind = case.options.get("divergence", {"kind": "forward"})["kind"]
    if terms.term_class(case.term)(**case.options).needs.live_teacher or kind != "forward":
        with pytest.raises(ValueError, match="kept signals serve"):
            step(student, None, case, Cache(teacher))
        return
    live, cached = step(student, teacher, case), step(student, None, case, Cache(teacher))
    values = [loss(module, batch()) for module in (live, cached)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    same(gradients(live, values[0]), gradients(cached, values[1]))


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_checkpointing_changes_nothing(case: Case, route: str) -> None:
    if case.term == "tpa" and route == "continuation":
        pytest.skip("a cache cannot be kept under gradient checkpointing: the stage takes the other route")
    student, teacher = pair()
    module = step(student, teacher, case, route=route)
    student.train()
    plain = gradients(module, loss(module, batch()))
    student.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": partial(recomputing, student.model)})
    same(gradients(module, loss(module, batch())), plain, rtol=1e-9, atol=1e-12)
