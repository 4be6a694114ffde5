"""Plain reference of the same loss: eager attention, full logits, d interleaved rows before every response token.

The layout is that of the paper's released code ([c_k1 .. c_kd y_k] in place of y_k). The engine is compared with it for
equality of loss and gradients, and then for time and memory. The method: docs/method.md.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from components.align_ti.batch import Batch


def twin(model: Any, implementation: str) -> Any:
    """Copy of the model with shared parameters and buffers, on another attention implementation."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation(implementation)
    return other


def terms(student: Any, teacher: Any, batch: Batch, draws: Tensor, layer: int, eos: int) -> Tensor:
    """Loss terms (4,): means of sft, kd, iva, tpa of two LLaVA models on eager attention, given (N, d) draws.

    A sampling pass runs first and is discarded: a step of the released layout needs one before its main pass.
    """
    _sample(student, batch, draws.shape[1])
    ids, positions, alternative, gold_index = interleave(batch, draws)
    mask = _mask(positions, alternative, gold_index, batch.attention_mask)
    student_logits = _forward(student, ids, batch, mask, positions).logits.float()
    with torch.no_grad():
        teacher_output = _forward(teacher, ids, batch, mask, positions, output_attentions=True)
    teacher_logits = teacher_output.logits.float()
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_s, log_t = student_logits[..., :shared].log_softmax(-1), teacher_logits[..., :shared].log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)  # (B, L), at every row

    sample, position = batch.response.nonzero(as_tuple=True)
    previous = gold_index[sample, position - 1]  # the row that predicts y_k, its own logits over its own whole vocabulary
    targets = batch.input_ids[sample, position]
    sft = -student_logits.log_softmax(-1)[sample, previous].gather(1, targets[:, None]).mean()
    counted_rows = alternative & (ids != eos)
    return torch.stack(
        [
            sft,
            kl[sample, previous].mean(),
            _iva(kl, gold_index, teacher_output.attentions[layer], batch),
            kl[counted_rows].mean(),
        ]
    )


def interleave(batch: Batch, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put d alternatives before every response token. L is the longest expanded sample.

    Returns:
        (B, L) tokens; (B, L) positions, an alternative's equal to its gold token's; (B, L) bool mask of alternatives;
        (B, T) index in L of each token of the batch.
    """
    rows, gold_index, step = [], torch.zeros_like(batch.input_ids), 0
    for b, tokens in enumerate(batch.input_ids.tolist()):
        row: list[tuple[int, int, bool]] = []
        for t, token in enumerate(tokens):
            if batch.response[b, t]:
                row += [(draw, t, True) for draw in draws[step].tolist()]
                step += 1
            gold_index[b, t] = len(row)
            row.append((token, t, False))
        rows.append(row)
    longest = max(map(len, rows))
    filled = [row + [(0, batch.input_ids.shape[1], False)] * (longest - len(row)) for row in rows]
    table = torch.tensor([[list(map(int, cell)) for cell in row] for row in filled], device=gold_index.device)
    return table[..., 0], table[..., 1], table[..., 2].bool(), gold_index


def _mask(positions: Tensor, alternative: Tensor, gold_index: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, 1, L, L) bool: gold rows attend to gold rows up to themselves, an alternative to those before it and itself."""
    real = torch.zeros_like(alternative).scatter(1, gold_index, attention_mask.bool())
    earlier = positions[:, None, :] < positions[:, :, None]
    itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
    allowed = (earlier & real[:, None, :]) | itself
    return allowed[:, None]


def _forward(model: Any, ids: Tensor, batch: Batch, mask: Tensor, positions: Tensor, **options: Any) -> Any:
    dtype = next(model.parameters()).dtype
    additive_mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return model(
        input_ids=ids,
        pixel_values=None if batch.pixel_values is None else batch.pixel_values.to(dtype),
        attention_mask=additive_mask,  # eager attention would add True as 1
        position_ids=positions,
        use_cache=False,
        **options,
    )


@torch.no_grad()
def _sample(student: Any, batch: Batch, draws: int) -> Tensor:
    logits = student(input_ids=batch.input_ids, pixel_values=batch.pixel_values, use_cache=False).logits.float()
    return torch.multinomial(logits[:, :-1][batch.response[:, 1:]].softmax(-1), draws, replacement=True)


def _iva(kl: Tensor, gold_index: Tensor, maps: Tensor, batch: Batch) -> Tensor:
    """Mean over images of sum_i w_i kl_i, w from the (B, H, L, L) attention maps of the teacher's layer."""
    images = []
    for b in range(len(kl)):
        rows, columns = gold_index[b, batch.instruction[b]], gold_index[b, batch.visual[b]]
        weights = maps[b].float().mean(0)[rows][:, columns].mean(0)
        images.append((weights / weights.sum() * kl[b, columns]).sum())
    return torch.stack(images).mean()
