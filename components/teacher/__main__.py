"""Stage `select_teacher`: measurement of all teacher candidates, and selection of one. `python -m components.teacher`

Writes artifacts/teacher/choice.json, which later stages depend on, and reports/teacher/{candidates.json,table.md,
quality_cost.png}, whose timings vary from run to run. Stage align: choice.json and table.md state that there is no teacher.
"""

from __future__ import annotations

import shutil

from components.config.load import load_settings
from components.errors import ModelError
from components.io import write_bytes, write_text
from components.process import exit_from
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, REPORTS, ROWS, TEACHER
from components.records.teacher import NO_TEACHER, TeacherChoice, TeacherReport


def main() -> None:
    settings = load_settings()
    if settings.distill.stage == "align":
        NO_TEACHER.write(TEACHER / "choice.json")
        shutil.rmtree(REPORTS / "teacher", ignore_errors=True)
        write_text(REPORTS / "teacher/table.md", f"{NO_TEACHER.none}\n")
        print(f"select_teacher: nothing to do, {NO_TEACHER.none}")
        return

    from components.dataset.shards import Samples
    from components.evaluate.generate import questions
    from components.report.figures import draw
    from components.runtime import prepare_torch
    from components.teacher import report
    from components.teacher.choose import choose
    from components.teacher.measure import balanced, measure
    from components.tracking.stage_run import stage_run

    records = ModelIndex.read(MODELS / "index.json").teachers
    if not records:
        raise ModelError(f"{MODELS / 'index.json'} lists no teacher; name one in params/models.yaml and `dvc repro`")
    samples = Samples(DATASET, "val", ROWS)
    rows = balanced(questions(samples), samples.kinds, settings.teacher.samples, settings.teacher.seed)
    with stage_run("select_teacher", runtime=settings.runtime, params=settings.teacher.model_dump()) as run:
        run.dataset(str(DATASET), samples.manifest.digest)
        device = prepare_torch(settings.runtime, settings.teacher.seed)
        candidates = [measure(record, samples, rows, settings, device) for record in records.values()]
        for candidate in candidates:
            figures = candidate.model_dump(exclude={"name", "per_kind", "refused"})
            run.metrics({f"{candidate.name}/{figure}": value for figure, value in figures.items() if value is not None})
        name, reason = choose(candidates, settings.teacher)
        teacher_report = TeacherReport(chosen=name, reason=reason, candidates=candidates)
        folder = REPORTS / "teacher"
        teacher_report.write(folder / "candidates.json")
        write_text(folder / "table.md", report.table(teacher_report, settings.teacher, len(rows)))
        write_bytes(folder / "quality_cost.png", draw(report.quality_cost, teacher_report, settings.teacher, len(rows)))
        TeacherChoice(name=name, path=records[name].path, sha256=records[name].sha256).write(TEACHER / "choice.json")
        run.tag("teacher", name)
        for file in ("candidates.json", "table.md", "quality_cost.png"):
            run.artifact(folder / file)
    print(f"select_teacher: {reason} -> {TEACHER / 'choice.json'}, {folder / 'table.md'}")


if __name__ == "__main__":
    exit_from(main)
