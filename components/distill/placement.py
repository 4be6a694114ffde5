"""Placement of the teacher's weights: dtype or quantisation, device, sharding over processes."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from components.config.runtime import RuntimeSettings
from components.config.settings import Settings
from components.errors import InputError
from components.models.load import Loaded, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_teacher(path: Path, student_device: torch.device, settings: Settings) -> Loaded:
    """Frozen teacher under params/distill.yaml (`teacher_weights`) and params/runtime.yaml (`teacher_device`, ...).

    Its head is on `student_device`, where rows are compared: moving hidden states of width d instead of logits of
    width V costs d / V of the traffic.

    Raises:
        InputError: 8- or 4-bit weights without CUDA or bitsandbytes, a missing device, or incompatible settings.
        ModelError: as `load`.
    """
    storage, runtime = settings.distill.teacher_weights, settings.runtime
    device = student_device if runtime.teacher_device == "same" else torch.device(runtime.teacher_device)
    _check(storage, device, runtime)
    dtype = DTYPES[storage if storage in DTYPES else settings.distill.precision]
    teacher = load(path, device, dtype, storage if storage in ("int8", "nf4") else None)
    teacher.model.requires_grad_(False)
    if runtime.teacher_sharded:
        shard(teacher.model)
    copy_head_to(teacher.model, student_device)
    return teacher


def _check(storage: str, device: torch.device, runtime: RuntimeSettings) -> None:
    file = "params/runtime.yaml: "
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{file}teacher_device is {device}, and there are {torch.cuda.device_count()} CUDA devices here")
    if processes > 1 and runtime.teacher_device.startswith("cuda"):
        raise InputError(
            f"{file}teacher_device {device} would be every process's; with several use same, cpu or teacher_sharded"
        )
    if runtime.teacher_sharded and (processes == 1 or runtime.teacher_device != "same" or storage in ("int8", "nf4")):
        raise InputError(
            f"{file}teacher_sharded needs `devices` above 1, teacher_device: same, and teacher_weights in fp32 or bf16;"
            f" here are {processes} process(es), {runtime.teacher_device} and {storage}"
        )
    if storage in ("int8", "nf4"):
        if device.type != "cuda":
            raise InputError(
                f"params/distill.yaml: teacher_weights {storage} needs a CUDA device, and the teacher lies on {device}"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(f"params/distill.yaml: teacher_weights {storage} needs bitsandbytes; `pip install bitsandbytes`")


def copy_head_to(model: Any, device: torch.device) -> None:
    """Copy the output head of `model` to `device`; a copy, since the head may be tied to the embeddings."""
    head = model.get_output_embeddings()
    if head.weight.device != device:
        model.set_output_embeddings(copy.deepcopy(head).to(device))


def shard(model: Any) -> None:
    """Shard the language model's layers over the processes with FSDP2, which gathers each layer during its forward.

    Embeddings, head and vision tower stay unsharded: they are used outside of the language model's forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    language_model = model.get_decoder()
    outside = set(language_model.parameters()) - set(language_model.layers.parameters())
    mesh = init_device_mesh(next(language_model.parameters()).device.type, (torch.distributed.get_world_size(),))
    for layer in language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(language_model, mesh=mesh, ignored_params=outside)
