"""Open checkpoint folders, and refuse pairs that cannot be distilled, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from components.errors import ModelError
from components.models.collate import check_special_tokens, visual_tokens
from components.models.folder import weight_files


@dataclass(frozen=True)
class Loaded:
    """A LLaVA-like model in eval mode and its processor."""

    model: Any
    processor: Any

    @property
    def name(self) -> str:
        """The folder it came from."""
        return str(self.model.name_or_path)

    @property
    def vocabulary(self) -> int:
        """Columns of the head."""
        return int(self.model.get_output_embeddings().weight.shape[0])


def load_processor(path: Path) -> Any:
    """The folder's processor, padding on the right. Raises ModelError if it cannot be read."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no usable processor: {_first_line(error)}") from None
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "right"
    return processor


def load(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    quantised: Literal["int8", "nf4"] | None = None,
) -> Loaded:
    """Open a checkpoint folder: safetensors only, no remote code, no network, fused attention, eval mode.

    Args:
        dtype: of the weights, or of the arithmetic where the language model's linear layers are `quantised` (bitsandbytes).

    Raises ModelError if the folder is missing or incomplete, is no image-text model, wants code of its own, or lacks
    weights that the model needs (which transformers would fill with random numbers).
    """
    from transformers import AutoModelForImageTextToText

    weight_files(path)
    processor = load_processor(path)
    try:
        opened: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            **(_quantised(quantised, device, dtype) if quantised else {}),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be opened as an image-text model: {_first_line(error)}") from None
    model, report = opened
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ModelError(f"{path}: {len(absent)} weights are missing or of another shape, the first is {absent[0]}")
    return Loaded((model if quantised else model.to(device)).eval(), processor)


def _quantised(kind: Literal["int8", "nf4"], device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Only the language model's linear layers: the head's rows are needed in float, and the tower's may be the student's."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "vision_tower", "multi_modal_projector"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def check_pair(teacher: Loaded, student: Loaded) -> int:
    """The size of the vocabulary that the two share: the columns that both heads are cut to (METHOD.md, "Shared vocabulary").

    Raises ModelError, naming the models, if the image token is missing, pad == EOS, the two see different visual tokens or
    pixels, or their tokenizers mean different strings by one id.
    """
    from PIL import Image

    for loaded in (teacher, student):
        _check_image_token(loaded)
    between = f"teacher {teacher.name} and student {student.name}"
    counts = [visual_tokens(loaded.processor) for loaded in (teacher, student)]
    if counts[0] != counts[1]:
        raise ModelError(
            f"{between}: {counts[0]} and {counts[1]} visual tokens per image; alignment is token by token, so they must agree"
        )
    shared = _shared_vocabulary(teacher, student, between)
    for role in ("image_token_id", "eos_token_id", "pad_token_id"):
        ids = [getattr(x.processor if role == "image_token_id" else x.processor.tokenizer, role) for x in (teacher, student)]
        if ids[0] != ids[1]:
            raise ModelError(f"{between}: {role} is {ids[0]} and {ids[1]}; both read the same batch, so they must agree")
    probe = [Image.linear_gradient("L").convert("RGB")]
    pixels = [x.processor.image_processor(images=probe, return_tensors="pt")["pixel_values"] for x in (teacher, student)]
    if pixels[0].shape != pixels[1].shape or not torch.allclose(pixels[0], pixels[1], atol=1e-3):
        raise ModelError(f"{between}: their image processors prepare the same image differently (size, mean or std)")
    return shared


def check_layer(teacher: Loaded, layer: int) -> None:
    """Raises ModelError if the teacher has no such layer to look at."""
    layers: int = teacher.model.config.get_text_config().num_hidden_layers
    if layer >= layers:
        raise ModelError(f"iva.layer is {layer}, but teacher {teacher.name} has layers 0..{layers - 1}")


def _check_image_token(loaded: Loaded) -> None:
    check_special_tokens(loaded.processor)
    wanted = getattr(loaded.model.config, "image_token_id", None)
    if wanted != loaded.processor.image_token_id:
        raise ModelError(
            f"{loaded.name}: the model's image token is {wanted}, the processor's is {loaded.processor.image_token_id} "
            f"({loaded.processor.image_token!r}); the image token is missing on one side"
        )


def _shared_vocabulary(teacher: Loaded, student: Loaded, between: str) -> int:
    columns = min(teacher.vocabulary, student.vocabulary)
    names = [{i: token for token, i in x.processor.tokenizer.get_vocab().items()} for x in (teacher, student)]
    ends = min(max(entries) + 1 for entries in names)
    for i in range(columns):
        a, b = (entries.get(i) for entries in names)
        if a != b:
            if i >= ends and None in (a, b):  # one tokenizer is longer: what lies beyond is not shared
                return i
            raise ModelError(f"{between}: their tokenizers disagree, first at id {i}: {a!r} and {b!r}")
    return columns


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
