import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaProcessor

from components.digits.tokenizer import build_processor
from components.errors import InputError, ModelError
from components.models.checkpoint_folder import INDEX, parameter_count, record
from components.models.load import Loaded, check_pair, load
from components.models.template import Template
from tests.models.conftest import IMAGE_PX, NV, WORDS, bpe_processor, saved, word_processor


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("good"), word_processor())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", word_processor())


def pair(tmp_path: Path, teacher: LlavaProcessor, student: LlavaProcessor, columns: tuple[int, int] = (0, 0)) -> int:
    a = load(saved(tmp_path / "teacher", teacher, columns[0]), "cpu")
    b = load(saved(tmp_path / "student", student, columns[1], hidden=16), "cpu")
    return check_pair(a, b)


def test_round_trip(good: Path) -> None:
    loaded = load(good, "cpu")
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.processor.tokenizer.padding_side == "right"
    assert loaded.name == str(good) and loaded.vocabulary == len(loaded.processor.tokenizer)
    assert (
        type(loaded.model).__name__ == "LlavaForConditionalGeneration" and type(loaded.processor).__name__ == "LlavaProcessor"
    )


def test_dtype_is_as_asked(good: Path) -> None:
    assert load(good, "cpu", torch.bfloat16).model.dtype == torch.bfloat16


def test_record_counts_what_lies_there(good: Path) -> None:
    entry = record(good, "teacher", "embedded", None, NV)
    assert entry.name == good.name and entry.visual_tokens == NV
    assert entry.parameters == sum(p.numel() for p in load(good, "cpu").model.parameters()) == parameter_count(good)
    assert entry.size_bytes == sum(f.stat().st_size for f in good.iterdir())


def replace_in(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "download is incomplete"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-99]), "cut short"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / INDEX).write_text("<html>"), "no JSON"),
        (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "of no weights where they are"),
        (lambda f: (f / "processor_config.json").write_text("{"), "no usable processor"),
        (lambda f: (f / "tokenizer.json").unlink(), "processor"),
        (lambda f: replace_in(f / "tokenizer.json", '"vocab": {', '"vocab": {"x": {}, '), "no usable processor"),
    ],
    ids=[
        "no config",
        "no weights",
        "pickle",
        "truncated",
        "pointer",
        "list",
        "page",
        "no map",
        "broken processor",
        "no tokenizer",
        "broken tokenizer",
    ],
)
def test_damaged_folders_are_refused(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as refusal:
        load(folder, "cpu")
    assert str(folder) in str(refusal.value)


def test_missing_shard_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors: missing or cut short"):
        load(folder, "cpu")


def test_absent_weights_are_refused_rather_than_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if "o_proj" in key))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing or of another shape"):
        load(folder, "cpu")


def test_remote_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoModelForImageTextToText": "theirs.Model", "AutoConfig": "theirs.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="contains custom code"):
        load(folder, "cpu")


def test_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=8)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    word_processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be opened as an image-text model"):
        load(tmp_path, "cpu")


def test_pair_shares_the_narrower_head(tmp_path: Path) -> None:
    assert pair(tmp_path, word_processor(), word_processor(), columns=(64, 48)) == 48


def test_pair_of_bpe(tmp_path: Path) -> None:
    assert pair(tmp_path, bpe_processor(), bpe_processor()) == len(bpe_processor().tokenizer)


def test_tokens_that_only_one_tokenizer_has_at_its_end_are_not_shared(tmp_path: Path) -> None:
    longer = word_processor()
    longer.tokenizer.add_tokens(["extra", "more"])
    shared = len(word_processor().tokenizer)
    assert pair(tmp_path, longer, word_processor(), columns=(shared + 8, shared + 8)) == shared


def test_disagreeing_tokenizers_are_refused_with_both_names_and_the_first_entry(tmp_path: Path) -> None:
    other = build_processor([" ".join(WORDS).replace("green", "grey")], Template(""), IMAGE_PX, 8)
    first = word_processor().tokenizer.convert_tokens_to_ids("green")
    with pytest.raises(ModelError) as refusal:
        pair(tmp_path, word_processor(), other)
    for part in (str(tmp_path / "teacher"), str(tmp_path / "student"), f"first at id {first}", "'green'", "'grey'"):
        assert part in str(refusal.value)


def test_differing_visual_tokens_are_refused(tmp_path: Path) -> None:
    finer = build_processor([" ".join(WORDS)], Template(""), IMAGE_PX, 4)
    with pytest.raises(ModelError, match="4 and 16 visual tokens"):
        pair(tmp_path, word_processor(), finer)


def test_same_count_of_other_pixels_is_refused(tmp_path: Path) -> None:
    other = word_processor()
    other.image_processor.image_mean = [0.2, 0.2, 0.2]
    with pytest.raises(ModelError, match="prepare the same image differently"):
        pair(tmp_path, word_processor(), other)


def test_pad_that_is_eos_is_refused(good: Path) -> None:
    student = load(good, "cpu")
    student.processor.tokenizer.pad_token = student.processor.tokenizer.eos_token
    with pytest.raises(ModelError, match="padding and EOS are the same"):
        check_pair(load(good, "cpu"), student)


def test_tokens_without_an_embedding_are_refused(folder: Path) -> None:
    processor = load(folder, "cpu").processor
    processor.tokenizer.add_tokens(["<mine>"])
    processor.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"tokens up to id \d+ \('<mine>'\), and the model embeddings for \d+; save it again"):
        load(folder, "cpu")


def test_missing_image_token_is_refused(good: Path) -> None:
    teacher, student = load(good, "cpu"), load(good, "cpu")
    student.model.config.image_token_id = 7
    with pytest.raises(ModelError, match="image token is missing"):
        check_pair(teacher, student)
    processor = load(good, "cpu").processor
    processor.image_token = "<picture>"
    with pytest.raises(ModelError, match="'<picture>' is missing"):
        check_pair(Loaded(teacher.model, processor), load(good, "cpu"))
