"""LLaVA checkpoint from parts, as in the paper: SigLIP, a new two-layer projector, and Qwen2, Qwen2.5 or Qwen3.

The parts' weights are copied unchanged, each in its stored dtype. SigLIP's head, which LLaVA does not use, is dropped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from components.config.models import Parts
from components.errors import ModelError
from components.models.checkpoint_folder import LOCAL, as_model_error, check_loading_info, weight_files
from components.models.template import EOS, IMAGE, Template

TOWERS = ("siglip", "siglip_vision_model")
LANGUAGE_MODELS = ("qwen2", "qwen3")
PADS = ("<|vision_pad|>", "<pad>")  # in order of preference; the last is added if the vocabulary has neither
LICENCES = ("LICENSE*", "NOTICE*")

Strategy = Literal["full", "default"]


def assemble(tower: Path, language_model: Path, parts: Parts, system: str, target: Path) -> Path:
    """Write a stock LLaVA folder; the same parts give the same bytes.

    Args:
        tower: a SigLIP checkpoint, both towers or the vision tower alone, with its image processor.
        language_model: a Qwen checkpoint with its tokenizer.
        system: text before the first turn, for the chat template.

    Raises ModelError if a part is missing, broken, or of another model type.
    """
    from transformers import AutoImageProcessor

    with tqdm(total=3, desc=f"{target.parent.name} {target.name}", unit="part") as bar:
        vision_tower = _load_part(tower, TOWERS, "a SigLIP tower")
        bar.update()
        causal_lm = _load_part(language_model, LANGUAGE_MODELS, "a Qwen language model")
        bar.update()
        with as_model_error(f"{tower}: no usable image processor"):
            image_processor = AutoImageProcessor.from_pretrained(tower, **LOCAL)
        tokenizer = load_tokenizer(language_model, causal_lm.config)
        processor = build_processor(image_processor, vision_tower, tokenizer, parts.feature_layer, system, tower)
        llava = build_llava(vision_tower, causal_lm, processor, parts.feature_layer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(parts.seed)
            llava.model.multi_modal_projector = type(llava.model.multi_modal_projector)(llava.config)
        llava.save_pretrained(target)
        processor.save_pretrained(target)
        for name, folder in (("tower", tower), ("language_model", language_model)):
            for file in (file for pattern in LICENCES for file in folder.glob(pattern)):
                shutil.copyfile(file, target / f"{file.name}.{name}")
        bar.update()
    return target


def _load_part(path: Path, model_types: tuple[str, ...], description: str) -> Any:
    """Model in its stored dtype. Raises ModelError if its type is none of `model_types` or weights are missing."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig, SiglipVisionConfig

    weight_files(path)
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
    with as_model_error(f"{path}: cannot be opened as {description}"):
        model_type = PreTrainedConfig.get_config_dict(path, local_files_only=True)[0].get("model_type")
        if model_type not in model_types:
            raise ModelError(f"{path}: is of type {model_type!r}; {description} is of type {' or '.join(model_types)}")
        model_class: Any = AutoModelForCausalLM
        if model_types == TOWERS:
            model_class = headless_tower_class()
            options["config"] = SiglipVisionConfig.from_pretrained(path, vision_use_head=False, local_files_only=True)
        model, loading_info = model_class.from_pretrained(path, **LOCAL, **options)
    check_loading_info(loading_info, path)
    return model


def headless_tower_class() -> Any:
    """SigLIP's vision model class, which ignores the weights of the text tower and the head on load."""
    from transformers import SiglipVisionModel

    class Tower(SiglipVisionModel):
        _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(vision_model\.)?head\.", r"^logit_"]  # noqa: RUF012

    return Tower


def load_tokenizer(path: Path, config: Any) -> Any:
    """Tokenizer of the language model of `config`, with an image token and a padding token that is not EOS.

    EOS is `EOS` where the vocabulary has it: released chat models end answers with <|im_end|>, the paper's do not.
    """
    from transformers import AddedToken, AutoTokenizer

    with as_model_error(f"{path}: no usable tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, config=config, **LOCAL)
    text = "USER: what? ASSISTANT: 1, two."
    if not tokenizer.is_fast or tokenizer.decode(tokenizer.encode(text)) != text:
        raise ModelError(f"{path}: its tokenizer does not give back a text that it reads; is it the language model's own?")
    vocabulary = tokenizer.get_vocab()
    if EOS in vocabulary:
        tokenizer.eos_token = EOS
    if tokenizer.eos_token is None:
        raise ModelError(f"{path}: its tokenizer has neither {EOS} nor an EOS token of its own")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": next((pad for pad in PADS if pad in vocabulary), PADS[-1])})
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    tokenizer.padding_side = "right"
    return tokenizer


def build_processor(
    image_processor: Any, tower: Any, tokenizer: Any, feature_layer: int, system: str, path: Path, strategy: Strategy = "full"
) -> Any:
    """LLaVA processor with the chat template. Raises ModelError if image size or `feature_layer` does not fit the tower."""
    from transformers import LlavaProcessor

    vision, side = tower.config, tower.config.image_size
    if (image_processor.size["height"], image_processor.size["width"]) != (side, side):
        raise ModelError(
            f"{path}: its image processor makes {dict(image_processor.size)}, and its tower takes {side} x {side} pixels"
        )
    if not -vision.num_hidden_layers - 1 <= feature_layer <= vision.num_hidden_layers:
        raise ModelError(f"{path}: feature_layer is {feature_layer}, and the tower has {vision.num_hidden_layers} layers")
    processor: Any = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0,
    )
    processor.chat_template = Template(system).of(processor).jinja
    return processor


def _resize_embeddings(language: Any, tokenizer: Any) -> None:
    """Resize embeddings and head for added tokens. Released vocabularies are padded and mostly have spare rows;
    new rows are the mean of the others (Hewitt 2021), so that an added token is an unlikely first token.
    """
    vocabulary_size, old_size = len(tokenizer), language.get_input_embeddings().num_embeddings
    if vocabulary_size <= old_size:
        return
    language.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
        with torch.no_grad():
            layer.weight[old_size:] = layer.weight[:old_size].float().mean(0).to(layer.weight.dtype)


def build_llava(tower: Any, language: Any, processor: Any, feature_layer: int, strategy: Strategy = "full") -> Any:
    """LLaVA of tower and language model, projector on the meta device. Strategy "default" drops each image's first token."""
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer, vision, text = processor.tokenizer, tower.config, language.config
    _resize_embeddings(language, tokenizer)
    special_token_ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text.update({"bos_token_id": None, **special_token_ids})
    text._name_or_path = vision._name_or_path = ""  # local paths do not belong in the checkpoint
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 - (strategy == "default"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = tower
    llava.model.language_model = language.model
    llava.lm_head = language.lm_head
    llava.generation_config = GenerationConfig(**special_token_ids)
    return llava
