"""The ribbon: rows for sampled alternatives at each response step (also: tree or packed alternatives).

At response step k, with gold token y_k at position t + 1, d alternatives c_k1..c_kd are drawn given the prefix up to
position t. An alternative's row attends to that prefix and itself, neither to other alternatives nor to y_k and later; its
position id is y_k's. docs/method.md, "The ribbon". All of it is exact:

- equal draws at a step share one row with a multiplicity;
- a draw equal to y_k reuses y_k's row in the plain pass, which has the same context;
- a drawn EOS has no continuation that the data ever trains, and does not count in the mean.

The only approximation is the cap on a sample's length (`fit`): response steps beyond it are left out, and counted.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from components.align_ti.batch import answers, index_within, predicting, random_cycle

LEFT_OUT = -1  # placeholder for the draws of a response step beyond the cap on the length


@dataclass(frozen=True)
class Ribbon:
    """Packed alternatives of a batch: B samples of T positions, E rows in the longest ribbon."""

    tokens: Tensor  # (B, E) long: distinct alternatives that are neither gold nor EOS
    positions: Tensor  # (B, E) long: position of the gold token that each replaces
    multiplicity: Tensor  # (B, E) float: number of draws; 0 on padding
    gold: Tensor  # (B, T) float: number of draws equal to the gold token at this position
    counted: Tensor  # () float: draws that count, all but EOS and those of steps left out
    steps_left_out: int  # response steps beyond the cap on the length

    @property
    def valid(self) -> Tensor:
        return self.multiplicity > 0


def draw_key(*parts: int | str) -> int:
    """32-bit seed hashed from `parts`, for example a run's seed and a sample's key. torch's CPU generator reads the low 32
    bits alone, hence the hash."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def uniforms(response: Tensor, keys: list[int], draws: int) -> Tensor:
    """(N, d) uniforms in [0, 1) for the N response steps, ordered by (sample, step).

    Each sample has a generator seeded by its key alone, so that its draws do not depend on the split of a batch over devices
    or accumulation steps.
    """
    steps = response.sum(1).tolist()
    per_sample = (
        torch.rand(int(count), draws, generator=torch.Generator().manual_seed(key))
        for key, count in zip(keys, steps, strict=True)
    )
    return torch.cat(list(per_sample)).to(response.device)


def step_priorities(response: Tensor, keys: list[int]) -> Tensor:
    """(N,) uniforms in [0, 1): priority of each response step within its sample, for `fit`. Streams differ from the draws'."""
    return uniforms(response, [-1 - key for key in keys], 1)[:, 0]


def shuffled(draws: Tensor, response: Tensor, keys: list[int]) -> Tensor:
    """(N, d) draws in which each response step has those of another step of its answer (`random_cycle`), seeded by the
    sample's key."""
    return draws[random_cycle(answers(response), uniforms(response, [-2 - key for key in keys], 1)[:, 0])]


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """(N, V) sampling probabilities, sum 1, in the order of transformers' `generate`: logits / temperature, then top-k, then
    nucleus sampling (the smallest set of the most likely tokens whose probabilities reach `top_p`).

    Ranks come from the logits before the temperature: a high one makes probabilities equal in floats.
    """
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k is None and top_p is None:
        return p
    order = logits.topk(p.shape[-1] if top_k is None else min(top_k, p.shape[-1])).indices
    ranked = p.gather(1, order)
    if top_p is not None:
        preceding = ranked.double().cumsum(-1) - ranked
        # A token stays if those before it do not reach top_p, so the most likely one always does.
        ranked = ranked.masked_fill(preceding >= top_p * ranked.double().sum(-1, keepdim=True), 0.0)
    filtered = torch.zeros_like(p).scatter_(1, order, ranked)
    return filtered / filtered.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(N, d) tokens sampled from (N, V) probabilities by inverting their cumulative sums at (N, d) uniforms."""
    cumulative = probabilities.double().cumsum(-1)
    # right=True: a token of probability 0 has an empty interval and is never drawn.
    tokens = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    # NaN probabilities are clamped to a valid id, so that the non-finite check reports them instead of a device-side assert.
    return tokens.clamp_max(probabilities.shape[1] - 1)


def draw_distinct(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """(N, d) tokens sampled without replacement at (N, d) uniforms, each by the `probabilities` of those not drawn yet.

    These are taken from the (N, V) logits anew for each draw: beside a likely token those of all others may be 0 in floats.
    Raises ValueError for more draws than tokens.
    """
    if uniform.shape[1] > logits.shape[1]:
        raise ValueError(f"{uniform.shape[1]} different tokens of {logits.shape[1]} cannot be drawn: draw with replacement")
    columns = []
    for j in range(uniform.shape[1]):
        columns.append(draw(probabilities(logits, temperature, top_k and top_k - j), uniform[:, j : j + 1]))
        logits = logits.scatter(1, columns[-1], -math.inf)
    return torch.cat(columns, dim=1)


def fit(
    draws: Tensor, priorities: Tensor, input_ids: Tensor, attention_mask: Tensor, response: Tensor, eos: int, cap: int
) -> Tensor:
    """(N, d) draws with `LEFT_OUT` at the steps whose rows would exceed `cap` tokens per sample.

    Steps of a sample are accepted in the order of `priorities` (N,) while its tokens plus accepted rows are at most `cap`. The
    choice is random and depends on the sample alone.
    """
    sample, step = predicting(response).nonzero(as_tuple=True)
    order = torch.argsort(sample + priorities.double(), stable=True)  # within each sample, by priority
    rows = _needs_row(draws, input_ids[sample, step + 1], eos).sum(1)[order]
    total = rows.cumsum(0)
    rows_before_sample = (total - rows)[torch.searchsorted(sample, sample)]
    room = cap - attention_mask.sum(1)
    fits = torch.empty_like(sample, dtype=torch.bool)
    fits[order] = total - rows_before_sample <= room[sample]
    return draws.masked_fill(~fits[:, None], LEFT_OUT)


def left_out(draws: Tensor) -> int:
    """Number of response steps marked `LEFT_OUT` in (N, d) draws."""
    return int((draws == LEFT_OUT).all(1).sum())


def counted(draws: Tensor, eos: int) -> Tensor:
    """() float: draws that count in the mean, neither EOS nor left out."""
    return ((draws != eos) & (draws != LEFT_OUT)).sum().float()


def plan(draws: Tensor, input_ids: Tensor, response: Tensor, eos: int) -> Ribbon:
    """Ribbon of (N, d) draws for the N response steps of a batch, ordered by (sample, step).

    Args:
        input_ids: (B, T).
        response: (B, T) bool, true at y_1..y_R, EOS included.
    """
    sample, step = predicting(response).nonzero(as_tuple=True)  # (N,) each
    draws = draws.sort(dim=1).values
    gold = input_ids[sample, step + 1]
    n, j = _needs_row(draws, gold, eos).nonzero(as_tuple=True)  # (M,) the rows to build

    slot = index_within(sample[n])
    shape = (len(input_ids), int(slot.max()) + 1 if len(slot) else 0)
    tokens = input_ids.new_zeros(shape)
    positions = input_ids.new_zeros(shape)
    multiplicity = torch.zeros(shape, device=input_ids.device)
    tokens[sample[n], slot] = draws[n, j]
    positions[sample[n], slot] = step[n] + 1
    multiplicity[sample[n], slot] = (draws[n] == draws[n, j, None]).sum(-1).float()

    gold_draws = torch.zeros(input_ids.shape, device=input_ids.device)
    gold_draws[sample, step + 1] = ((draws == gold[:, None]) & (draws != eos)).sum(1).float()
    return Ribbon(tokens, positions, multiplicity, gold_draws, counted(draws, eos), left_out(draws))


def _needs_row(draws: Tensor, gold: Tensor, eos: int) -> Tensor:
    """(N, d) bool: first of its duplicates, and neither the gold token nor EOS nor left out."""
    first = ~(draws[:, :, None] == draws[:, None, :]).tril(-1).any(-1)
    return first & (draws != gold[:, None]) & (draws != eos) & (draws != LEFT_OUT)


def continuation_mask(ribbon: Ribbon, attention_mask: Tensor) -> Tensor:
    """(B, 1, E, T + E) bool attention mask of the ribbon's rows over the plain pass's key/value cache.

    Padding rows attend to themselves alone, so that no softmax is empty.
    """
    T, E = attention_mask.shape[1], ribbon.tokens.shape[1]
    index = torch.arange(T, device=attention_mask.device)
    prefix = (index < ribbon.positions[:, :, None]) & attention_mask[:, None, :].bool() & ribbon.valid[:, :, None]
    itself = torch.eye(E, dtype=torch.bool, device=attention_mask.device).expand(len(prefix), E, E)
    return torch.cat([prefix, itself], dim=2)[:, None]


def expanded_mask(ribbon: Ribbon, attention_mask: Tensor) -> Tensor:
    """(B, 1, T + E, T + E) bool attention mask of one pass over the sequence with the ribbon appended.

    Gold rows are causal and never attend to a ribbon row.
    """
    B, T = attention_mask.shape
    E = ribbon.tokens.shape[1]
    index = torch.arange(T, device=attention_mask.device)
    causal = (index[None, :] <= index[:, None]) & attention_mask[:, None, :].bool()
    causal = causal | torch.eye(T, dtype=torch.bool, device=causal.device)  # padding rows attend to themselves
    gold = torch.cat([causal, causal.new_zeros(B, T, E)], dim=2)
    return torch.cat([gold[:, None], continuation_mask(ribbon, attention_mask)], dim=2)
