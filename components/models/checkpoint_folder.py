"""Checkpoint folder: completeness, safety and content."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from components.errors import AlignTIError, ModelError, first_line, machine_error
from components.io import is_lfs_pointer, sha256
from components.records.models import ModelRecord
from components.records.record import parsed

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # I64 and BOOL: buffers of old checkpoints
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


LOCAL = {"local_files_only": True, "trust_remote_code": False}  # options of `from_pretrained`: no network, no remote code


@contextmanager
def as_model_error(failure: str) -> Iterator[None]:
    """Raise ModelError, `failure` and the first line of the error, for what transformers raises on an unusable folder: on a
    damaged configuration anything. Faults of the machine pass: the folder may be whole."""
    try:
        yield
    except AlignTIError:
        raise
    except Exception as error:
        if machine_error(error):
            raise
        raise ModelError(f"{failure}: {first_line(error)}") from None


def config_of(path: Path) -> Any:
    """transformers' configuration of a folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, **LOCAL)


def check_loading_info(loading_info: dict[str, Any], path: Path) -> None:
    """Raises ModelError if transformers' loading report lists missing or mismatched weights."""
    if missing := sorted(loading_info["missing_keys"]) + sorted(str(key) for key in loading_info["mismatched_keys"]):
        raise ModelError(f"{path}: {len(missing)} weights are missing or of another shape, the first is {missing[0]}")


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a folder, sorted. Reads headers only.

    Raises ModelError if the folder is missing or half-downloaded, has no configuration, pickled weights only, or quantised
    weights; DataError if a JSON file does not parse.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; if a stage makes it, `dvc repro` does")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; it is not a Hugging Face checkpoint folder")
    if (path / INDEX).is_file():
        weight_map = parsed(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{path / INDEX}: says of no weights where they are; delete the folder and obtain it again")
        files = sorted(path / name for name in set(weight_map.values()))
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
        if pickled:
            raise ModelError(
                f"{path}: only pickled weights ({pickled[0]}), which can run code when read; convert them to safetensors"
            )
        raise ModelError(f"{path}: no *.safetensors weights; the download is incomplete")
    if quantised := parsed(path / "config.json").get("quantization_config"):
        raise ModelError(
            f"{path}: its weights are quantised ({quantised.get('quant_method', 'in some way')}), which is not supported; take"
            " the unquantised release (teacher_weights in params/distill.yaml quantises a teacher as it is loaded)"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                dtypes = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
            unsupported = [f"{key} in {dtype}" for key, dtype in dtypes.items() if dtype not in DTYPES]
            if unsupported:
                raise ModelError(
                    f"{file}: {unsupported[0]}: weights are read in {', '.join(DTYPES)}; take an unquantised release"
                )
        except (SafetensorError, OSError) as error:
            if file.is_file() and is_lfs_pointer(file):
                raise ModelError(f"{file}: a pointer of Git LFS; `git lfs pull` in that folder brings the weights") from None
            raise ModelError(f"{file}: missing or cut short ({error}); delete the folder and obtain it again") from None
    return files


def parameter_count(path: Path) -> int:
    """Number of stored parameters; tied ones count once."""
    total = 0
    for file in weight_files(path):
        with safe_open(file, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


def record(
    path: Path, role: Literal["teacher", "student"], origin: str, revision: str | None, visual_tokens: int | None
) -> ModelRecord:
    """Index record of one model, named after its folder."""
    return ModelRecord(
        name=path.name,
        role=role,
        path=path.as_posix(),
        origin=origin,
        revision=revision,
        parameters=parameter_count(path),
        size_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        sha256=sha256([path]),
        visual_tokens=visual_tokens,
    )
