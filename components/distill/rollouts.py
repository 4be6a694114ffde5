"""Rollouts: answers that the student writes during its training, and is then trained on (GKD, arXiv 2306.13649).

Which samples get one, and every token of it, are drawn by seed, epoch and sample alone, so that neither ranks, nor
accumulation, nor a resumption change them, to the last near-tie. As in the data, no special token stands in an answer but
its end, and the tokens are those of the shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from components.align_ti.ribbon import draw, probabilities
from components.config.study import Rollouts as Asked
from components.dataset.shards import Samples
from components.distill.sampler import Sampler, draw_key
from components.errors import InputError
from components.models.collate import Collator, visual_id
from components.models.decoding import greedy
from components.models.families import prompt
from components.models.load import Loaded
from components.models.template import special_tokens


@dataclass
class Rollouts:
    """The answers of one rank's student, written when a step asks for them.

    Args:
        asked: the arm's block.
        shared_vocabulary: columns of both heads.
        kept: sample -> the first epoch of those that its answer serves, the answer; for a checkpoint, where `reuse` is above 1.

    Raises InputError if the student's weights are not whole on this rank.
    """

    asked: Asked
    student: Loaded
    collator: Collator
    samples: Samples
    order: Sampler
    shared_vocabulary: int
    accelerator: Accelerator
    kept: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise InputError(
                f"rollouts are written with a student whose weights are whole, and {self.accelerator.distributed_type.value}"
                " divides them: set `accelerate` in params/runtime.yaml to ddp"
            )
        self._prompts = self.collator.of_prompts
        tokenizer = self.student.processor.tokenizer
        self._barred = torch.arange(self.student.vocabulary, device=self.accelerator.device) >= self.shared_vocabulary
        special = tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))
        self._barred[[*special, visual_id(self.student.processor)]] = True
        self._barred[self.collator.eos_id] = False
        self._answers: list[list[int]] = []

    def written(self, pairs: list[tuple[int, int]]) -> dict[int, list[int]]:
        """Key -> tokens of the student's answer, its end included, for those of the (key, sample) pairs that get one.

        Every rank calls it once per step.
        """
        wanted = {key: (self.order.epoch(key), sample) for key, sample in pairs if self._on_policy(key, sample)}
        served = {key: (epoch - epoch % self.asked.reuse, str(sample)) for key, (epoch, sample) in wanted.items()}
        known = {key: self.kept[sample][1] for key, (epoch, sample) in served.items() if self._serves(epoch, sample)}
        anew = [key for key in wanted if key not in known]
        answers = dict(zip(anew, self._write([served[key] for key in anew]), strict=True)) if anew else {}
        if self.asked.reuse > 1:
            fresh = [(served[key], answer) for key, answer in answers.items()]
            for (epoch, sample), answer in gather_object(fresh) if self.accelerator.num_processes > 1 else fresh:
                self.kept[sample] = (epoch, answer)
        found = {key: known.get(key) or answers[key] for key in wanted}
        self._answers = list(found.values())
        return found

    def _on_policy(self, key: int, sample: int) -> bool:
        return draw_key(self.order.seed, "on-policy", self.order.epoch(key), sample) < self.asked.share * 2**32

    def _serves(self, epoch: int, sample: str) -> bool:
        return self.asked.reuse > 1 and sample in self.kept and self.kept[sample][0] == epoch

    def _write(self, wanted: list[tuple[int, str]]) -> list[list[int]]:
        """Answers to the first questions of the samples, all in one batch over the key/value cache."""
        asked, eos = self.asked, self.collator.eos_id
        batch = self._prompts([self.samples[int(sample)] for _, sample in wanted]).to(self.accelerator.device)
        keys = [draw_key(self.order.seed, "rollout", epoch, sample) for epoch, sample in wanted]
        streams = [torch.rand(asked.max_new_tokens, generator=torch.Generator().manual_seed(key)) for key in keys]
        length = batch.input_ids.shape[1]
        drawn = Drawn(torch.stack(streams).to(self._barred.device), self._barred, length, asked.temperature, asked.top_p)
        training = self.student.model.training
        self.student.model.eval()
        with greedy(self.student, asked.max_new_tokens, eos) as model, self.accelerator.autocast():
            tokens = model.generate(**prompt(model, batch), logits_processor=LogitsProcessorList([drawn]))  # type: ignore[operator]
        self.student.model.train(training)
        room = (self.collator.max_length - batch.attention_mask.sum(1)).tolist()
        return [_ended(row, eos)[:most] for row, most in zip(tokens[:, length:].tolist(), room, strict=True)]

    def measured(self) -> dict[str, float]:
        """Over all ranks, of the last step's answers: how many, the share of those cut off, their mean length."""
        cut = sum(answer[-1] != self.collator.eos_id for answer in self._answers)
        mine = torch.tensor([len(self._answers), cut, sum(map(len, self._answers))], device=self.accelerator.device)
        answers, cut_off, tokens = self.accelerator.reduce(mine, reduction="sum").tolist()
        means = {"rollout/cut_off": cut_off / answers, "rollout/tokens": tokens / answers} if answers else {}
        return {"rollout/answers": answers, **means}


class Drawn(LogitsProcessor):
    """Leaves each sample the one token that its uniform draws, by inverting the cumulative sum; the likeliest at temperature 0.

    Args:
        uniforms: (B, most) in [0, 1), one per token to write.
        barred: (V,) bool, tokens that are never drawn.
        prompt: tokens of the prompts, padding included.
    """

    def __init__(self, uniforms: Tensor, barred: Tensor, prompt: int, temperature: float, top_p: float | None) -> None:
        self._uniforms, self._barred, self._prompt = uniforms, barred, prompt
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        logits = scores.float().masked_fill(self._barred, float("-inf"))
        if self._temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            at = input_ids.shape[1] - self._prompt
            token = draw(probabilities(logits, self._temperature, top_p=self._top_p), self._uniforms[:, at : at + 1])
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


def _ended(tokens: list[int], eos: int) -> list[int]:
    """Up to the first end of turn, which is included."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
