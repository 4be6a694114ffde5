"""Attribution of an answer to input tokens: gradients at points between the input's and a baseline's embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.align_ti.batch import Batch, predicting
from components.align_ti.head import CHUNK_MIB, row_losses, rows_per_chunk
from components.models.vlm import VLM


def attributions(
    vlm: VLM, batch: Batch, features: Any, baseline: dict[str, Any], mixing: Tensor, shared: int | None = None
) -> Tensor:
    """(B, T) gradients ds/dm_j = (e_j - b_j) ds/de_j of s, the mean log-probability of a sample's response tokens, with token j
    embedded as b_j + m_j (e_j - b_j): b_j from `baseline` (see `VLM.embedded`), e_j its own embedding. 0 at padding.

    Args:
        mixing: (B, T) m.
        shared: columns of the head.
    """
    rows = predicting(batch.response)
    gold, chunk_rows = batch.input_ids[:, 1:][batch.response[:, 1:]], rows_per_chunk(len(vlm.head.weight), CHUNK_MIB)

    def token_losses(chunk: slice, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :shared], gold[chunk], reduction="none")

    with torch.enable_grad():
        m = mixing.detach().clone().requires_grad_()
        losses = row_losses(vlm.mixed(batch, features, baseline, m)[rows], vlm.head, token_losses, chunk_rows)
        sample_index = rows.nonzero()[:, 0]
        (gradients,) = torch.autograd.grad((losses / rows.sum(1)[sample_index]).sum() + m.sum() * 0.0, m)
    return -gradients
