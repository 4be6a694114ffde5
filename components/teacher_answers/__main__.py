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

    options = settings.distill.teacher_answers
    with stage_run("write_answers", runtime=settings.runtime, params=options.model_dump() if options else {}) as run:
        if options is None:
            shutil.rmtree(ANSWERS, ignore_errors=True)
            AnswerManifest(written=None).write(ANSWERS / "manifest.json")
            print("write_answers: nothing to do, params/distill.yaml:teacher_answers is null")
            return
        result = generate(settings)
        run.metrics({name: getattr(result, name) for name in ("answers", "cut_off", "without", "tokens", "log_prob")})
    print(
        f"write_answers: {result.answers:,} answers to {result.samples:,} samples, {result.cut_off:,} cut off and not kept,"
        f" {result.without:,} samples without any; {result.tokens:.1f} tokens and {result.log_prob:.2f} nats a token on"
        f" average -> {ANSWERS}"
    )


def generate(settings: Settings) -> AnswerSet:
    """Generate the answers, resuming an interrupted run, and move them into place.

    Raises:
        ModelError: teacher and students are incompatible (`check_pair`).
        TryAgainError: another process holds the lock.
    """
    from components.runtime import prepare_torch
    from components.teacher_answers.store import facts

    device = prepare_torch(settings.runtime, 0, settings.distill.precision)
    expected_facts = facts(settings)
    size = settings.distill.micro_batch_size
    with resumable(ANSWERS, expected_facts, "components.teacher_answers.__main__", micro_batch_size=size) as draft:
        return _write_answers(draft, settings, expected_facts, device)


def _write_answers(folder: Path, settings: Settings, facts: AnswerFacts, device: torch.device) -> AnswerSet:
    """Write answer files and manifest into `folder`."""
    import torch
    from tqdm import tqdm

    from components.dataset.shards import CAPTION, Samples
    from components.models.collate import Collator
    from components.models.load import check_pair, load
    from components.models.template import Template
    from components.models.writing import Writer

    options = settings.distill.teacher_answers
    assert options is not None
    precision = torch.bfloat16 if facts.precision == "bf16" else torch.float32
    teacher = load(Path(TeacherChoice.read(TEACHER / "choice.json").path), device, precision)
    template, max_length = Template.from_settings(settings.models.template), settings.models.max_length
    shared_vocabulary, student_collators = teacher.vocabulary, []
    for record in ModelIndex.read(MODELS / "index.json").students.values():
        student = load(Path(record.path), device)
        shared_vocabulary = min(shared_vocabulary, check_pair(teacher, student, own_images=True))
        student_collators.append(Collator(student.processor, template, max_length, train=True))
    teacher_collator = Collator(teacher.processor, template, max_length, train=True)
    writer = Writer(
        teacher,
        teacher_collator,
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        shared_vocabulary,
        student_collators,
    )
    samples = Samples(DATASET, "train", ROWS)
    rows = [row for row, kind in enumerate(samples.kinds) if kind != CAPTION]
    size = settings.distill.micro_batch_size
    records: list[Answered] = []
    files: list[Path] = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=facts.precision == "bf16")
    with tqdm(total=len(rows), desc="write_answers", unit="sample") as bar, autocast:
        for first in range(0, len(rows), PART):
            part = rows[first : first + PART]
            files.append(folder / f"part-{first // PART:05d}.jsonl")
            if not files[-1].is_file():
                part_records: list[Answered] = []
                for start in range(0, len(part), size):
                    part_records += _generate_records(writer, samples, part[start : start + size], options.samples)
                    bar.update(len(part[start : start + size]))
                write_text(files[-1], jsonl(part_records))
            else:
                bar.update(len(part))
            records += Answered.read_lines(files[-1])
    answer_tokens = [ids for entry in records for conversation in entry.answers for ids in conversation]
    answers, tokens = len(answer_tokens), sum(map(len, answer_tokens))
    cut_off = sum(entry.cut_off for entry in records)
    result = AnswerSet(
        facts=facts,
        samples=len(records),
        answers=answers + cut_off,
        cut_off=cut_off,
        without=sum(not entry.answers for entry in records),
        tokens=tokens / max(answers, 1),
        log_prob=sum(sum(conversation) for entry in records for conversation in entry.log_probs) / max(tokens, 1),
        files={path.name: sha256([path]) for path in files},
    )
    AnswerManifest(written=result).write(folder / "manifest.json")
    return result


def _generate_records(writer: Writer, samples: Samples, rows: list[int], count: int) -> list[Answered]:
    """Records of a batch of samples with `count` conversations each; answers cut off, which end one, are dropped."""
    from components.align_ti.ribbon import draw_key

    batch = [samples[row] for row in rows]
    passes = [writer.write(batch, [draw_key("teacher", row, n) for row in rows]) for n in range(count)]
    decode = writer.loaded.processor.tokenizer.decode
    records = []
    for row, sample, conversations in zip(rows, batch, zip(*passes, strict=True), strict=True):
        finished = [[answer for answer in answers if answer.tokens[-1] == writer.eos_id] for answers in conversations]
        non_empty = [answers for answers in finished if answers]
        texts = [[decode(answer.tokens, skip_special_tokens=True) for answer in answers] for answers in non_empty]
        gold = [_folded(turn.answer) for turn in sample.turns]
        records.append(
            Answered(
                sample=row,
                id=sample.id,
                answers=[[answer.tokens for answer in answers] for answers in non_empty],
                log_probs=[[answer.log_prob for answer in answers] for answers in non_empty],
                cut_off=sum(map(len, conversations)) - sum(map(len, finished)),
                texts=texts,
                right=[[_folded(text) == answer for text, answer in zip(turns, gold, strict=False)] for turns in texts],
            )
        )
    return records


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


if __name__ == "__main__":
    exit_from(main)
