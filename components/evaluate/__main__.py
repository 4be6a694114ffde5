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
    no_teacher = Absent.reason_at(TEACHER / "choice.json")
    if no_teacher and arm == TEACHER_ARM:
        Absent(none=no_teacher).write(SCORES / arm / "scores.json")
        print(f"evaluate teacher: nothing to do, {no_teacher}")
        return

    from components.dataset.shards import Samples
    from components.evaluate import fingerprint, generate, likelihood, metrics, scorers
    from components.evaluate.journal import Journal
    from components.models.load import load
    from components.models.template import Template
    from components.runtime import prepare_torch
    from components.tracking.stage_run import stage_run

    options = settings.evaluate
    samples = Samples(DATASET, options.split, ROWS)
    rows = generate.questions(samples)
    params = {"split": options.split, "samples": len(rows), "max_new_tokens": options.max_new_tokens}
    with stage_run("evaluate", cell=arm, runtime=settings.runtime, params=params) as run:
        run.dataset(str(DATASET), samples.manifest.digest)
        device = prepare_torch(settings.runtime, seed=0)
        loaded = load(model_of(arm), device)
        template = Template.from_settings(settings.models.template)
        run_fingerprint = fingerprint.for_evaluate(loaded, samples, rows, template, options)
        answer_inputs = {
            "measured": run_fingerprint.model_dump(),
            "model": sha256([model_of(arm)]),
            "batch_size": options.batch_size,
        }
        journal = Journal(RUNS / "evaluate" / arm / f"{key_of(answer_inputs, code=())}.jsonl")  # another key: other answers
        answers = generate.answers(loaded, samples, rows, template, settings.models.max_length, options, arm, journal)
        predictions = metrics.predictions((samples[row] for row in rows), answers)
        teacher = None if no_teacher or arm == TEACHER_ARM else load(model_of(TEACHER_ARM), device)
        likelihoods = likelihood.likelihoods(loaded, samples, rows, template, options.batch_size, f"{arm}: references", teacher)
        per_token = {
            "nats_per_token": likelihood.nats_per_token(likelihoods),
            "kl_per_token": likelihood.kl_per_token(likelihoods),
        }
        scorer_means: dict[str, float] = {scorer: scorers.mean(scorer, predictions) for scorer in options.scorers}
        scores = metrics.score(arm, predictions).model_copy(
            update={**per_token, "scorers": scorer_means, "fingerprint": run_fingerprint}
        )
        write_text(SCORES / arm / "predictions.jsonl", jsonl(predictions))
        write_text(SCORES / arm / "likelihoods.jsonl", jsonl(likelihoods))
        path = scores.write(SCORES / arm / "scores.json")
        journal.close()
        run.metrics({"exact_match": scores.exact_match, **{f"exact_match/{k}": v for k, v in scores.per_kind.items()}})
        run.metrics(
            {
                "token_f1": scores.token_f1,
                **{key: value for key, value in per_token.items() if value is not None},
                **scorer_means,
            }
        )
        if scores.yes_no_overall is not None:
            figures = {f"/{kind}": of_kind for kind, of_kind in scores.yes_no.items()} | {"": scores.yes_no_overall}
            for suffix, each in figures.items():
                run.metrics({f"{name}{suffix}": value for name, value in each.model_dump(exclude={"samples"}).items()})
        run.artifact(path)
        for name in ("predictions.jsonl", "likelihoods.jsonl"):
            run.artifact(SCORES / arm / name)
    overlong = sum(reference.tokens > options.max_new_tokens for reference in likelihoods)
    limit = f"evaluate.max_new_tokens {options.max_new_tokens}"
    warning = f"; {overlong:,} references are longer than {limit}, so no answer equals them: raise it" if overlong else ""
    weakest = min(scores.per_kind, key=lambda kind: scores.per_kind[kind])
    print(
        f"evaluate {arm}: {scores.exact_match:.1%} exact match on {scores.samples:,} {options.split} samples, weakest "
        f"{weakest} ({scores.per_kind[weakest]:.1%}){warning} -> {path}"
    )


def model_of(arm: str) -> Path:
    """Checkpoint folder of the arm's student, or of the chosen teacher. Raises DataError if no teacher is chosen yet."""
    return Path(TeacherChoice.read(TEACHER / "choice.json").path) if arm == TEACHER_ARM else STUDENTS / arm / "model"


if __name__ == "__main__":
    exit_from(main)
