"""Interfaces of the models that the distillation step runs, and of the cached signals that may stand for the teacher."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from components.align_ti.batch import Batch, Edits
from components.align_ti.cached import Cached
from components.align_ti.head import Head
from components.align_ti.watch import Watch, Watched


class Student(Protocol):
    """Interface of a trainable vision-language model. d is its hidden width; hidden states are the head's inputs."""

    def features(self, batch: Batch) -> Any: ...
    def plain(self, batch: Batch, features: Any, keep: bool) -> tuple[Tensor, Any]: ...
    def continued(self, cache: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def expanded(self, batch: Batch, features: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def edited(self, edits: Edits) -> Tensor: ...
    def watched(self, batch: Batch, watch: Watch) -> AbstractContextManager[Watched]: ...
    @property
    def head(self) -> Head: ...
    @property
    def model(self) -> Any:
        """The underlying transformers model: configuration, layers to shard, parts to train. The method does not use it."""


class Teacher(Protocol):
    """Interface of the frozen teacher. `features` may reuse the student's image features if both share the vision tower."""

    def features(self, batch: Batch, student_features: Any) -> Any: ...
    def plain(self, batch: Batch, features: Any, keep: bool, with_attention: bool) -> tuple[Tensor, Any, Tensor | None]: ...
    def continued(self, cache: Any, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor: ...
    def watched(self, batch: Batch, watch: Watch) -> AbstractContextManager[Watched]: ...
    @property
    def head(self) -> Head: ...
    @property
    def vlm(self) -> Any:
        """The frozen model, for memory estimates. The method does not use it."""

    @property
    def equal_weights(self) -> Tensor:
        """() long: running count of images with uniform weights because no attention was left."""


class Signals(Protocol):
    """Interface of the cached teacher signals, looked up by sample; no teacher model is loaded."""

    def look_up(self, batch: Batch, visual: bool, with_attention: bool) -> tuple[Cached, Tensor | None]: ...
