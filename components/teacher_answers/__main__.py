"""Stage `write_answers`: teacher-generated answers to the questions of each training sample, for sequence-level KD.

python -m components.teacher_answers     artifacts/{dataset,models,rows,teacher} -> artifacts/answers

With teacher_answers: null in params/distill.yaml the manifest records that there are none. Source: arXiv 1606.07947.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from components.config.load import load_settings
from components.config.settings import Settings
from components.io import sha256, write_text
from components.process import exit_from
from components.records.models import ModelIndex
from components.records.paths import ANSWERS, DATASET, MODELS, ROWS, TEACHER
from components.records.record import jsonl
from components.records.teacher import TeacherChoice
from components.records.teacher_answers import Answered, AnswerFacts, AnswerManifest, AnswerSet
from components.tracking.resumable import resumable

if TYPE_CHECKING:
    import torch

    from components.dataset.shards import Samples
    from components.models.writing import Writer

PART = 1024  # samples per file, the unit of resume


def main() -> None:
    settings = load_settings()
    from components.tracking.stage_run import stage_run

    asked = settings.distill.teacher_answers
    with stage_run("write_answers", runtime=settings.runtime, params=asked.model_dump() if asked else {}) as run:
        if asked is None:
            shutil.rmtree(ANSWERS, ignore_errors=True)
            AnswerManifest(written=None).write(ANSWERS / "manifest.json")
            print("write_answers: nothing to do, params/distill.yaml:teacher_answers is null")
            return
        made = make(settings)
        run.metrics({name: getattr(made, name) for name in ("answers", "cut_off", "without", "tokens", "log_prob")})
    print(
        f"write_answers: {made.answers:,} answers to {made.samples:,} samples, {made.cut_off:,} cut off and not kept,"
        f" {made.without:,} samples without any; {made.tokens:.1f} tokens and {made.log_prob:.2f} nats a token on"
        f" average -> {ANSWERS}"
    )


def make(settings: Settings) -> AnswerSet:
    """Generate the answers, resuming an interrupted run, and move them into place.

    Raises:
        ModelError: teacher and students are incompatible (`check_pair`).
        TryAgainError: another process holds the lock.
    """
    from components.runtime import prepare_torch
    from components.teacher_answers.store import facts

    device = prepare_torch(settings.runtime, 0, settings.distill.precision)
    wanted = facts(settings)
    with resumable(ANSWERS, wanted, "components.teacher_answers.__main__") as draft:
        return _fill(draft, settings, wanted, device)


def _fill(folder: Path, settings: Settings, wanted: AnswerFacts, device: torch.device) -> AnswerSet:
    """Write answer files and manifest into `folder`."""
    import torch
    from tqdm import tqdm

    from components.dataset.shards import CAPTION, Samples
    from components.models.collate import Collator
    from components.models.load import check_pair, load
    from components.models.template import Template
    from components.models.writing import Writer

    asked = settings.distill.teacher_answers
    assert asked is not None
    precision = torch.bfloat16 if wanted.precision == "bf16" else torch.float32
    teacher = load(Path(TeacherChoice.read(TEACHER / "choice.json").path), device, precision)
    template, longest = Template.asked(settings.models.template), settings.models.max_length
    shared, readers = teacher.vocabulary, []
    for record in ModelIndex.read(MODELS / "index.json").students.values():
        student = load(Path(record.path), device)
        shared = min(shared, check_pair(teacher, student, own_images=True))
        readers.append(Collator(student.processor, template, longest, train=True))
    own = Collator(teacher.processor, template, longest, train=True)
    writer = Writer(teacher, own, asked.max_new_tokens, asked.temperature, asked.top_p, shared, readers)
    samples = Samples(DATASET, "train", ROWS)
    rows = [row for row, kind in enumerate(samples.kinds) if kind != CAPTION]
    size = settings.distill.micro_batch_size
    lines: list[Answered] = []
    files: list[Path] = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=wanted.precision == "bf16")
    with tqdm(total=len(rows), desc="write_answers", unit="sample") as bar, autocast:
        for first in range(0, len(rows), PART):
            part = rows[first : first + PART]
            files.append(folder / f"part-{first // PART:05d}.jsonl")
            if not files[-1].is_file():
                found: list[Answered] = []
                for start in range(0, len(part), size):
                    found += _answered(writer, samples, part[start : start + size], asked.samples)
                    bar.update(len(part[start : start + size]))
                write_text(files[-1], jsonl(found))
            lines += Answered.read_lines(files[-1])
    kept = [ids for line in lines for conversation in line.answers for ids in conversation]
    answers, tokens = len(kept), sum(map(len, kept))
    cut_off = sum(line.cut_off for line in lines)
    made = AnswerSet(
        facts=wanted,
        samples=len(lines),
        answers=answers + cut_off,
        cut_off=cut_off,
        without=sum(not line.answers for line in lines),
        tokens=tokens / max(answers, 1),
        log_prob=sum(sum(of_one) for line in lines for of_one in line.log_probs) / max(tokens, 1),
        files={path.name: sha256([path]) for path in files},
    )
    AnswerManifest(written=made).write(folder / "manifest.json")
    return made


def _answered(writer: Writer, samples: Samples, rows: list[int], count: int) -> list[Answered]:
    """Records of a batch of samples with `count` conversations each; answers cut off, which end one, are dropped."""
    from components.align_ti.ribbon import draw_key

    shown = [samples[row] for row in rows]
    passes = [writer.write(shown, [draw_key("teacher", row, n) for row in rows]) for n in range(count)]
    decode = writer.loaded.processor.tokenizer.decode
    found = []
    for row, sample, said in zip(rows, shown, zip(*passes, strict=True), strict=True):
        whole = [[answer for answer in answers if answer.tokens[-1] == writer.eos_id] for answers in said]
        kept = [answers for answers in whole if answers]
        texts = [[decode(answer.tokens, skip_special_tokens=True) for answer in answers] for answers in kept]
        gold = [_folded(turn.answer) for turn in sample.turns]
        found.append(
            Answered(
                sample=row,
                id=sample.id,
                answers=[[answer.tokens for answer in answers] for answers in kept],
                log_probs=[[answer.log_prob for answer in answers] for answers in kept],
                cut_off=sum(map(len, said)) - sum(map(len, whole)),
                texts=texts,
                right=[[_folded(text) == own for text, own in zip(of_one, gold, strict=False)] for of_one in texts],
            )
        )
    return found


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


if __name__ == "__main__":
    exit_from(main)
