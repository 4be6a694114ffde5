"""Benchmark inputs: pairs of models of known shape with random weights, and a batch of random tokens and pixels.

Nothing is downloaded and no tokenizer is needed: speed and memory follow from shapes, and from how many different tokens
are drawn, which `script` fixes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen2Config, SiglipVisionConfig

from components.align_ti.batch import Batch
from components.cost.shapes import LANGUAGE_MODELS, SIGLIP, Language, Tower
from components.cost.step import ALTERNATIVES

PAD, EOS, IMAGE, FIRST_WORD = 0, 1, 2, 3
DRAWS = 4
ROWS = 64  # visual rows drawn per image, for L_iva over drawn rows

# Distinct alternatives per response step that are neither gold nor EOS, of d = 4: measured with a prototype of the digits
# recipe, at the start of distillation and for a student that has learnt the task. The last is the maximum.
START, TRAINED, WORST = ALTERNATIVES, 0.20, 4.0


@dataclass(frozen=True)
class Size:
    """Shapes of a student and a teacher, and of their batch."""

    name: str
    about: str
    tower: Tower
    student: Language
    teacher: Language
    batch: int
    instruction: int  # tokens after the image
    response: int  # tokens of the longest; the others are down to half as long
    repeats: int
    bf16: bool = False  # teacher in bf16, student float32 under bf16 autocast, as `distill` runs `precision: bf16`

    @property
    def prompt(self) -> int:
        return 1 + self.tower.tokens + self.instruction

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def shared_vocabulary(self) -> int:
        return min(self.student.vocabulary, self.teacher.vocabulary)


SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            about="the digits recipe: a 64-wide student, a 128-wide teacher, 3 layers each, 16 visual tokens, V = 128",
            tower=Tower(hidden=64, layers=2, heads=4, mlp=128, image_px=64, patch_px=16),
            student=Language(hidden=64, layers=3, heads=4, kv_heads=4, mlp=128, vocabulary=128),
            teacher=Language(hidden=128, layers=3, heads=4, kv_heads=4, mlp=256, vocabulary=128),
            batch=32,
            instruction=12,
            response=8,
            repeats=40,
        ),
        Size(
            name="small",
            about="a 125M student and a 223M teacher, 30 deep and thin layers each, 100 visual tokens, V = 32,000",
            tower=Tower(hidden=192, layers=4, heads=4, mlp=768, image_px=140, patch_px=14),
            student=Language(hidden=576, layers=30, heads=9, kv_heads=3, mlp=1536, vocabulary=32_000),
            teacher=Language(hidden=768, layers=30, heads=12, kv_heads=4, mlp=2048, vocabulary=32_000),
            batch=2,
            instruction=12,
            response=20,
            repeats=4,
        ),
        Size(
            name="paper",
            about="Qwen2.5 shapes: a 7B teacher and a 1.5B student, SigLIP so400m, 729 visual tokens, V = 151,936",
            tower=replace(SIGLIP, image_px=378),
            student=LANGUAGE_MODELS["Qwen/Qwen2.5-1.5B"],
            teacher=LANGUAGE_MODELS["Qwen/Qwen2.5-7B"],
            batch=4,
            instruction=48,
            response=128,
            repeats=9,
            bf16=True,
        ),
    )
}


def llava(language: Language, tower: Tower, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """LLaVA with random weights and fused attention, created on `device`; its vision tower is frozen.

    The tower's weights depend on its shape alone, so that teacher and student carry the same one, as in the paper.
    """
    vision = SiglipVisionConfig(
        hidden_size=tower.hidden,
        intermediate_size=tower.mlp,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_px,
        patch_size=tower.patch_px,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=language.hidden,
        intermediate_size=language.mlp,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.kv_heads,
        vocab_size=language.vocabulary,
        tie_word_embeddings=language.tied,
        max_position_embeddings=4096,
        initializer_range=language.hidden**-0.5,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        image_seq_length=tower.tokens,
        tie_word_embeddings=language.tied,
    )
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            if parameter.ndim > 1:  # drawn on the CPU in float32, so that both models get the same whatever their dtype
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    model.model.vision_tower.requires_grad_(False)
    return model


@dataclass(frozen=True)
class Sample:
    prompt: Tensor
    answer: Tensor  # ends in EOS
    pixels: Tensor | None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def samples(size: Size) -> list[Sample]:
    """Samples of one image, one instruction and one response; prompts are of one length."""
    generator = torch.Generator().manual_seed(0)
    B, P, px = size.batch, size.prompt, size.tower.image_px
    ids = torch.randint(FIRST_WORD, size.student.vocabulary, (B, P + size.response), generator=generator)
    ids[:, 1 : 1 + size.tower.tokens] = IMAGE
    lengths = P + torch.linspace(size.response, (size.response + 1) // 2, B).round().long()
    ids[torch.arange(B), lengths - 1] = EOS
    pixels = torch.randn(B, 3, px, px, generator=generator)
    return [Sample(row[:P], row[P:length], image) for row, length, image in zip(ids, lengths, pixels, strict=True)]


def collate(group: list[Sample]) -> Batch:
    """Batch with right padding."""
    ids = pad_sequence([torch.cat([s.prompt, s.answer]) for s in group], batch_first=True, padding_value=PAD)
    column = torch.arange(ids.shape[1])
    prompt_lengths, lengths = (
        torch.tensor(lengths)[:, None] for lengths in ([len(s.prompt) for s in group], [len(s) for s in group])
    )
    visual = ids == IMAGE
    return Batch(
        ids=[str(row) for row in range(len(ids))],
        input_ids=ids,
        attention_mask=(column < lengths).long(),
        response=(column >= prompt_lengths) & (column < lengths),
        instruction=(column < prompt_lengths) & ~visual & (visual.cumsum(1) > 0),
        pictures=visual.long(),
        pixel_values=_pixels(group),
    )


def trl_inputs(group: list[Sample], tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a pass as TRL's collator makes them: prompts left-padded, answers right-padded; `tokens` of the whole step."""
    prompts = pad_sequence([s.prompt for s in group], batch_first=True, padding_value=PAD, padding_side="left")
    answers = pad_sequence([s.answer for s in group], batch_first=True, padding_value=PAD)
    inputs = {"prompt_ids": prompts, "completion_ids": answers, "num_items_in_batch": torch.tensor(tokens)}
    inputs |= {"prompt_mask": (prompts != PAD).long(), "completion_mask": (answers != PAD).long()}
    if (pixels := _pixels(group)) is not None:
        inputs["pixel_values"] = pixels
    return {name: value.to(device) for name, value in inputs.items()}


def _pixels(group: list[Sample]) -> Tensor | None:
    images = [sample.pixels for sample in group if sample.pixels is not None]
    return torch.stack(images) if images else None


def batch(size: Size, device: torch.device) -> Batch:
    return collate(samples(size)).to(device)


def script(batch: Batch, distinct: float, vocabulary: int) -> Tensor:
    """(N, d) draws for the N response steps: on average `distinct` different ones per step that are neither gold nor EOS.

    Step i has floor((i + 1) distinct) - floor(i distinct) of them, once each; its other draws are the gold token. The ribbon of
    a student of that entropy has as many rows.
    """
    gold = batch.input_ids[batch.response].tolist()
    generator = torch.Generator().manual_seed(1)
    words = vocabulary - FIRST_WORD
    rows = []
    for i, token in enumerate(gold):
        others = int((i + 1) * distinct) - int(i * distinct)
        start = int(torch.randint(words, (1,), generator=generator))
        candidates = [FIRST_WORD + (start + j) % words for j in range(DRAWS + 1)]
        rows.append(([c for c in candidates if c != token][:others] + [token] * DRAWS)[:DRAWS])
    return torch.tensor(rows, device=batch.input_ids.device)
