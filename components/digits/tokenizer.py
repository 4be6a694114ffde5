"""Processor of the embedded family: a word-level tokenizer of the training split's words, and a SigLIP image processor."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from components.models.template import ASSISTANT, EOS, IMAGE, USER, Template

PAD, UNKNOWN = "<pad>", "<unk>"
SPECIAL = (PAD, UNKNOWN, EOS, IMAGE)
PIECES = Regex(rf"{USER}|{ASSISTANT}|\w+|[^\w\s]|\n")  # words, punctuation marks, newline after the image; no spaces


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of all words and marks in `texts`; its vocabulary is sorted, so their order is irrelevant."""
    split = pre_tokenizers.Split(PIECES, behavior="removed", invert=True)
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    entries = [*SPECIAL, *sorted(words | {USER, ASSISTANT, "\n"})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, without one before punctuation
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right",  # saved only if set here
    )


def build_processor(texts: Iterable[str], template: Template, image_px: int, patch_px: int) -> LlavaProcessor:
    """LLaVA processor for square images of `image_px`, with one visual token per patch of `patch_px`."""
    tokenizer = build_tokenizer([*texts, template.system])
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": image_px, "width": image_px}),
        tokenizer=tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=template.jinja,
    )
