import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.load import load_settings
from components.config.models import LanguageShape, ModelsSettings
from components.config.recipes import settings_with
from components.dataset.shards import ImageRow, Samples
from components.digits import embedded_family
from components.digits.tokenizer import build_tokenizer
from components.errors import DataError, ModelError
from components.models.collate import Collator
from components.models.load import check_pair, load
from components.models.template import Template
from tests.models.conftest import PATCH_PX, family, grid_row, sample, tiny_llava, word_processor, write_dataset

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def built(dataset: Path, folder: Path, settings: ModelsSettings, workers: int = 1, losses: list[Any] | None = None) -> None:
    runtime = load_settings(REPOSITORY).runtime.model_copy(update={"device": "cpu", "workers": workers})
    history = [] if losses is None else losses
    embedded_family.build(settings, Samples(dataset, "train"), folder, runtime, lambda *loss: history.append(loss))


@pytest.fixture(scope="module")
def models(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    built(dataset, folder, family())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    assert names == ["students/student", "teachers/base", "teachers/small"]
    return folder


def test_models_reload_and_make_pairs(models: Path) -> None:
    teachers = [load(models / "teachers" / name, "cpu") for name in ("small", "base")]
    student = load(models / "students" / "student", "cpu")
    assert all(check_pair(teacher, student) == len(student.processor.tokenizer) for teacher in teachers)
    towers = [x.model.model.vision_tower.state_dict() for x in (*teachers, student)]
    assert all(torch.equal(towers[0][key], other[key]) for other in towers for key in towers[0])
    head = teachers[0].model.get_output_embeddings().weight
    assert head.data_ptr() == teachers[0].model.get_input_embeddings().weight.data_ptr()  # tied, after reloading too


def test_corpus_holds_every_image_with_its_caption_and_its_questions(dataset: Path) -> None:
    samples = Samples(dataset, "train")
    assert samples.about(3) == [samples[i] for i in samples.of_image(3)]
    corpus = embedded_family.read_corpus(samples)
    assert corpus.images.shape == (samples.images, 3, 16, 16) and corpus.images.dtype == torch.uint8
    assert len(corpus.captions) == samples.images and {first.kind for first, *_ in corpus.captions} == {"caption"}
    assert sum(map(len, corpus.turns)) == len(samples) - samples.images
    assert not any("<image>" in turn.question for turns in corpus.turns for turn in turns)


def test_saved_models_generate_and_stop(models: Path, dataset: Path) -> None:
    loaded = load(models / "teachers" / "base", "cpu")
    samples = [Samples(dataset, "train")[i] for i in range(3)]
    batch = Collator(loaded.processor, Template(""), 100, train=False)(samples)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": batch.pixel_values}
    answers = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answers.shape[0] == 3 and batch.input_ids.shape[1] < answers.shape[1] <= batch.input_ids.shape[1] + 4
    generation = loaded.model.generation_config
    tokenizer = loaded.processor.tokenizer
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_same_seed_same_bytes(models: Path, dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # what ran before must not matter
    built(dataset, tmp_path, family())
    assert digests(tmp_path) == digests(models)


def test_members_trained_at_the_same_time_are_the_same(models: Path, dataset: Path, tmp_path: Path) -> None:
    losses: list[tuple[str, float, int]] = []
    built(dataset, tmp_path, family(), workers=2, losses=losses)
    assert digests(tmp_path) == digests(models)
    trained = {name for name, *_ in losses}
    assert {"vision tower", "teacher base captions", "teacher small conversations", "student student captions"} <= trained


def test_another_candidate_leaves_the_others_as_they_were(models: Path, dataset: Path, tmp_path: Path) -> None:
    settings = family()
    assert settings.embedded is not None
    fewer = settings.embedded.model_copy(update={"teachers": {"small": settings.embedded.teachers["small"]}})
    built(dataset, tmp_path, settings.model_copy(update={"embedded": fewer}))
    assert digests(tmp_path / "teachers" / "small") == digests(models / "teachers" / "small")


def test_another_seed_other_bytes(models: Path, dataset: Path, tmp_path: Path) -> None:
    settings = family()
    assert settings.embedded is not None
    built(dataset, tmp_path, settings.model_copy(update={"embedded": settings.embedded.model_copy(update={"seed": 4})}))
    weights = "model.safetensors"
    assert all(digests(tmp_path / n)[weights] != digests(models / n)[weights] for n in ("teachers/base", "students/student"))


def test_language_stages_teach(dataset: Path) -> None:
    """Both stages bring their loss down, the tower untouched; conversations hold several questions about one image."""
    settings = family(steps=40)
    assert settings.embedded is not None
    corpus = embedded_family.read_corpus(Samples(dataset, "train"))
    processor = embedded_family.build_processor(corpus.texts, Template(""), 16, 8)
    collator = Collator(processor, Template(""), 160, train=True)
    torch.manual_seed(0)
    tower = embedded_family.new_tower(settings.embedded.tower, 16)
    model = embedded_family.new_model(settings.embedded.teachers["small"], tower, processor)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    features = embedded_family.encode(tower, corpus.images, CPU)
    losses: dict[str, list[float]] = {}
    language = embedded_family.LanguageTrainer(
        model,
        features,
        collator,
        torch.Generator().manual_seed(0),
        "t",
        lambda name, loss, _: losses.setdefault(name, []).append(loss),
    )
    language.captions(corpus.captions, settings.embedded.teacher_captions)
    language.conversations(corpus.turns, settings.embedded.teacher_instructions)
    assert losses["t captions"][-1] < 0.6 * losses["t captions"][0]
    assert losses["t conversations"][-1] < 0.6 * losses["t conversations"][0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, initial[key])}
    assert not any("vision_tower" in key for key in changed)
    assert {key.split(".")[1] for key in changed} >= {"language_model", "multi_modal_projector"}


def test_loss_is_the_stock_models_own(dataset: Path) -> None:
    """The loss on selected rows of cached features equals transformers' loss on the whole batch, pixels and all."""
    settings = family(steps=1)
    assert settings.embedded is not None
    corpus = embedded_family.read_corpus(Samples(dataset, "train"))
    processor = embedded_family.build_processor(corpus.texts, Template(""), 16, 8)
    collator = Collator(processor, Template(""), 160, train=True)
    torch.manual_seed(0)
    tower = embedded_family.new_tower(settings.embedded.tower, 16).eval()
    model = embedded_family.new_model(settings.embedded.teachers["small"], tower, processor).eval()
    batch = collator([first for first, *_ in corpus.captions[:5]])
    labels = batch.input_ids.masked_fill(~batch.response, -100)
    stock = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values, labels=labels
    ).loss
    features = embedded_family.encode(tower, corpus.images, CPU)
    loss = embedded_family.response_loss(embedded_family.VLM(model), batch, features[:5])
    torch.testing.assert_close(loss, stock)


def test_tokenizer_is_of_the_words_alone_whatever_their_order() -> None:
    texts = ["What digit is at a1? red, two.", "Describe the grid. empty cell"]
    tokenizer, reordered = build_tokenizer(texts), build_tokenizer(reversed(texts))
    assert tokenizer.backend_tokenizer.to_str() == reordered.backend_tokenizer.to_str()
    ids = tokenizer("USER: What digit is at a1? ASSISTANT: red, two.<|endoftext|>")["input_ids"]
    words = "USER: What digit is at a1 ? ASSISTANT: red , two . <|endoftext|>"
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == words
    assert tokenizer.decode(tokenizer("red, two.")["input_ids"]) == "red, two."
    assert tokenizer("unheard")["input_ids"] == [tokenizer.unk_token_id]


def rows(change) -> list[ImageRow]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [grid_row(0, rng), change(grid_row(1, rng))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: replace(row, samples=row.samples[:-1]), "each have a caption and questions"),
        (lambda row: replace(row, samples=row.samples[-1:]), "each have a caption and questions"),
        (lambda row: replace(row, image=tiny_png()), "square images of one size"),
    ],
    ids=["no caption", "no questions", "other size"],
)
def test_data_that_the_family_cannot_learn_from_is_refused(tmp_path: Path, change, message: str) -> None:
    folder = write_dataset(tmp_path / "dataset", rows(change))
    with pytest.raises(DataError, match=message):
        built(folder, tmp_path / "models", family())


def tiny_png() -> bytes:
    image = sample(("a", "b")).image
    assert image is not None
    from tests.models.conftest import png

    return png(0, px=24)


def test_impossible_shapes_are_refused() -> None:
    processor = word_processor()
    tower = tiny_llava(processor).model.vision_tower
    for shape in ({"hidden": 30, "heads": 4, "kv_heads": 2}, {"hidden": 32, "heads": 4, "kv_heads": 3}):
        with pytest.raises(ModelError, match="must divide"):
            embedded_family.new_model(LanguageShape(layers=1, mlp=8, **shape), tower, processor)


@pytest.mark.parametrize("name", ["digits", "digits-large"])
def test_the_models_of_the_embedded_recipes_can_be_built_and_teach_each_other(name: str, dataset: Path, tmp_path: Path) -> None:
    """At their full size, after one step of each training."""
    raw = settings_with(name, REPOSITORY).models.model_dump(mode="json")
    raw["embedded"]["tower"].update(patch_px=PATCH_PX, cell_px=PATCH_PX)  # of these images
    for training in ("tower_training", "teacher_captions", "teacher_instructions", "student_captions"):
        raw["embedded"][training].update(steps=1, batch_size=2)
    built(dataset, tmp_path, ModelsSettings.model_validate(raw))
    teacher, student = (load(tmp_path / path, "cpu") for path in ("teachers/base", "students/student"))
    assert check_pair(teacher, student) == len(student.processor.tokenizer)
    large = 12 if name == "digits-large" else 1
    assert sum(p.numel() for p in student.model.get_decoder().layers.parameters()) == pytest.approx(large * 123_000, rel=0.02)
