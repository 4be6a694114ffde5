"""Rollouts: answers that the student writes during its training, and is then trained on (GKD, arXiv 2306.13649).

Which samples get one, and every token of it, are drawn by seed, epoch and sample alone, so that neither ranks, nor
accumulation, nor a resumption change them, to the last near-tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from components.align_ti.ribbon import draw_key
from components.config.study import Rollouts as Asked
from components.dataset.shards import Samples
from components.distill.sampler import Sampler
from components.errors import InputError
from components.models.collate import Collator
from components.models.load import Loaded
from components.models.writing import Writer


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
        asked = self.asked
        self.writer = Writer(
            self.student, self.collator, asked.max_new_tokens, asked.temperature, asked.top_p, self.shared_vocabulary
        )
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
        keys = [draw_key(self.order.seed, "rollout", epoch, sample) for epoch, sample in wanted]
        with self.accelerator.autocast():
            answers = self.writer.write([self.samples[int(sample)] for _, sample in wanted], keys)
        return [answer.tokens for answer in answers]

    def measured(self) -> dict[str, float]:
        """Over all ranks, of the last step's answers: how many, the share of those cut off, their mean length."""
        cut = sum(answer[-1] != self.collator.eos_id for answer in self._answers)
        mine = torch.tensor([len(self._answers), cut, sum(map(len, self._answers))], device=self.accelerator.device)
        answers, cut_off, tokens = self.accelerator.reduce(mine, reduction="sum").tolist()
        means = {"rollout/cut_off": cut_off / answers, "rollout/tokens": tokens / answers} if answers else {}
        return {"rollout/answers": answers, **means}
