"""Device, threads and determinism of a stage, and its peak memory."""

from __future__ import annotations

import os
import resource
import sys
from typing import Literal

import torch

from components.config.runtime import RuntimeSettings
from components.errors import InputError
from components.process import cores


def prepare_torch(runtime: RuntimeSettings, seed: int, precision: Literal["fp32", "bf16"] = "fp32") -> torch.device:
    """Set threads, seed and deterministic kernels; return the device. Raises InputError if it is not available.

    `precision` bf16: on CUDA only the output heads multiply in float32 (align_ti/head.py). They may use TF32, which holds bf16
    operands exactly and is seven times as fast on an H100. With fp32 all matrix products are full float32.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(runtime.threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = _device(runtime)
    torch.set_float32_matmul_precision("high" if precision == "bf16" and device.type == "cuda" else "highest")
    return device


def _device(runtime: RuntimeSettings) -> torch.device:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if runtime.device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    if not available[runtime.device]:
        raise InputError(f"params/runtime.yaml: device {runtime.device!r} is not available here; use auto or cpu")
    return torch.device(runtime.device)


def models_at_once(runtime: RuntimeSettings, device: torch.device) -> int:
    """Number of processes for a model each: one on an accelerator, else `workers`, or as many as the cores have threads for."""
    return 1 if device.type != "cpu" else runtime.workers or max(1, cores() // runtime.threads)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the device on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**20 if sys.platform == "darwin" else 2**10)
