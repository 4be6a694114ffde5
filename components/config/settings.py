"""Settings of a run: one schema per file of `params/`.

No field has a default but null, blocks of loss terms apart: the YAML files define a run, so that DVC decides staleness from
them. `params/runtime.yaml` holds what does not change results (devices, addresses); no stage depends on it.
"""

from __future__ import annotations

from components.align_ti import terms
from components.config.data import DataSettings
from components.config.distill import DistillSettings
from components.config.evaluate import EvaluateSettings
from components.config.fields import Strict
from components.config.irs import IrsSettings
from components.config.models import ModelsSettings
from components.config.runtime import RuntimeSettings
from components.config.study import Arm, StudySettings
from components.config.teacher import TeacherSettings
from components.errors import SettingsError


class Settings(Strict):
    data: DataSettings
    models: ModelsSettings
    teacher: TeacherSettings
    irs: IrsSettings
    distill: DistillSettings
    evaluate: EvaluateSettings
    study: StudySettings
    runtime: RuntimeSettings

    def arm(self, name: str) -> Arm:
        """Arm with its `null` blocks filled in from `params/distill.yaml`. Raises SettingsError if there is none."""
        if name not in self.study.arms:
            raise SettingsError(f"params/study.yaml has no arm {name!r}; it has {', '.join(self.study.arms)}")
        arm = self.study.arms[name]
        core_blocks = {key: getattr(arm, key) or getattr(self.distill, key) for key in ("iva", "tpa", "divergence")}
        term_blocks = {term: block for term, block in (self.distill.blocks | arm.blocks).items() if term in arm.weights}
        fields = {field: getattr(arm, field) for field in Arm.model_fields}
        return Arm(**fields | core_blocks | term_blocks)

    def of_arm(self, arm: Arm) -> Settings:
        """Settings for training the arm: `steps` is the arm's own, if it has one."""
        if arm.steps is None:
            return self
        return self.model_copy(update={"distill": self.distill.model_copy(update={"steps": arm.steps})})

    @property
    def needs_layer(self) -> bool:
        """Whether some arm needs the result of the layer search."""
        return any(self.arm(name).needs_layer for name in self.study.arms)

    def uses_cache(self, arm: Arm) -> bool:
        """Whether the arm trains from the cache. L_tpa, among others, needs the live teacher (at the student's draws)."""
        return self.distill.teacher_signals.source == "cache" and not terms.union(arm.needs.values()).live_teacher


FILES = tuple(Settings.model_fields)
