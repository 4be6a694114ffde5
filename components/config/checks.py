"""Checks between params files: what no schema of a single file can know."""

from __future__ import annotations

from components.align_ti import terms
from components.config.settings import Settings


def across_files(settings: Settings) -> list[str]:
    """What no single file can know."""
    problems = []
    students = settings.models.members.students
    for name, arm in settings.study.arms.items():
        if arm.student not in students:
            problems.append(
                f"params/study.yaml: arms.{name}.student: {arm.student!r} is none of the students of params/models.yaml"
                f" ({', '.join(students)})"
            )
        problems += _cache_checks(settings, name)
        problems += _inside_checks(settings, name)
        problems += _answer_checks(settings, name)
        problems += _evidence_checks(settings, name)
    problems += _stage_checks(settings)
    tokens, longest = settings.distill.micro_batch_tokens, settings.models.max_length
    if tokens is not None and tokens < longest:
        problems.append(
            f"params/distill.yaml: micro_batch_tokens: {tokens} is less than one sample may have"
            f" (params/models.yaml: max_length {longest})"
        )
    for name in settings.evaluate.baselines:
        if name not in settings.study.arms:
            problems.append(f"params/evaluate.yaml: baselines: {name!r} is no arm of params/study.yaml")
    return problems


def _stage_checks(settings: Settings) -> list[str]:
    """What goes with captions and no teacher, and what with one."""
    align, teachers = settings.distill.stage == "align", settings.models.members.teachers
    if not align:
        empty = f"params/models.yaml: {settings.models.family}.teachers: {{}} is for `stage: align`; name a teacher"
        return [] if teachers else [empty]
    problems = []
    if settings.models.family == "embedded":
        problems.append(
            "params/distill.yaml: stage: align is for `family: pretrained`; embedded models learn captions as built"
        )
    elif teachers:
        problems.append(
            f"params/models.yaml: pretrained.teachers: stage align has none, and here are {', '.join(teachers)}; set it to {{}}"
        )
    if settings.distill.teacher_signals.source == "cache":
        problems.append("params/distill.yaml: teacher_signals.source is cache, and stage align has no teacher; set it to live")
    if settings.distill.teacher_signals.evidence is not None:
        problems.append(
            "params/distill.yaml: teacher_signals.evidence is a teacher's, and stage align has none; set it to null"
        )
    for name in settings.study.arms:
        if asking := [term for term, needs in settings.arm(name).needs.items() if needs.teacher]:
            problems.append(
                f"params/study.yaml: arms.{name}.weights: {', '.join(asking)} ask a teacher, and stage align has none; set all"
                " but sft to 0"
            )
    return problems


def _cache_checks(settings: Settings, name: str) -> list[str]:
    """What the cache of teacher signals, made once for all arms, cannot serve."""
    arm, shared = settings.arm(name), settings.distill
    assert arm.divergence is not None and arm.iva is not None  # filled in by Settings.arm
    if arm.iva.of_another and "iva" in arm.weights and not settings.uses_cache(arm):
        return [
            f"params/study.yaml: arms.{name}: iva.change is {arm.iva.change}, and only the cache has other samples' attention;"
            " set teacher_signals.source to cache, and give the arm no term that needs the live teacher"
        ]
    if not settings.uses_cache(arm) or not terms.union(arm.needs.values()).teacher:
        return []
    problems = []
    if shared.teacher_weights != "same":
        problems.append(f"teacher_weights is {shared.teacher_weights}, and the cache is made with a teacher in `precision`")
    own = {term: options.get("divergence") for term, options in arm.options.items()}
    for term, divergence in {"": arm.divergence.model_dump(), **own}.items():
        where = f"{term}.divergence".lstrip(".")
        if divergence and divergence["kind"] != "forward":
            problems.append(f"{where}.kind is {divergence['kind']}, and the cache serves the forward divergence alone")
        if divergence and divergence["temperature"] != shared.divergence.temperature:
            problems.append(f"{where}.temperature differs from that of params/distill.yaml, which the cache is made with")
    kept = "irs" if shared.iva.weighting == "uniform" else shared.iva.weighting  # the cache holds some attention in any case
    asked = arm.iva.weighting, arm.iva.layer
    if any(needs.attention for needs in arm.needs.values()) and asked != (kept, shared.iva.layer):
        problems.append("iva differs from that of params/distill.yaml, which the cache is made with")
    return [f"params/study.yaml: arms.{name}: {problem}; or set teacher_signals.source to live" for problem in problems]


def _inside_checks(settings: Settings, name: str) -> list[str]:
    """What compiled layers and FlexAttention cannot give to terms that read inside the student."""
    distill = settings.distill
    flex = distill.gradient_checkpointing and distill.flex_attention
    if not (distill.compile or flex):  # terms are imported, and torch with them, only where the question arises
        return []
    problems = []
    needs = settings.arm(name).needs
    if distill.compile and (inside := [term for term, need in needs.items() if need.in_student]):
        problems.append(
            f"params/distill.yaml: compile: arms.{name} has {', '.join(inside)}, which read inside the student's layers,"
            " and what compiled ones are read by breaks their graphs; set it to false"
        )
    if flex and (reading := [term for term, need in needs.items() if need.in_student.maps]):
        problems.append(
            f"params/distill.yaml: flex_attention: arms.{name} has {', '.join(reading)}, which read attention maps of the"
            " student, and FlexAttention has none; set it to false"
        )
    return problems


def _evidence_checks(settings: Settings, name: str) -> list[str]:
    """What L_mcd asks of `cache_teacher`."""
    arm, asked = settings.arm(name), settings.distill.teacher_signals.evidence
    if "mcd" not in arm.weights:
        return []
    where = f"params/study.yaml: arms.{name}.weights.mcd"
    kind = arm.options["mcd"].get("evidence", "gradient")
    if asked is None or kind not in asked.kinds:
        return [
            f"{where}: the teacher's {kind} evidence is not kept; give teacher_signals of params/distill.yaml"
            f" `evidence: {{kinds: [{kind}], share: 0.25}}`"
        ]
    return [] if arm.answers is None else [f"{where}: evidence is of the data's answers, and `answers` is {arm.answers}"]


def _answer_checks(settings: Settings, name: str) -> list[str]:
    """What cannot be had of answers that a model writes."""
    arm, distill = settings.arm(name), settings.distill
    if arm.rollouts is None and arm.answers is None:
        return []
    assert arm.tpa is not None  # filled in by Settings.arm
    problems = []
    if arm.answers is not None and distill.teacher_answers is None:
        problems.append("answers: the teacher writes none; give params/distill.yaml a block teacher_answers")
    where = "answers" if arm.rollouts is None else "rollouts"
    if settings.uses_cache(arm) and any(needs.teacher for needs in arm.needs.values()):
        problems.append(f"{where}: the cache holds the teacher at the data's answers; set teacher_signals.source to live")
    if distill.micro_batch_tokens is not None:
        problems.append(f"{where}: the lengths that share a batch out are the data's; set micro_batch_tokens to null")
    if arm.rollouts is not None:
        gold = [term for term, needs in arm.needs.items() if needs.gold or (term == "tpa" and arm.tpa.source == "gold")]
        if gold:
            problems.append(
                f"rollouts: {', '.join(gold)} take the data's answers, and the student writes others; set their weights to 0"
            )
        if distill.gradient_checkpointing and distill.flex_attention and terms.union(arm.needs.values()).ribbon:
            problems.append(
                "rollouts: FlexAttention takes no key/value cache, which answers are written with; set flex_attention to false"
            )
    return [f"params/study.yaml: arms.{name}.{problem}" for problem in problems]
