"""Stage `evaluate@ARM`: scores of a student or the teacher. `python -m components.evaluate --arm ARM|teacher`

Writes artifacts/scores/ARM/predictions.jsonl, every sample with its answer; likelihoods.jsonl, the reference's negative
log-likelihood and the KL divergence from the teacher along it; and scores.json. The same model and data give the same bytes,
also after a resume: generation restarts at the first batch missing from the journal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from components.config.load import load_settings
from components.io import fingerprint as key_of
from components.io import sha256, write_text
from components.process import exit_from
from components.records.paths import DATASET, ROWS, RUNS, SCORES, STUDENTS, TEACHER, TEACHER_ARM
from components.records.record import Absent, jsonl
from components.records.teacher import TeacherChoice


def main() -> None:
    settings = load_settings()
    parser = argparse.ArgumentParser(prog="python -m components.evaluate", description="Score one arm's answers.")
    parser.add_argument("--arm", required=True, choices=[TEACHER_ARM, *settings.study.arms], help="whose answers")
    arm: str = parser.parse_args().arm
    none = Absent.reason_at(TEACHER / "choice.json")
    if none and arm == TEACHER_ARM:
        Absent(none=none).write(SCORES / arm / "scores.json")
        print(f"evaluate teacher: nothing to do, {none}")
        return

    from components.dataset.shards import Samples
    from components.evaluate import fingerprint, generate, likelihood, metrics, scorers
    from components.evaluate.journal import Journal
    from components.models.load import load
    from components.models.template import Template
    from components.runtime import prepare_torch
    from components.tracking.stage_run import stage_run

    asked = settings.evaluate
    samples = Samples(DATASET, asked.split, ROWS)
    rows = generate.questions(samples)
    varying = {"split": asked.split, "samples": len(rows), "max_new_tokens": asked.max_new_tokens}
    with stage_run("evaluate", cell=arm, runtime=settings.runtime, params=varying) as run:
        run.dataset(str(DATASET), samples.manifest.digest)
        device = prepare_torch(settings.runtime, seed=0)
        loaded = load(model_of(arm), device)
        template = Template.from_settings(settings.models.template)
        measured = fingerprint.own(loaded, samples, rows, template, asked)
        decisive = {"measured": measured.model_dump(), "model": sha256([model_of(arm)]), "batch_size": asked.batch_size}
        journal = Journal(RUNS / "evaluate" / arm / f"{key_of(decisive, code=())}.jsonl")  # another key: other answers
        answers = generate.answers(loaded, samples, rows, template, settings.models.max_length, asked, arm, journal)
        predicted = metrics.predictions((samples[row] for row in rows), answers)
        teacher = None if none or arm == TEACHER_ARM else load(model_of(TEACHER_ARM), device)
        forced = likelihood.likelihoods(loaded, samples, rows, template, asked.batch_size, f"{arm}: references", teacher)
        per_token = {"nats_per_token": likelihood.nats_per_token(forced), "kl_per_token": likelihood.kl_per_token(forced)}
        own: dict[str, float] = {scorer: scorers.mean(scorer, predicted) for scorer in asked.scorers}
        scores = metrics.score(arm, predicted).model_copy(update={**per_token, "scorers": own, "fingerprint": measured})
        write_text(SCORES / arm / "predictions.jsonl", jsonl(predicted))
        write_text(SCORES / arm / "likelihoods.jsonl", jsonl(forced))
        path = scores.write(SCORES / arm / "scores.json")
        journal.close()
        run.metrics({"exact_match": scores.exact_match, **{f"exact_match/{k}": v for k, v in scores.per_kind.items()}})
        run.metrics(
            {"token_f1": scores.token_f1, **{key: value for key, value in per_token.items() if value is not None}, **own}
        )
        for kind, figures in scores.yes_no.items():
            run.metrics({f"{name}/{kind}": value for name, value in figures.model_dump(exclude={"samples"}).items()})
        run.artifact(path)
        for name in ("predictions.jsonl", "likelihoods.jsonl"):
            run.artifact(SCORES / arm / name)
    cut = sum(one.tokens > asked.max_new_tokens for one in forced)
    most = f"evaluate.max_new_tokens {asked.max_new_tokens}"
    longer = f"; {cut:,} references are longer than {most}, so no answer equals them: raise it" if cut else ""
    weakest = min(scores.per_kind, key=lambda kind: scores.per_kind[kind])
    print(
        f"evaluate {arm}: {scores.exact_match:.1%} exact match on {scores.samples:,} {asked.split} samples, weakest {weakest} "
        f"({scores.per_kind[weakest]:.1%}){longer} -> {path}"
    )


def model_of(arm: str) -> Path:
    """Checkpoint folder of the arm's student, or of the chosen teacher. Raises DataError if no teacher is chosen yet."""
    return Path(TeacherChoice.read(TEACHER / "choice.json").path) if arm == TEACHER_ARM else STUDENTS / arm / "model"


if __name__ == "__main__":
    exit_from(main)
