"""The ribbon: rows for the alternatives that a model might have said at each response step.

At response step k, whose gold token y_k sits at position t + 1, d alternatives c_k1..c_kd are drawn given the prefix up to
position t. An alternative row sees that prefix and itself, neither other alternatives nor y_k and later; its position id
is y_k's. docs/method.md, "The ribbon". Nothing here is approximate:

- equal draws at a step are one row with a multiplicity;
- a draw equal to y_k needs no row of its own, for y_k's own row in the plain pass has the same context;
- a drawn EOS has no continuation that the data ever trains: it is left out of the mean.

Only a cap on a sample's length is an approximation (`fit`): response steps that do not fit are left out, and counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from components.align_ti.batch import predicting

LEFT_OUT = -1  # stands in place of the draws of a response step that a cap on the length leaves out


@dataclass(frozen=True)
class Ribbon:
    """What a batch's draws come to. B samples of T positions, E rows in the longest sample."""

    tokens: Tensor  # (B, E) long: the distinct alternatives that are neither gold nor EOS
    positions: Tensor  # (B, E) long: position of the gold token that each stands in for
    multiplicity: Tensor  # (B, E) float: how often it was drawn; 0 on padding
    gold: Tensor  # (B, T) float: how often the gold token at this position was drawn
    counted: Tensor  # () float: draws that count, i.e. all but EOS and those of steps left out
    steps_left_out: int  # response steps beyond the cap on the length

    @property
    def valid(self) -> Tensor:
        return self.multiplicity > 0


def draw_key(*what: int | str) -> int:
    """32 bits: the seed of the draws of `what`, a run's seed and a sample's key, say. Hashed: torch's CPU generator reads the
    low 32 bits alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode()).digest()[:4], "big")


def uniforms(response: Tensor, keys: list[int], draws: int) -> Tensor:
    """(N, d) uniforms in [0, 1) for the N response steps, in order of (sample, step).

    Each sample has its own stream, seeded by its key alone, so that what is drawn for it does not depend on how a batch is
    split over devices or accumulation steps.
    """
    steps = response.sum(1).tolist()
    streams = (
        torch.rand(int(count), draws, generator=torch.Generator().manual_seed(key))
        for key, count in zip(keys, steps, strict=True)
    )
    return torch.cat(list(streams)).to(response.device)


def places(response: Tensor, keys: list[int]) -> Tensor:
    """(N,) uniforms in [0, 1): each response step's place in its sample's line, for `fit`. Other streams than the draws'."""
    return uniforms(response, [-1 - key for key in keys], 1)[:, 0]


def shuffled(draws: Tensor, response: Tensor, keys: list[int]) -> Tensor:
    """(N, d) draws of each response's steps, in another order by its sample's key."""
    lines = uniforms(response, [-2 - key for key in keys], 1)[:, 0].split(response.sum(1).tolist())
    parts = draws.split(response.sum(1).tolist())
    return torch.cat([part[line.argsort(stable=True)] for part, line in zip(parts, lines, strict=True)])


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """(N, V) probabilities to draw from, in the order that `generate` of transformers has: logits / temperature, then the
    `top_k` most likely tokens, then the smallest set of the most likely whose probabilities reach `top_p`. They sum to 1.

    The tokens are ranked before the temperature, whose height makes their probabilities equal but not the ranks.
    """
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k is None and top_p is None:
        return p
    order = logits.topk(p.shape[-1] if top_k is None else min(top_k, p.shape[-1])).indices
    ranked = p.gather(1, order)
    if top_p is not None:
        before = ranked.double().cumsum(-1) - ranked
        # A token stays if those before it do not reach top_p, so the most likely one always does.
        ranked = ranked.masked_fill(before >= top_p * ranked.double().sum(-1, keepdim=True), 0.0)
    kept = torch.zeros_like(p).scatter_(1, order, ranked)
    return kept / kept.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor, replacement: bool = True) -> Tensor:
    """(N, d) tokens drawn from (N, V) probabilities by inverting their cumulative sums at (N, d) uniforms.

    Without replacement, a drawn token's probability becomes 0 before the next draw of that step.
    Raises ValueError if fewer than d tokens have a positive probability and draws are without replacement.
    """
    if replacement:
        return _invert(probabilities, uniform)
    if bool(((probabilities > 0).sum(-1) < uniform.shape[1]).any()):
        raise ValueError(f"fewer than {uniform.shape[1]} tokens have a positive probability: draw with replacement")
    left = probabilities.clone()
    columns = []
    for j in range(uniform.shape[1]):
        columns.append(_invert(left, uniform[:, j : j + 1]))
        left.scatter_(1, columns[-1], 0.0)
    return torch.cat(columns, dim=1)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    cumulative = probabilities.double().cumsum(-1)
    # right=True: a token of probability 0 has an empty interval and is never drawn.
    found = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    # NaN probabilities are clamped to a valid id, so that the non-finite check reports them instead of a device-side assert.
    return found.clamp_max(probabilities.shape[1] - 1)


def fit(
    draws: Tensor, places: Tensor, input_ids: Tensor, attention_mask: Tensor, response: Tensor, eos: int, cap: int
) -> Tensor:
    """The (N, d) draws with `LEFT_OUT` at the steps whose rows would make their sample longer than `cap` tokens.

    A sample's steps are taken in the order of `places` (N,) for as long as its own tokens and all rows taken so far are at
    most `cap`. So which of them are left out is random, and depends on the sample alone.
    """
    sample, step = predicting(response).nonzero(as_tuple=True)
    line = torch.argsort(sample + places.double(), stable=True)  # within each sample, by place
    rows = _needs_row(draws, input_ids[sample, step + 1], eos).sum(1)[line]
    total = rows.cumsum(0)
    before_sample = (total - rows)[torch.searchsorted(sample, sample)]
    room = cap - attention_mask.sum(1)
    fits = torch.empty_like(sample, dtype=torch.bool)
    fits[line] = total - before_sample <= room[sample]
    return draws.masked_fill(~fits[:, None], LEFT_OUT)


def left_out(draws: Tensor) -> int:
    """Response steps that a cap on the length left out of (N, d) draws."""
    return int((draws == LEFT_OUT).all(1).sum())


def counted(draws: Tensor, eos: int) -> Tensor:
    """() float: draws that count in the mean."""
    return ((draws != eos) & (draws != LEFT_OUT)).sum().float()


def plan(draws: Tensor, input_ids: Tensor, response: Tensor, eos: int) -> Ribbon:
    """Turn (N, d) draws for the N response steps of a batch, in order of (sample, step), into rows.

    Args:
        input_ids: (B, T).
        response: (B, T), true at y_1..y_R, EOS included.
    """
    sample, step = predicting(response).nonzero(as_tuple=True)  # (N,) each
    draws = draws.sort(dim=1).values
    gold = input_ids[sample, step + 1]
    n, j = _needs_row(draws, gold, eos).nonzero(as_tuple=True)  # (M,) the rows to build

    slot = _rank_within(sample[n])
    shape = (len(input_ids), int(slot.max()) + 1 if len(slot) else 0)
    tokens = input_ids.new_zeros(shape)
    positions = input_ids.new_zeros(shape)
    multiplicity = torch.zeros(shape, device=input_ids.device)
    tokens[sample[n], slot] = draws[n, j]
    positions[sample[n], slot] = step[n] + 1
    multiplicity[sample[n], slot] = (draws[n] == draws[n, j, None]).sum(-1).float()

    hits = torch.zeros(input_ids.shape, device=input_ids.device)
    hits[sample, step + 1] = ((draws == gold[:, None]) & (draws != eos)).sum(1).float()
    return Ribbon(tokens, positions, multiplicity, hits, counted(draws, eos), left_out(draws))


def _needs_row(draws: Tensor, gold: Tensor, eos: int) -> Tensor:
    """(N, d) bool: the first of its equals, and neither the gold token nor EOS nor left out."""
    first = ~(draws[:, :, None] == draws[:, None, :]).tril(-1).any(-1)
    return first & (draws != gold[:, None]) & (draws != eos) & (draws != LEFT_OUT)


def _rank_within(groups: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal values of a sorted (M,) tensor."""
    index = torch.arange(len(groups), device=groups.device)
    starts = torch.ones_like(groups, dtype=torch.bool)
    starts[1:] = groups[1:] != groups[:-1]
    return index - torch.where(starts, index, 0).cummax(0).values if len(groups) else index


def continuation_mask(ribbon: Ribbon, attention_mask: Tensor) -> Tensor:
    """(B, 1, E, T + E) bool: what each ribbon row may see when it continues over the plain pass's key/value cache.

    Padding rows see themselves alone, so that no softmax is over nothing.
    """
    T, E = attention_mask.shape[1], ribbon.tokens.shape[1]
    index = torch.arange(T, device=attention_mask.device)
    prefix = (index < ribbon.positions[:, :, None]) & attention_mask[:, None, :].bool() & ribbon.valid[:, :, None]
    itself = torch.eye(E, dtype=torch.bool, device=attention_mask.device).expand(len(prefix), E, E)
    return torch.cat([prefix, itself], dim=2)[:, None]


def expanded_mask(ribbon: Ribbon, attention_mask: Tensor) -> Tensor:
    """(B, 1, T + E, T + E) bool: the same for one pass over the sequence with the ribbon appended to it.

    Gold rows are causal and never see a ribbon row.
    """
    B, T = attention_mask.shape
    E = ribbon.tokens.shape[1]
    index = torch.arange(T, device=attention_mask.device)
    causal = (index[None, :] <= index[:, None]) & attention_mask[:, None, :].bool()
    causal = causal | torch.eye(T, dtype=torch.bool, device=causal.device)  # padding rows see themselves
    gold = torch.cat([causal, causal.new_zeros(B, T, E)], dim=2)
    return torch.cat([gold[:, None], continuation_mask(ribbon, attention_mask)], dim=2)
