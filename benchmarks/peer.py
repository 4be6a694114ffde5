"""The KD-only step of TRL 1.16.0's DistillationTrainer on the benchmark's own models, batch and optimiser.

TRL distils on the student's generations; here its trainer receives the batch's responses instead, so that no generation is
timed and the loss is the same number. Timed are its `training_step` - both backbones, its chunked divergence (beta = 0, forward
KL), backward - and clipping and AdamW as in the other arms. Its loop, logging and data loading are left out, to its advantage.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Work
from benchmarks.reference import twin
from benchmarks.shapes import EOS, PAD, samples, trl_inputs

if TYPE_CHECKING:
    from benchmarks.step import Bench

TOLERANCE = 1e-4


def arm(bench: Bench) -> Work:
    """The step to time. Raises ImportError without TRL, ValueError if TRL refuses the pair or computes another loss."""
    student, peer_trainer = bench.student.model, trainer(bench)
    inputs = trl_inputs(samples(bench.size), int(bench.batch.response.sum()), bench.device)
    trl_loss = float(peer_trainer.compute_loss(student, inputs).detach())
    our_loss, _ = bench.gradients(bench.engine("kd_only"))
    if abs(our_loss - trl_loss) > TOLERANCE * abs(our_loss):
        raise ValueError(f"TRL's loss is {trl_loss}, ours {our_loss}: not the same work")

    def step() -> None:
        peer_trainer.training_step(student, inputs, None)
        bench.update()

    return step


def trainer(bench: Bench) -> Any:
    """TRL's trainer, with batches passed on as they are. Raises ImportError without TRL, ValueError if it refuses the pair."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"pip install trl==1.16.0 ({error})") from error
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    if bench.size.student.vocabulary != bench.size.teacher.vocabulary:
        raise ValueError("TRL refuses heads of different sizes")

    class PreparedInputsTrainer(trl.DistillationTrainer):  # type: ignore[misc]
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return generation_batch

    tokenizer = Tokenizer(WordLevel({"<pad>": PAD, "<eos>": EOS}, unk_token="<pad>"))
    trl_trainer = PreparedInputsTrainer(
        model=bench.student.model,
        teacher_model=twin(bench.teacher.vlm.model, "sdpa"),
        args=trl.DistillationConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=bench.size.batch,
            bf16=bench.size.bf16,
            gradient_checkpointing=False,
            use_cpu=bench.device.type == "cpu",
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["nothing"]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        optimizers=(bench.optimiser, None),
    )
    trl_trainer.current_gradient_accumulation_steps = 1
    return trl_trainer
