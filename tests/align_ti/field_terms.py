"""The field's losses written plainly, from whole logits, one row and one image at a time. Used by test_terms.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import torch
from torch import Tensor


def answers(inputs: Any) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Of each sample, the teacher's and the student's logits (R, V) at the rows that predict its response, and y_1..y_R."""
    for sample in range(len(inputs.batch.input_ids)):
        positions = inputs.batch.response[sample].nonzero()[:, 0]
        yield (
            inputs.teacher[sample, positions - 1],
            inputs.student[sample, positions - 1],
            inputs.batch.input_ids[sample, positions].tolist(),
        )


def uniforms(inputs: Any, sample: int, R: int) -> list[float]:
    """Of the R response tokens of a sample, by its key alone."""
    return torch.rand(R, generator=torch.Generator().manual_seed(-3 - inputs.keys[sample])).tolist()


def successors(inputs: Any, sample: int, R: int) -> list[int]:
    """Another token of the sample for each of its R response tokens: the next by their uniforms, the first for the last."""
    u = uniforms(inputs, sample, R)
    order = sorted(range(R), key=u.__getitem__)
    return [order[(order.index(t) + 1) % R] for t in range(R)]


def another_order(inputs: Any, sample: int, positions: Tensor) -> Tensor:
    """Positions of a sample's visual tokens in a random order, by its id alone."""
    return positions[
        torch.randperm(len(positions), generator=torch.Generator().manual_seed(crc32(inputs.batch.ids[sample].encode())))
    ]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def hybrid(inputs: Any, soft: float = 0.2, risk: float = 0.0) -> Tensor:
    total = inputs.student.sum() * 0
    for sample, response in enumerate(inputs.batch.response.tolist()):
        step = 0  # of this answer, which may be one of several
        for position in range(1, len(response)):
            step = step + 1 if response[position - 1] else 0
            if not response[position]:
                continue
            teacher, student = inputs.teacher[sample, position - 1], inputs.student[sample, position - 1]
            y = inputs.batch.input_ids[sample, position]
            hard = -student.softmax(-1)[y].log()
            if risk and response[position + 1 : position + 2] == [True]:
                hard = hard + risk / 4 * (student[y] - 0.9999 * inputs.student[sample, position].exp().sum().log()) ** 2
            hard = hard * 0.9999**step if risk else hard
            total = total + (1 - soft) * hard + soft * kl(teacher.softmax(-1), student.softmax(-1))
    return total


def hybrid_by_confidence(inputs: Any, shuffled: bool = False) -> Tensor:
    total = inputs.student.sum() * 0
    for sample, (teacher, student, gold) in enumerate(answers(inputs)):
        source = successors(inputs, sample, len(gold)) if shuffled else range(len(gold))
        for t, y in enumerate(gold):
            p, q = teacher[t].softmax(-1), student[t].softmax(-1)
            hard = teacher[source[t]].softmax(-1)[gold[source[t]]]
            total = total - hard * q[y].log() + (1 - hard) * kl(p, q)
    return total


def apart(p: Tensor, q: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """KL over `tokens` and all others as one; among the others; the others' mass under p."""
    others = [v for v in range(len(p)) if v not in tokens]
    a, b = p[others].sum(), q[others].sum()
    coarse = kl(torch.stack([*p[tokens], a]), torch.stack([*q[tokens], b]))
    return coarse, kl(p[others] / a, q[others] / b), a


def tad(inputs: Any) -> Tensor:
    total = inputs.student.sum() * 0
    for teacher, student, gold in answers(inputs):
        p, q = teacher.softmax(-1), student.softmax(-1)
        rows = [apart(p[t], q[t], p[t].topk(10).indices.tolist()) for t in range(len(gold))]
        mean = sum(mass for _, _, mass in rows) / len(gold)
        total = total + sum(coarse + 2 * mass / mean * fine for coarse, fine, mass in rows)
    return total


def dkd(inputs: Any, shuffled: bool = False) -> Tensor:
    total = inputs.student.sum() * 0
    for sample, (teacher, student, gold) in enumerate(answers(inputs)):
        source = successors(inputs, sample, len(gold)) if shuffled else range(len(gold))
        p, q = teacher.softmax(-1), student.softmax(-1)
        gates = [torch.exp((p[t] * p[t].log()).sum() / torch.tensor(float(len(p[t]))).log()) for t in range(len(gold))]
        for t, y in enumerate(gold):
            coarse, fine, _ = apart(p[t], q[t], [y])
            total = total + gates[source[t]] / (sum(gates) / len(gold)) * (coarse + 2 * fine)
    return total


def taid(inputs: Any, t: float = 0.4) -> Tensor:
    total = inputs.student.sum() * 0
    for teacher, student, gold in answers(inputs):
        for row in range(len(gold)):
            target = ((1 - t) * student[row].detach() + t * teacher[row]).softmax(-1)
            total = total + kl(target, student[row].softmax(-1))
    return total


def pictures(inputs: Any) -> Iterator[tuple[int, Tensor]]:
    """Samples with an image, and the positions of its tokens."""
    for sample in range(len(inputs.batch.input_ids)):
        if inputs.batch.visual[sample].any():
            yield sample, inputs.batch.visual[sample].nonzero()[:, 0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def relation(inputs: Any, centred: bool = False, permuted: bool = False) -> Tensor:
    total = inputs.student.sum() * 0
    for sample, visual in pictures(inputs):
        y, z = (
            inputs.student[sample, visual],
            inputs.teacher[sample, another_order(inputs, sample, visual) if permuted else visual],
        )
        if centred:
            y, z = y - y.mean(-1, keepdim=True), z - z.mean(-1, keepdim=True)
        total = total + 1 - cosine(y @ y.T, z @ z.T)
    return total


def affinity(inputs: Any) -> Tensor:
    student, teacher = (output.hidden_states[-1] for output in inputs.stock())
    total = inputs.student.sum() * 0
    for sample, visual in pictures(inputs):
        text = (inputs.batch.instruction | inputs.batch.response)[sample].nonzero()[:, 0]
        gaps = [
            cosine(student[sample, i], student[sample, j]) - cosine(teacher[sample, i], teacher[sample, j])
            for i in visual
            for j in text
        ]
        total = total + sum(d * d / 2 if abs(d) < 1 else abs(d) - 0.5 for d in gaps) / len(gaps)
    return total


def cka(inputs: Any, permuted: bool = False) -> Tensor:
    student, teacher = (output.hidden_states[-2] for output in inputs.stock())
    total = inputs.student.sum() * 0
    for sample, visual in pictures(inputs):
        H = torch.eye(len(visual)) - 1 / len(visual)
        kernels = []
        for states in (student[sample, visual], teacher[sample, another_order(inputs, sample, visual) if permuted else visual]):
            V = states / states.norm(dim=1, keepdim=True)
            kernels.append(H.double() @ V @ V.T @ H.double())
        total = total + 1 - cosine(*kernels)
    return total


def received(
    inputs: Any, rows: str = "visual", pairs: Any = ((0, (1,)),), sinks: bool = False, permuted: bool = False
) -> Tensor:
    student, teacher = (output.attentions for output in inputs.stock("eager"))
    total = inputs.student.sum() * 0
    for sample, visual in pictures(inputs):
        queries = getattr(inputs.batch, rows)[sample].nonzero()[:, 0]
        for layer, layers in pairs:
            a = student[layer][sample].mean(0)[queries][:, visual]
            columns = another_order(inputs, sample, visual) if permuted else visual
            b = sum(teacher[teacher_layer][sample].mean(0)[queries][:, columns] for teacher_layer in layers) / len(layers)
            u, v = [], []
            for c in range(len(visual)):
                keep = (
                    range(len(queries))
                    if sinks
                    else [r for r in range(len(queries)) if a[r, c] <= a.mean() + a.std() and 0 < b[r, c] <= b.mean() + b.std()]
                )
                u.append(sum((a[r, c] for r in keep), a[0, 0] * 0) / max(1, len(keep)))
                v.append(sum((b[r, c] for r in keep), b[0, 0] * 0) / max(1, len(keep)))
            total = total + 1 - cosine(torch.stack(u), torch.stack(v))
    return total


def permuted_iva(inputs: Any) -> Tensor:
    total, attention = inputs.student.sum() * 0, iter(inputs.attention)
    for sample in range(len(inputs.batch.input_ids)):
        weights, visual = next(attention), inputs.batch.visual[sample].nonzero()[:, 0]
        order = another_order(inputs, sample, torch.arange(len(visual)))
        for index, row in enumerate(visual.tolist()):
            p, q = (logits[sample, row].softmax(-1) for logits in (inputs.teacher, inputs.student))
            total = total + weights[order[index]] / weights.sum() * kl(p, q)
    return total


def mcd(inputs: Any) -> Tensor:
    """Each edited sample through the stock model from its embeddings, alone and without its padding."""
    edits, model = inputs.batch.edits, inputs.models[0].model
    total, row = inputs.student.sum() * 0, 0

    def embedded(batch: Any, sample: int, length: int) -> Tensor:
        words = model.get_input_embeddings()(batch.input_ids[sample, :length])
        image = model.model.get_image_features(pixel_values=batch.pixel_values[sample : sample + 1]).pooler_output[0]
        visual = batch.visual[sample, :length]
        return torch.stack([image[int(visual[:t].sum())] if visual[t] else words[t] for t in range(length)])

    def coarse(logits: Tensor, tokens: Tensor) -> Tensor:
        p = logits.softmax(-1)
        return torch.cat([p[tokens], 1 - p[tokens].sum()[None]])

    for sample, index in enumerate(edits.indices.tolist()):
        length = int(edits.batch.attention_mask[sample].sum())
        original, donor = (embedded(b, sample, length) for b in (edits.batch, edits.donor))
        mixed = torch.stack([m if keep else b for keep, m, b in zip(edits.keep[sample, :length], original, donor, strict=True)])
        logits = model(inputs_embeds=mixed[None]).logits[0]
        response = edits.batch.response[sample].nonzero()[:, 0].tolist()
        losses = []
        for t in response:
            edited = coarse(logits[t - 1], edits.tokens[row])
            if edits.effect[sample]:
                unedited = coarse(inputs.student[index, t - 1], edits.tokens[row])
                losses.append(((edits.whole[row] - edits.without[row]) - (unedited - edited)).abs().sum() / 4)
            else:
                losses.append((edits.whole[row] - edited).abs().sum() / 2)
            row += 1
        total = total + sum(losses) / len(response)
    return total


def va_kd(inputs: Any, by: str = "blurred") -> Tensor:
    """Tiny images are 16 x 16: shrunk they are one pixel, the mean under a triangle as wide as two images, cut at theirs."""
    triangle = 1 - (torch.arange(16) - 7.5).abs() / 16
    kernel = (triangle / triangle.sum()).outer(triangle / triangle.sum()).double()
    pixels = (inputs.batch.pixel_values * kernel).sum((2, 3), keepdim=True).expand_as(inputs.batch.pixel_values)
    pixels = pixels if by == "blurred" else torch.zeros_like(pixels)
    teacher = inputs.models[1].model
    blind = teacher(input_ids=inputs.batch.input_ids, pixel_values=pixels).logits
    total = inputs.student.sum() * 0
    for sample, (logits, student, gold) in enumerate(answers(inputs)):
        p, q = logits.softmax(-1), student.softmax(-1)
        response = inputs.batch.response[sample].nonzero()[:, 0]
        without = blind[sample, response - 1].softmax(-1)
        need = [max(0.0, float(p[t, y].log() - without[t, y].log())) for t, y in enumerate(gold)]
        if by == "random":
            need = uniforms(inputs, sample, len(gold))
        elif by == "cached":
            need = inputs.batch.dependence[sample, response].tolist()
        elif by == "entropy":
            need = [-float((p[t] * p[t].log()).sum()) for t in range(len(gold))]
        top = sorted(range(len(gold)), key=lambda t: -need[t])[: math.ceil(0.2 * len(gold))]
        rest = [t for t in range(len(gold)) if t not in top]
        losses = [kl(p[t], q[t]) for t in range(len(gold))]
        if not inputs.batch.visual[sample].any() or not rest:
            total = total + sum(losses)
        else:
            halves = [sum(losses[t] for t in part) / len(part) for part in (top, rest)]
            total = total + len(gold) * sum(halves) / 2
    return total
