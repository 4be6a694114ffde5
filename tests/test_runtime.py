"""What a stage sets up of the machine before it works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from components.config.load import load_settings
from components.config.runtime import RuntimeSettings
from components.runtime import prepare_torch


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize(
    ("device", "precision", "products"),
    [("cuda", "bf16", "high"), ("cuda", "fp32", "highest"), ("cpu", "bf16", "highest")],
)
def test_only_bf16_training_on_a_gpu_may_take_tf32_for_float32_products(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: Literal["fp32", "bf16"], products: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime = RuntimeSettings(**{**load_settings().runtime.model_dump(), "device": device})
    torch.set_float32_matmul_precision("high" if products == "highest" else "highest")  # what another left
    assert prepare_torch(runtime, 0, precision).type == device
    assert torch.get_float32_matmul_precision() == products
