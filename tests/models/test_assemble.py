"""LLaVA from its parts: what stock transformers opens is what the parts are, token by token and weight by weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from components.config.models import Checkpoint, Parts
from components.errors import ModelError
from components.io import sha256
from components.models.assemble import assemble
from components.models.collate import Collator
from components.models.load import check_images, check_pair, load
from components.models.template import Template
from tests.families.parts import PX, qwen_folder, siglip_folder
from tests.models.conftest import png, sample

LOCAL = Checkpoint(source="", revision=None)
PARTS = Parts(tower=LOCAL, language_model=LOCAL, feature_layer=-2, seed=1)
PIXELS = torch.randn(1, 3, PX, PX, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return siglip_folder(tmp_path_factory.mktemp("hub") / "siglip")


LANGUAGES: dict[str, dict[str, Any]] = {
    "qwen2.5": {"kind": "qwen2"},
    "qwen2.5, tied": {"kind": "qwen2", "tied": True, "chat": True},
    "qwen3": {"kind": "qwen3", "tied": True},
    "no room": {"kind": "qwen2", "spare": 0, "pads": ()},
    "no room, tied": {"kind": "qwen3", "spare": 1, "pads": (), "tied": True},
}


@pytest.mark.parametrize("case", LANGUAGES)
def test_it_is_the_parts_and_a_projector(case: str, tower: Path, tmp_path: Path) -> None:
    folder = qwen_folder(tmp_path / "qwen", **LANGUAGES[case])
    output = assemble(tower, folder, PARTS, "", tmp_path / "students/made")
    llava, report = tf.AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert type(llava) is tf.LlavaForConditionalGeneration and not any(
        report[key] for key in ("missing_keys", "unexpected_keys")
    )
    language, siglip = tf.AutoModelForCausalLM.from_pretrained(folder), tf.SiglipModel.from_pretrained(tower)

    tokenizer, qwen = tf.AutoProcessor.from_pretrained(output).tokenizer, tf.AutoTokenizer.from_pretrained(folder)
    text = "USER: what digit is at a1 ? ASSISTANT: two"
    ids = qwen(text, return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer(text, return_tensors="pt").input_ids)
    rows = language.config.vocab_size
    torch.testing.assert_close(llava(input_ids=ids).logits[..., :rows], language(input_ids=ids).logits)

    hidden = siglip.vision_model(PIXELS, output_hidden_states=True).hidden_states[-2]
    projector = llava.model.multi_modal_projector
    expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(hidden)))
    features = llava.model.get_image_features(pixel_values=PIXELS, return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), expected)

    vocabulary = set(qwen.get_vocab().values())
    assert llava.config.image_token_id not in vocabulary and tokenizer.eos_token == "<|endoftext|>" != tokenizer.pad_token
    fits = len(qwen) + 1 + ("pads" in LANGUAGES[case]) <= rows
    assert llava.lm_head.weight.shape[0] == (rows if fits else len(tokenizer))
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) == LANGUAGES[case].get("tied", False)


def test_a_conversation_of_it_is_the_papers(tower: Path, tmp_path: Path) -> None:
    folder = assemble(tower, qwen_folder(tmp_path / "qwen", chat=True), PARTS, "A chat.", tmp_path / "students/made")
    student = load(folder, "cpu")
    check_images(student)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what digit ?"}]}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "two"}]})
    written = student.processor.apply_chat_template(messages, tokenize=False)
    assert written == "A chat. USER: <image>\nwhat digit ? ASSISTANT: two<|endoftext|>"
    batch = Collator(student.processor, Template("A chat."), 200, train=True)([sample(("what digit ?", "two"))])
    tokenizer = student.processor.tokenizer
    assert int(batch.visual.sum()) == 4 and tokenizer.decode(batch.input_ids[batch.response]) == " two<|endoftext|>"
    text, image = student.model.config.text_config, png(0)
    assert image and (text.eos_token_id, text.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ends = student.model.generation_config
    assert ends.eos_token_id == tokenizer.eos_token_id and not ends.do_sample  # the parts' own sampling is not the paper's


def test_the_same_parts_are_the_same_bytes_wherever_they_lie(tower: Path, tmp_path: Path) -> None:
    first = qwen_folder(tmp_path / "qwen")
    output = assemble(tower, first, PARTS, "", tmp_path / "a/made")
    torch.randn(3)
    shutil.copytree(first, tmp_path / "elsewhere")
    again = assemble(shutil.copytree(tower, tmp_path / "tower"), tmp_path / "elsewhere", PARTS, "", tmp_path / "b/made")
    assert sha256([output]) == sha256([again])
    other = assemble(tower, first, PARTS.model_copy(update={"seed": 2}), "", tmp_path / "c/made")
    assert sha256([other]) != sha256([output])
    assert sorted(path.name for path in output.glob("LICENSE*")) == ["LICENSE.tower"]


def test_parts_keep_the_precision_that_they_are_stored_in(tower: Path, tmp_path: Path) -> None:
    half = qwen_folder(tmp_path / "qwen", dtype=torch.bfloat16)
    output = assemble(tower, half, PARTS, "", tmp_path / "a/made")
    from safetensors import safe_open

    with safe_open(output / "model.safetensors", framework="pt") as stored:
        kinds = {(key.split(".")[0], stored.get_slice(key).get_dtype()) for key in stored.keys()}  # noqa: SIM118
    assert kinds == {("language_model", "BF16"), ("vision_tower", "F32"), ("multi_modal_projector", "F32")}
    assert tf.AutoModelForImageTextToText.from_pretrained(output).dtype == torch.float32  # as the most exact of them is


def test_a_teacher_of_parts_teaches_a_student_of_parts(tower: Path, tmp_path: Path) -> None:
    vision = siglip_folder(tmp_path / "vision", with_text=False)
    folders = [
        assemble(vision, qwen_folder(tmp_path / f"q{hidden}", "qwen3", hidden=hidden, spare=spare), PARTS, "", tmp_path / name)
        for name, hidden, spare in (("teacher", 48, 24), ("student", 32, 8))
    ]
    teacher, student = (load(folder, "cpu") for folder in folders)
    assert check_pair(teacher, student) == student.vocabulary < teacher.vocabulary


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parts_of_another_kind_are_refused_in_one_sentence(tower: Path, tmp_path: Path) -> None:
    language = qwen_folder(tmp_path / "qwen")
    cases = [
        ((language, language, PARTS), "is of type 'qwen2'; a SigLIP tower is of type siglip or siglip_vision_model"),
        ((tower, tower, PARTS), "is of type 'siglip'; a Qwen language model is of type qwen2 or qwen3"),
        ((tower, language, PARTS.model_copy(update={"feature_layer": -5})), "feature_layer is -5, and the tower has 3 layers"),
        ((tower, tmp_path / "none", PARTS), "no such folder"),
    ]
    small = shutil.copytree(tower, tmp_path / "small")
    tf.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(small)
    cases.append(((small, language, PARTS), r"makes {'height': 32, 'width': 32}, and its tower takes 16 x 16 pixels"))
    blind = shutil.copytree(tower, tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    cases.append(((blind, language, PARTS), "no usable image processor"))
    mute = shutil.copytree(language, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    cases.append(((tower, mute, PARTS), "tokenizer"))
    deep = shutil.copytree(language, tmp_path / "deep")
    edited(deep, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    cases.append(((tower, deep, PARTS), r"weights are missing or of another shape"))
    for (eyes, words, parts), message in cases:
        with pytest.raises(ModelError, match=message) as refusal:
            assemble(eyes, words, parts, "", tmp_path / "made")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "made").exists()
