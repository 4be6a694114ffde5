"""Loading of checkpoint folders, and compatibility checks of teacher and student before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from components.dataset.shards import Turn
from components.errors import ModelError
from components.models.checkpoint_folder import LOCAL, as_model_error, check_loading_info, config_of, weight_files
from components.models.collate import check_special_tokens
from components.models.families import Family, family_of, reads_one_layer
from components.models.image_processor import Processed, processed, shapes, visual_id, visual_tokens
from components.models.processor import load_processor
from components.models.template import IMAGE, Template

if TYPE_CHECKING:
    from components.config.models import Template as TemplateSettings


@dataclass(frozen=True)
class Loaded:
    """Vision-language model and its processor; `load` returns it in eval mode."""

    model: Any
    processor: Any

    @property
    def name(self) -> str:
        """Checkpoint folder."""
        return str(self.model.name_or_path)

    @property
    def vocabulary(self) -> int:
        """Number of columns of the head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)


def load(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    quantised: Literal["int8", "nf4"] | None = None,
) -> Loaded:
    """Open a checkpoint folder: safetensors only, no remote code, no network, fused attention, eval mode.

    Args:
        dtype: of the weights, or of the arithmetic where the language model's linear layers are `quantised` (bitsandbytes).

    Raises ModelError if the folder is missing or incomplete, is no image-text model, needs remote code, or lacks weights
    of the model (which transformers would initialise at random).
    """
    from transformers import AutoModelForImageTextToText

    weight_files(path)
    with as_model_error(f"{path}: cannot be opened as an image-text model"):
        config = config_of(path)
        processor = load_processor(path)
        model_and_info: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            **(_quantised(quantised, device, dtype, family_of(config)) if quantised else {}),
            use_safetensors=True,
            output_loading_info=True,
            **LOCAL,
        )
    model, loading_info = model_and_info
    check_loading_info(loading_info, path)
    _check_embeddings(model, processor.tokenizer, path)
    return Loaded((model if quantised else model.to(device)).eval(), processor)


def _check_embeddings(model: Any, tokenizer: Any, path: Path) -> None:
    """Raises ModelError if a token has no embedding: a text with it would end in an IndexError, on CUDA in worse."""
    last, token = max((i, token) for token, i in tokenizer.get_vocab().items())
    rows = len(model.get_input_embeddings().weight)
    if last >= rows:
        raise ModelError(
            f"{path}: its tokenizer has tokens up to id {last} ({token!r}), and the model embeddings for {rows}; save it again"
            " after resize_token_embeddings(len(tokenizer))"
        )


def check_kind(path: Path) -> None:
    """Raises ModelError if the folder's model family is not supported; reads the configuration alone."""
    with as_model_error(f"{path}: its config.json cannot be read"):
        config = config_of(path)
    family_of(config)


def _attention(config: Any) -> str | dict[str, str]:
    """Attention implementation: fused, or eager for language models with score capping (Gemma 2), which SDPA lacks."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"} if capped else "sdpa"


def _quantised(kind: Literal["int8", "nf4"], device: torch.device | str, dtype: torch.dtype, family: Family) -> dict[str, Any]:
    """Loading arguments that quantise the language model's linear layers alone: the student may share the vision tower."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=family.unquantised,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def grids(teacher: Loaded, student: Loaded) -> tuple[int, int] | None:
    """Sides of the teacher's and the student's grid of visual tokens, if they differ; None if they do not.

    Raises ModelError if they differ and one is not square, or depends on the image's shape.
    """
    counts = [visual_tokens(loaded.processor) for loaded in (teacher, student)]
    if counts[0] == counts[1]:
        return None
    sides = [0 if count is None else math.isqrt(count) for count in counts]
    if any(side * side != count for side, count in zip(sides, counts, strict=True)):
        texts = ["a number that goes by its shape" if count is None else f"{count}" for count in counts]
        raise ModelError(
            f"teacher {teacher.name} and student {student.name}: an image has {texts[0]} and {texts[1]} visual tokens; rows of"
            " one have no counterpart in the other unless both grids are squares of one size for all images"
        )
    return sides[0], sides[1]


def check_pair(teacher: Loaded, student: Loaded, own_images: bool = False) -> int:
    """Size of the shared vocabulary: the columns that both heads are cut to (docs/method.md, "Shared vocabulary").

    Args:
        own_images: each model has its own image inputs (distill/resample_visual_tokens.py), so these need not agree.

    Raises ModelError, naming the models, if a family is not supported, the image token is missing, pad == EOS, a model and its
    processor differ in visual tokens per image, teacher and student differ in visual tokens or pixels, or their tokenizers
    map one id to different strings.
    """
    for loaded in (teacher, student):
        check_images(loaded)
    return check_processors(teacher, student, own_images)


def check_processors(teacher: Loaded, student: Loaded, own_images: bool = False) -> int:
    """As `check_pair`, from processors and head sizes alone."""
    models = f"teacher {teacher.name} and student {student.name}"
    images = [] if own_images else [[processed(loaded.processor, image) for loaded in (teacher, student)] for image in shapes()]
    for teacher_image, student_image in images:
        counts = [_count_visual_tokens(loaded, image) for loaded, image in ((teacher, teacher_image), (student, student_image))]
        if counts[0] != counts[1]:
            raise ModelError(
                f"{models}: {counts[0]} and {counts[1]} visual tokens per image; alignment is token by token: they must agree"
            )
    shared = _shared_vocabulary(teacher, student, models)
    for role in ("image token id", "eos_token_id", "pad_token_id"):
        ids = [
            visual_id(x.processor) if role == "image token id" else getattr(x.processor.tokenizer, role)
            for x in (teacher, student)
        ]
        if ids[0] != ids[1]:
            raise ModelError(f"{models}: {role} is {ids[0]} and {ids[1]}; both read the same batch, so they must agree")
    for teacher_image, student_image in images:
        if teacher_image.texts != student_image.texts or not _same_tensors(teacher_image.tensors, student_image.tensors):
            raise ModelError(f"{models}: their image processors prepare the same image differently (size, mean or std)")
    return shared


def check_same_template(teacher: Loaded, student: Loaded, settings: TemplateSettings) -> None:
    """Raises ModelError if the chat templates of the two render a conversation differently."""
    if settings.style == "vicuna":
        return
    turns = (Turn(f"{IMAGE}What?", "This."), Turn("And?", "That."))
    texts = [
        Template.from_settings(settings).of(loaded.processor).render(turns, ["<image>"]).text for loaded in (teacher, student)
    ]
    if texts[0] != texts[1]:
        raise ModelError(
            f"teacher {teacher.name} and student {student.name}: their chat templates write one conversation differently,"
            f" {texts[0]!r} and {texts[1]!r}; set template.style: vicuna"
        )


def check_images(loaded: Loaded) -> None:
    """Compatibility check of a model and its own processor.

    Raises ModelError if the family is not supported, the image token is missing on one side, LLaVA-1.5's number of visual
    tokens depends on the image, or the processor writes another number of visual tokens than the model has features.
    """
    family_of(loaded.model.config)
    check_special_tokens(loaded.processor)
    model_id, processor_id = getattr(loaded.model.config, "image_token_id", None), visual_id(loaded.processor)
    if model_id != processor_id:
        raise ModelError(
            f"{loaded.name}: the model's image token is {model_id}, the processor's is {processor_id} "
            f"({loaded.processor.image_token!r}); the image token is missing on one side"
        )
    if reads_one_layer(loaded.model) and visual_tokens(loaded.processor) is None:
        raise ModelError(f"{loaded.name}: the number of visual tokens varies with the image's shape, which LLaVA-1.5's cannot")
    device, dtype = loaded.model.device, loaded.model.dtype
    for example in shapes()[:2]:
        image = processed(loaded.processor, example)
        tensors = {name: tensor.to(device) for name, tensor in image.tensors.items()}
        tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
        with torch.inference_mode():
            features = loaded.model.model.get_image_features(**tensors, return_dict=True).pooler_output
        feature_count = sum(
            math.prod(part.shape[:-1]) for part in ([features] if isinstance(features, torch.Tensor) else features)
        )
        token_count = _count_visual_tokens(loaded, image)
        if feature_count != token_count:
            raise ModelError(
                f"{loaded.name}: its processor writes {token_count} image tokens for {example.width} x {example.height}"
                f" pixels, and the model makes {feature_count} features of it; the processor's files are not this model's"
            )


def _count_visual_tokens(loaded: Loaded, image: Processed) -> int:
    return loaded.processor.tokenizer.encode("".join(image.texts), add_special_tokens=False).count(visual_id(loaded.processor))


def _same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.allclose(first[name].float(), second[name].float(), atol=1e-3)
        for name in first
    )


def check_layer(teacher: Loaded, layer: int) -> None:
    """Raises ModelError if the teacher has no such layer."""
    if layer >= teacher.layers:
        raise ModelError(f"iva.layer is {layer}, but teacher {teacher.name} has layers 0..{teacher.layers - 1}")


def _shared_vocabulary(teacher: Loaded, student: Loaded, models: str) -> int:
    columns = min(teacher.vocabulary, student.vocabulary)
    vocabularies = [{i: token for token, i in x.processor.tokenizer.get_vocab().items()} for x in (teacher, student)]
    smallest = min(max(vocabulary) + 1 for vocabulary in vocabularies)
    for i in range(columns):
        a, b = (vocabulary.get(i) for vocabulary in vocabularies)
        if a != b:
            if i >= smallest and None in (a, b):  # one tokenizer is longer: the rest is not shared
                return i
            raise ModelError(f"{models}: their tokenizers disagree, first at id {i}: {a!r} and {b!r}")
    return columns
