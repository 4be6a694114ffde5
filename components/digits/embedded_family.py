"""Embedded family: tiny LLaVA teachers and students, built and trained from the prepared data alone.

1. a tokenizer of the training split's words;  2. a vision tower, trained on cell labels, then frozen and shared;
3. teacher candidates of several sizes, trained on captions, then conversations;  4. students trained on captions alone, as
the paper's students are after stage 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from components.align_ti.batch import Batch
from components.config.models import Conversations, EmbeddedFamily, LanguageShape, ModelsSettings, Training
from components.config.runtime import RuntimeSettings
from components.dataset.shards import CAPTION, Sample, Samples, Turn
from components.digits.tokenizer import build_processor
from components.digits.tower import cell_words, encode, new_tower, train_tower
from components.digits.train_loop import Log, epochs, fit
from components.errors import DataError, ModelError
from components.models.collate import Collator
from components.models.image_processor import decode_first_image, visual_tokens
from components.models.rendered import question_of
from components.models.template import IMAGE, Template
from components.models.vlm import VLM
from components.process import shared_out
from components.runtime import models_at_once, prepare_torch

PRECOMPUTED = b""  # placeholder of an image with precomputed features


@dataclass(frozen=True)
class Corpus:
    """Training split in memory: decoded images, their captions and their other turns."""

    images: Tensor  # (N, 3, H, W) uint8
    captions: list[list[Sample]]  # per image; the first one describes every cell
    turns: list[list[Turn]]  # per image, all but its first caption; questions without image marks

    @property
    def texts(self) -> Iterator[str]:
        for turn in (turn for first, *_ in self.captions for turn in first.turns):
            yield f"{question_of(turn)} {turn.answer}"
        for turn in (turn for turns in self.turns for turn in turns):
            yield f"{turn.question} {turn.answer}"


def read_corpus(samples: Samples) -> Corpus:
    """Training corpus. Raises DataError if an image lacks a caption or question, or is not a square of the common size."""
    images, captions, turns = [], [], []
    for row in tqdm(range(samples.images), desc="training split", unit="image"):
        group = samples.about(row)
        image_captions = [sample for sample in group if sample.kind == CAPTION and sample.image is not None]
        question_turns = [turn for sample in group if sample.kind != CAPTION for turn in sample.turns]
        if not image_captions or not question_turns:
            raise DataError(
                f"image {group[0].image_id}: the embedded family learns from images that each have a caption and questions;"
                " use `source: digits`, or `family: pretrained`"
            )
        images.append(np.asarray(decode_first_image(image_captions[0])))
        captions.append(image_captions)
        caption_turns = [turn for sample in image_captions[1:] for turn in sample.turns]
        turns.append([Turn(question_of(turn), turn.answer) for turn in question_turns + caption_turns])
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or len(set(images[0].shape[:2])) != 1:
        raise DataError(f"the embedded family needs square images of one size; found (height, width, 3) {sorted(shapes)[:3]}")
    return Corpus(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), captions, turns)


@dataclass(frozen=True)
class Family:
    """Shared inputs of all members of the family, picklable for the training processes."""

    settings: ModelsSettings
    runtime: RuntimeSettings
    tower: SiglipVisionConfig
    tower_weights: dict[str, Tensor]
    processor: LlavaProcessor
    features: np.ndarray[Any, np.dtype[np.float32]]  # (N, Nv, d) of the training images
    captions: list[list[Sample]]
    turns: list[list[Turn]]
    folder: Path


def build(settings: ModelsSettings, samples: Samples, folder: Path, runtime: RuntimeSettings, log: Log) -> None:
    """Build, train and save the family under `folder`/teachers and `folder`/students.

    Deterministic from `settings.embedded.seed`; each model has its own random stream, so that neither a further candidate nor
    training in parallel, in as many processes as there are cores, changes the others.
    """
    shapes = settings.embedded
    assert shapes is not None
    device = prepare_torch(runtime, shapes.seed)
    corpus = read_corpus(samples)
    template = Template.from_settings(settings.template)
    processor = build_processor(corpus.texts, template, corpus.images.shape[-1], shapes.tower.patch_px)
    collator = Collator(processor, template, settings.max_length, train=True)
    tower = _train_tower(shapes, corpus, collator, device, log)
    features = encode(tower, corpus.images, device).cpu().numpy()
    tower_weights = tower.cpu().state_dict()
    family = Family(settings, runtime, tower.config, tower_weights, processor, features, corpus.captions, corpus.turns, folder)
    jobs = [(family, role, name) for role in ("teachers", "students") for name in getattr(shapes, role)]
    for losses in shared_out(train_member, jobs, models_at_once(runtime, device)):
        for loss in losses:
            log(*loss)


def train_member(family: Family, role: str, name: str) -> list[tuple[str, float, int]]:
    """Train and save one member; returns its losses as (name, loss, step)."""
    shapes, losses = family.settings.embedded, list[tuple[str, float, int]]()
    assert shapes is not None
    device = prepare_torch(family.runtime, shapes.seed)
    collator = Collator(
        family.processor, Template.from_settings(family.settings.template), family.settings.max_length, train=True
    )
    tower = SiglipVisionModel(family.tower)
    tower.load_state_dict(family.tower_weights)
    generator = _seeded_generator(shapes.seed, role, name)
    model = new_model(getattr(shapes, role)[name], tower, family.processor)
    model.to(device)  # type: ignore[arg-type]
    features = torch.from_numpy(family.features).to(device)
    trainer = LanguageTrainer(model, features, collator, generator, f"{role[:-1]} {name}", lambda *loss: losses.append(loss))
    if role == "teachers":
        trainer.captions(family.captions, shapes.teacher_captions)
        trainer.conversations(family.turns, shapes.teacher_instructions)
    else:
        trainer.captions(family.captions, shapes.student_captions)
    for part in (model, family.processor):
        part.save_pretrained(family.folder / role / name)
    return losses


def new_model(shape: LanguageShape, tower: SiglipVisionModel, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """LLaVA with a frozen copy of `tower` and an untrained Qwen3 language model with tied embeddings."""
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        raise ModelError(f"hidden {shape.hidden} must divide by heads {shape.heads}, and heads by kv_heads {shape.kv_heads}")
    tokenizer = processor.tokenizer
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,  # wide, as the embeddings of about a hundred words are also the head
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=visual_tokens(processor),  # type: ignore[arg-type]  # all images have one size
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


@dataclass
class LanguageTrainer:
    """Training of projector and language model on precomputed features of the frozen tower."""

    model: LlavaForConditionalGeneration
    features: Tensor  # (N, Nv, d) features of the training images
    collator: Collator
    generator: torch.Generator
    name: str
    log: Log

    def captions(self, captions: list[list[Sample]], training: Training) -> None:
        """Train on one random caption per image and step."""

        def draw_caption(image: int) -> Sample:
            return captions[image][int(torch.randint(len(captions[image]), (), generator=self.generator))]

        self._fit(draw_caption, training, "captions")

    def conversations(self, turns: list[list[Turn]], training: Conversations) -> None:
        """Train on up to `training.turns` random turns about an image in one sample, in random order.

        The turns share the visual tokens, so a step of eight questions costs hardly more than a step of one.
        """

        def draw_conversation(image: int) -> Sample:
            image_turns = turns[image]
            order = torch.randperm(len(image_turns), generator=self.generator)[: training.turns].tolist()
            opening, *others = (image_turns[index] for index in order)
            first_turn = Turn(f"{IMAGE}\n{opening.question}", opening.answer)
            return Sample(f"conversation about image {image}", "", "", PRECOMPUTED, (first_turn, *others))

        self._fit(draw_conversation, training, "conversations")

    def _fit(self, draw_sample: Any, training: Training, stage: str) -> None:
        batches = epochs(len(self.features), training.batch_size, self.generator)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        vlm = VLM(self.model.train())

        def step_loss(step: int) -> Tensor:
            images = next(batches)
            batch = self.collator.text([draw_sample(image) for image in images]).to(self.features.device)
            return response_loss(vlm, batch, self.features[images])

        fit(trainable, step_loss, training, f"{self.name} {stage}", self.log)
        self.model.eval()


def response_loss(vlm: VLM, batch: Batch, features: Tensor) -> Tensor:
    """Mean cross-entropy of response tokens, in nats; logits are computed at their rows alone."""
    hidden, _ = vlm.plain(batch, features, keep=False)
    rows = batch.response[:, 1:]  # row t predicts token t + 1
    return F.cross_entropy(vlm.head(hidden[:, :-1][rows]), batch.input_ids[:, 1:][rows])


def _train_tower(
    family: EmbeddedFamily, corpus: Corpus, collator: Collator, device: torch.device, log: Log
) -> SiglipVisionModel:
    generator = _seeded_generator(family.seed, "tower")
    tower: SiglipVisionModel = new_tower(family.tower, corpus.images.shape[-1]).to(device)  # type: ignore[arg-type]
    answers = [first.turns[0].answer for first, *_ in corpus.captions]
    count = visual_tokens(collator.processor)
    assert count is not None  # all images of one size
    words = cell_words(collator.tokenizer(answers)["input_ids"], count, family.tower.cell_px // family.tower.patch_px)
    accuracy = train_tower(tower, corpus.images, words, family.tower_training, generator, log)
    print(f"vision tower: reads {accuracy:.1%} of what the captions say of a cell, each word counting the same")
    return tower


def _seeded_generator(seed: int, *names: str) -> torch.Generator:
    """Generator of one part's random stream; also seeds torch's global generator, which initialises weights."""
    derived_seed = int.from_bytes(hashlib.sha256("/".join([str(seed), *names]).encode()).digest()[:7], "big")
    torch.manual_seed(derived_seed)
    return torch.Generator().manual_seed(derived_seed)
