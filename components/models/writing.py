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
from components.models.chat_template import special_tokens
from components.models.collate import Collator
from components.models.decoding import greedy
from components.models.families import prompt
from components.models.image_processor import visual_id
from components.models.load import Loaded


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
        self.loaded, self.max_new_tokens, self.temperature, self.top_p = loaded, max_new_tokens, temperature, top_p
        self.eos_id, self._max_length, self._prompts = collator.eos_id, collator.max_length, collator.of_prompts
        self._readers = [reader.of_prompts for reader in readers]
        tokenizer = loaded.processor.tokenizer
        self.barred = torch.arange(loaded.vocabulary, device=loaded.model.device) >= shared_vocabulary
        special = tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))
        self.barred[[*special, visual_id(loaded.processor)]] = True
        self.barred[self.eos_id] = False

    def write(self, samples: Sequence[Sample], keys: Sequence[int]) -> list[list[Answer]]:
        """Answers to the questions of each sample of a batch, each after the previous ones, without dropout.

        A conversation ends early after an answer that was cut off, before a question whose images change the tokens of those
        before (LLaVA-OneVision's tiles), or where `max_length` leaves no room; it may be empty. `keys`: seed of each sample's
        draws.
        """
        generators = [torch.Generator().manual_seed(key) for key in keys]
        answers: list[list[Answer]] = [[] for _ in samples]
        active = list(range(len(samples)))
        while active:
            previous = [[answer.tokens for answer in answers[i]] for i in active]
            new_answers = self._answers([samples[i] for i in active], previous, [generators[i] for i in active])
            for i, answer in zip(active, new_answers, strict=True):
                answers[i] += [answer] if answer.tokens else []
            finished = [i for i, answer in zip(active, new_answers, strict=True) if answer.tokens[-1:] == [self.eos_id]]
            active = [i for i in finished if self._continues(samples[i], len(answers[i]))]
        return answers

    def _continues(self, sample: Sample, turns: int) -> bool:
        """Whether a question follows the first `turns`, after which their images have the same tokens."""
        if turns == len(sample.turns):
            return False
        texts_before, texts_after = (self._prompts.image_texts(sample.upto(count)) for count in (turns, turns + 1))
        return texts_after[: len(texts_before)] == texts_before

    def _answers(
        self, samples: Sequence[Sample], previous: Sequence[Sequence[Sequence[int]]], generators: Sequence[torch.Generator]
    ) -> list[Answer]:
        """One answer of each sample, with a key/value cache, to the question after the answers `previous`."""
        model = self.loaded.model
        batch = self._prompts(samples, previous).to(model.device)
        uniforms = torch.stack([torch.rand(self.max_new_tokens, generator=generator) for generator in generators])
        length = batch.input_ids.shape[1]
        sampler = TokenSampler(uniforms.to(model.device), self.barred, length, self.temperature, self.top_p)
        training = model.training
        model.eval()
        with greedy(self.loaded, self.max_new_tokens, self.eos_id):
            tokens = model.generate(**prompt(model, batch), logits_processor=LogitsProcessorList([sampler]))
        model.train(training)
        lengths = [
            prompts.attention_mask.sum(1) for prompts in (batch, *(reader.text(samples, previous) for reader in self._readers))
        ]
        remaining = (self._max_length - torch.stack([tensor.cpu() for tensor in lengths]).amax(0)).tolist()
        rows = [
            _truncate_at_eos(row, self.eos_id)[: max(limit, 0)]
            for row, limit in zip(tokens[:, length:].tolist(), remaining, strict=True)
        ]
        log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
        return [Answer(row, sum(row_log_probs[: len(row)])) for row, row_log_probs in zip(rows, log_probs, strict=True)]


@dataclass(eq=False)
class TokenSampler(LogitsProcessor):
    """Logits processor that leaves one token per sample: inverse-CDF sampling by given uniforms, or argmax at temperature 0."""

    uniforms: Tensor  # (B, most) in [0, 1), one per new token
    barred: Tensor  # (V,) bool, tokens of probability 0
    prompt_length: int  # length of the prompts, padding included
    temperature: float
    top_p: float | None
    log_probs: list[Tensor] = field(default_factory=list)  # (B,) per step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        logits = scores.float().masked_fill(self.barred, float("-inf"))
        if self.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            step = input_ids.shape[1] - self.prompt_length
            token = draw(probabilities(logits, self.temperature, top_p=self.top_p), self.uniforms[:, step : step + 1])
        self.log_probs.append(scores.float().log_softmax(-1).gather(1, token)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


def _truncate_at_eos(tokens: list[int], eos: int) -> list[int]:
    """Tokens up to the first EOS, inclusive."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
