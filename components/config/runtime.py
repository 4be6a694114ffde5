"""Schema of params/runtime.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from components.config.fields import Name, NoRepeats, PositiveInt, Strict


def _split(value: Any) -> Any:
    """Items of a comma-separated environment variable; other values unchanged."""
    return [item for item in value.split(",") if item] if isinstance(value, str) else value


class RuntimeSettings(Strict):
    """Settings that do not change results; each can be set in the environment as ALIGNTI_<FIELD>."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: PositiveInt = Field(strict=False, description="CPU threads of one process")
    workers: PositiveInt | None = Field(
        strict=False, description="processes that prepare data or judge tiny models; null: one per core"
    )
    loaders: Annotated[int, Field(ge=0)] = Field(strict=False, description="processes that load batches ahead; 0: none")
    devices: PositiveInt = Field(strict=False, description="processes of one training, one device each")
    accelerate: Name | None = Field(description="a file of params/accelerate/; null: ddp or ddp-cpu if devices > 1")
    teacher_device: Annotated[str, Field(pattern=r"^(same|cpu|cuda:\d+)$")] = Field(description="same: with the student")
    teacher_sharded: bool = Field(strict=False, description="the teacher's layers are shared out over the processes (FSDP2)")
    tracking_uri: str
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_split), NoRepeats] = Field(
        description="beside MLflow"
    )
    experiment: str
