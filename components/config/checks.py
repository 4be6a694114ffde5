"""Cross-file checks of params, beyond the schemas of single files."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from components.align_ti import terms
from components.config.local_paths import layer_counts
from components.config.settings import Settings

Problem = tuple[str, str, str]  # file of params/, its key, what is wrong


def cross_file_problems(settings: Settings) -> Iterator[Problem]:
    """Problems between params files."""
    students = settings.models.members.students
    for name, arm in settings.study.arms.items():
        if arm.student not in students:
            message = f"{arm.student!r} is none of the students of params/models.yaml ({', '.join(students)})"
            yield "study", f"arms.{name}.student", message
        yield from (("study", f"arms.{name}", problem) for problem in _cache_checks(settings, name))
        yield from _layer_access_checks(settings, name)
        yield from (("study", f"arms.{name}.{key}", problem) for key, problem in _answer_checks(settings, name))
        if set(arm.weights) - set(terms.CORE):  # the terms, and torch with them, are imported only if needed
            yield from _watched_layer_checks(settings, name)
            yield from _evidence_checks(settings, name)
    yield from _layer_checks(settings)
    yield from _stage_checks(settings)
    tokens, longest = settings.distill.micro_batch_tokens, settings.models.max_length
    if tokens is not None and tokens < longest:
        message = f"{tokens} is less than one sample may have (params/models.yaml: max_length {longest})"
        yield "distill", "micro_batch_tokens", message
    for name in settings.evaluate.baselines:
        if name not in settings.study.arms:
            yield "evaluate", "baselines", f"{name!r} is no arm of params/study.yaml"


def _layer_checks(settings: Settings) -> Iterator[Problem]:
    """Layers beyond the teacher's depth, where params/ or a local checkpoint's config gives that depth."""
    depths = list(layer_counts(settings.models.members, "teachers").values())
    options = [("irs", "layer", settings.irs.layer), ("distill", "iva.layer", settings.distill.iva.layer)]
    options += [("study", f"arms.{name}.iva.layer", arm.iva.layer) for name, arm in settings.study.arms.items() if arm.iva]
    for file, key, layer in options:
        if isinstance(layer, int) and depths and None not in depths and layer >= max(filter(None, depths)):
            yield file, key, f"{layer}, but the teacher has layers 0..{max(filter(None, depths)) - 1}"


def _watched_layer_checks(settings: Settings, name: str) -> Iterator[Problem]:
    """Layers that an arm's terms read, beyond the depth of its student or of every teacher."""
    arm, members = settings.arm(name), settings.models.members
    teachers = list(layer_counts(members, "teachers").values())
    layers_of = {"in_student": [layer_counts(members, "students").get(arm.student)], "in_teacher": teachers}
    for term, needs in arm.needs.items():
        for side, counts in layers_of.items():
            depth = max((count or sys.maxsize for count in counts), default=sys.maxsize)  # unknown: training checks it
            out_of_range = [layer for layer in getattr(needs, side).layers if not -depth <= layer < depth]
            if out_of_range:
                role = side.removeprefix("in_")
                yield "study", f"arms.{name}.{term}", f"layer {out_of_range[0]} of the {role}, which has layers 0..{depth - 1}"


def _stage_checks(settings: Settings) -> Iterator[Problem]:
    """Settings at odds with `stage`: align trains on captions without a teacher, distill needs one."""
    family, teachers = settings.models.family, settings.models.members.teachers
    if settings.distill.stage != "align":
        if not teachers:
            yield "models", f"{family}.teachers", "{} is for `stage: align`; name a teacher"
        return
    if family == "embedded":
        yield "distill", "stage", "align is for `family: pretrained`; embedded models learn captions as built"
    elif teachers:
        yield "models", "pretrained.teachers", f"stage align has none, and here are {', '.join(teachers)}; set it to {{}}"
    if settings.distill.teacher_signals.source == "cache":
        yield "distill", "teacher_signals.source", "cache, and stage align has no teacher; set it to live"
    signals, answers = settings.distill.teacher_signals, settings.distill.teacher_answers
    for key, value in (("teacher_signals.evidence", signals.evidence), ("teacher_answers", answers)):
        if value is not None:
            yield "distill", key, "a teacher's, and stage align has none; set it to null"
    for name in settings.study.arms:
        if teacher_terms := [term for term, needs in settings.arm(name).needs.items() if needs.teacher]:
            message = f"{', '.join(teacher_terms)} ask a teacher, and stage align has none; set all but sft to 0"
            yield "study", f"arms.{name}.weights", message


def _cache_checks(settings: Settings, name: str) -> list[str]:
    """Options of an arm that the cache of teacher signals, built once for all arms, cannot serve."""
    arm, distill = settings.arm(name), settings.distill
    assert arm.divergence is not None and arm.iva is not None  # filled in by Settings.arm
    if arm.iva.of_another and "iva" in arm.weights and not settings.uses_cache(arm):
        return [
            f"iva.change is {arm.iva.change}, and only the cache has other samples' attention; set teacher_signals.source to"
            " cache, and give the arm no term that needs the live teacher"
        ]
    if not settings.uses_cache(arm) or not terms.union(arm.needs.values()).teacher:
        return []
    problems = []
    if distill.teacher_weights != "same":
        problems.append(f"teacher_weights is {distill.teacher_weights}, and the cache is made with a teacher in `precision`")
    divergences = {term: options.get("divergence") for term, options in arm.options.items()}
    for term, divergence in {"": arm.divergence.model_dump(), **divergences}.items():
        key = f"{term}.divergence".lstrip(".")
        if divergence and divergence["kind"] != "forward":
            problems.append(f"{key}.kind is {divergence['kind']}, and the cache serves the forward divergence alone")
        if divergence and divergence["temperature"] != distill.divergence.temperature:
            problems.append(f"{key}.temperature differs from that of params/distill.yaml, which the cache is made with")
    # the cache holds attention in any case
    cached_weighting = "irs" if distill.iva.weighting == "uniform" else distill.iva.weighting
    required = arm.iva.weighting, arm.iva.layer
    if any(needs.attention for needs in arm.needs.values()) and required != (cached_weighting, distill.iva.layer):
        problems.append("iva differs from that of params/distill.yaml, which the cache is made with")
    return [f"{problem}; or set teacher_signals.source to live" for problem in problems]


def _layer_access_checks(settings: Settings, name: str) -> Iterator[Problem]:
    """Terms that read the student's layers, against torch.compile and FlexAttention."""
    distill = settings.distill
    flex = distill.gradient_checkpointing and distill.flex_attention
    if not (distill.compile or flex):  # the terms, and torch with them, are imported only if needed
        return
    needs = settings.arm(name).needs
    if distill.compile and (readers := [term for term, need in needs.items() if need.in_student]):
        message = (
            f"arms.{name} has {', '.join(readers)}, which read inside the student's layers, and what compiled ones are read by"
            " breaks their graphs; set it to false"
        )
        yield "distill", "compile", message
    if flex and (map_readers := [term for term, need in needs.items() if need.in_student.maps]):
        message = (
            f"arms.{name} has {', '.join(map_readers)}, which read attention maps of the student, and FlexAttention has none;"
            " set it to false"
        )
        yield "distill", "flex_attention", message


def _evidence_checks(settings: Settings, name: str) -> Iterator[Problem]:
    """Teacher evidence that terms need from `cache_teacher`."""
    arm, evidence = settings.arm(name), settings.distill.teacher_signals.evidence
    kept, share = ([], 0.25) if evidence is None else (evidence.kinds, evidence.share)
    for term, needs in arm.needs.items():
        key = f"arms.{name}.weights.{term}"
        for kind in needs.evidence:
            if arm.answers is not None or arm.rollouts is not None:
                remedy = "set its weight to 0" if needs.edits else f"set {term}.cached to false"
                message = f"the teacher's {kind} evidence is of the data's answers, and this arm's are generated: {remedy}"
                yield "study", key, message
            elif kind not in kept:
                message = (
                    f"the teacher's {kind} evidence is not kept; give teacher_signals of params/distill.yaml"
                    f" `evidence: {{kinds: [{', '.join([*kept, kind])}], share: {share:g}}}`"
                )
                yield "study", key, message


def _answer_checks(settings: Settings, name: str) -> Iterator[tuple[str, str]]:
    """Options at odds with generated answers, the teacher's or rollouts: key below the arm's, and the problem."""
    arm, distill = settings.arm(name), settings.distill
    if arm.answer_filter is not None and arm.answers is None:
        yield "answer_filter", "it is of the teacher's answers: give the arm `answers: teacher`"
    if arm.rollouts is None and arm.answers is None:
        return
    assert arm.tpa is not None  # filled in by Settings.arm
    if arm.answers is not None and distill.teacher_answers is None:
        yield "answers", "the teacher writes none; give params/distill.yaml a block teacher_answers"
    key = "answers" if arm.rollouts is None else "rollouts"
    if settings.uses_cache(arm) and any(needs.teacher for needs in arm.needs.values()):
        yield key, "the cache holds the teacher at the data's answers; set teacher_signals.source to live"
    if distill.micro_batch_tokens is not None:
        yield key, "the lengths that share a batch out are the data's; set micro_batch_tokens to null"
    if arm.rollouts is not None:
        if (settings.runtime.accelerate or "").startswith(("fsdp", "deepspeed")):
            message = f"params/runtime.yaml: accelerate is {settings.runtime.accelerate}, which divides the student's weights,"
            yield key, f"{message} and answers are written with whole ones; set it to null or ddp"
        gold_terms = [
            term
            for term, needs in arm.needs.items()
            if (needs.gold and not needs.evidence) or (term == "tpa" and arm.tpa.source == "gold")
        ]
        if gold_terms:
            yield key, f"{', '.join(gold_terms)} take the data's answers, and the student writes others; set their weights to 0"
        if distill.gradient_checkpointing and distill.flex_attention and terms.union(arm.needs.values()).ribbon:
            yield key, "FlexAttention takes no key/value cache, which answers are written with; set flex_attention to false"
