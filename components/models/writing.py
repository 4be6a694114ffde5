"""Sampled answers to the questions of each sample, one seed per conversation, for training on their tokens.

As in the data, EOS is the only special token of an answer, and all tokens are of the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from components.align_ti.ribbon import draw, probabilities
from components.dataset.shards import Sample
from components.models.collate import Collator, visual_id
from components.models.decoding import greedy
from components.models.families import prompt
from components.models.load import Loaded
from components.models.template import special_tokens


@dataclass(frozen=True)
class Answer:
    tokens: list[int]  # token ids, EOS included where the answer was not cut off
    log_prob: float  # sum over `tokens`, at temperature 1 and over the model's whole vocabulary


class Writer:
    """Batched generation of conversations: at most `max_new_tokens` per answer, within the `max_length` of all collators.

    Args:
        collator: the writer's own.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus: the fewest tokens whose probabilities reach this.
        shared_vocabulary: columns that both heads have.
        readers: collators of other models that the conversations have to fit: an image may have more tokens there.
    """

    def __init__(
        self,
        loaded: Loaded,
        collator: Collator,
        max_new_tokens: int,
        temperature: float,
        top_p: float | None,
        shared_vocabulary: int,
        readers: Sequence[Collator] = (),
    ) -> None:
        self.loaded, self.most, self.temperature, self.top_p = loaded, max_new_tokens, temperature, top_p
        self.eos_id, self._longest, self._prompts = collator.eos_id, collator.max_length, collator.of_prompts
        self._readers = [reader.of_prompts for reader in readers]
        tokenizer = loaded.processor.tokenizer
        self.barred = torch.arange(loaded.vocabulary, device=loaded.model.device) >= shared_vocabulary
        special = tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))
        self.barred[[*special, visual_id(loaded.processor)]] = True
        self.barred[self.eos_id] = False

    def write(self, samples: Sequence[Sample], keys: Sequence[int]) -> list[list[Answer]]:
        """Answers to the questions of each sample of a batch, each after those before it, without dropout.

        A conversation ends early after an answer that was cut off, before a question whose images change the tokens of those
        before (LLaVA-OneVision's tiles), or where `max_length` leaves no room; it may be empty. `keys`: seed of each sample's
        draws.
        """
        streams = [torch.Generator().manual_seed(key) for key in keys]
        said: list[list[Answer]] = [[] for _ in samples]
        going = list(range(len(samples)))
        while going:
            before = [[answer.tokens for answer in said[i]] for i in going]
            answers = self._answers([samples[i] for i in going], before, [streams[i] for i in going])
            for i, answer in zip(going, answers, strict=True):
                said[i] += [answer] if answer.tokens else []
            ended = [i for i, answer in zip(going, answers, strict=True) if answer.tokens[-1:] == [self.eos_id]]
            going = [i for i in ended if self._goes_on(samples[i], len(said[i]))]
        return said

    def _goes_on(self, sample: Sample, turns: int) -> bool:
        """Whether a question follows the first `turns`, after which their images have the same tokens."""
        if turns == len(sample.turns):
            return False
        before, after = (self._prompts.texts_of(sample.upto(count)) for count in (turns, turns + 1))
        return after[: len(before)] == before

    def _answers(
        self, samples: Sequence[Sample], before: Sequence[Sequence[Sequence[int]]], streams: Sequence[torch.Generator]
    ) -> list[Answer]:
        """One answer of each sample, with a key/value cache, to the question after the answers `before`."""
        model = self.loaded.model
        batch = self._prompts(samples, before).to(model.device)
        uniforms = torch.stack([torch.rand(self.most, generator=stream) for stream in streams])
        length = batch.input_ids.shape[1]
        drawn = Drawn(uniforms.to(model.device), self.barred, length, self.temperature, self.top_p)
        training = model.training
        model.eval()
        with greedy(self.loaded, self.most, self.eos_id):
            tokens = model.generate(**prompt(model, batch), logits_processor=LogitsProcessorList([drawn]))
        model.train(training)
        lengths = [prompts.attention_mask.sum(1) for prompts in (batch, *(one.text(samples, before) for one in self._readers))]
        room = (self._longest - torch.stack([each.cpu() for each in lengths]).amax(0)).tolist()
        found = [_ended(row, self.eos_id)[: max(most, 0)] for row, most in zip(tokens[:, length:].tolist(), room, strict=True)]
        log_probs = torch.stack(drawn.log_probs, dim=1).tolist()
        return [Answer(row, sum(of_row[: len(row)])) for row, of_row in zip(found, log_probs, strict=True)]


@dataclass(eq=False)
class Drawn(LogitsProcessor):
    """Logits processor that leaves one token per sample: inverse-CDF sampling by given uniforms, or argmax at temperature 0."""

    uniforms: Tensor  # (B, most) in [0, 1), one per new token
    barred: Tensor  # (V,) bool, tokens of probability 0
    prompt: int  # length of the prompts, padding included
    temperature: float
    top_p: float | None
    log_probs: list[Tensor] = field(default_factory=list)  # (B,) per step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        logits = scores.float().masked_fill(self.barred, float("-inf"))
        if self.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            at = input_ids.shape[1] - self.prompt
            token = draw(probabilities(logits, self.temperature, top_p=self.top_p), self.uniforms[:, at : at + 1])
        self.log_probs.append(scores.float().log_softmax(-1).gather(1, token)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


def _ended(tokens: list[int], eos: int) -> list[int]:
    """Tokens up to the first EOS, inclusive."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
