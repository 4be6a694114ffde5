from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from components.dataset.shards import Samples
from components.digits.embedded_family import read_corpus
from components.digits.tower import cell_words, encode, features, new_tower, normalised, train_tower
from components.errors import DataError
from components.models.vlm import VLM
from tests.models.conftest import family, tiny_llava, word_processor


def test_words_are_dealt_out_in_reading_order() -> None:
    words = cell_words([[1, 2, 3, 4, 5, 6, 7, 8]], visual_tokens=4)
    assert words.tolist() == [[[1, 2], [3, 4], [5, 6], [7, 8]]]


def test_a_cell_of_several_patches_gives_each_its_words() -> None:
    words = cell_words([[1, 2, 3, 4]], visual_tokens=16, patches=2)
    assert words.flatten().tolist() == [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]


@pytest.mark.parametrize("captions", [[[1, 2, 3, 4], [1, 2]], [[1, 2, 3]], [[], []]], ids=["ragged", "no multiple", "empty"])
def test_captions_that_do_not_fit_the_grid_are_refused(captions: list[list[int]]) -> None:
    with pytest.raises(DataError, match="for each square of 1 x 1 of the 4 visual tokens"):
        cell_words(captions, visual_tokens=4)


def test_images_must_be_whole_patches() -> None:
    embedded = family().embedded
    assert embedded is not None
    with pytest.raises(DataError, match="no whole number of patches"):
        new_tower(embedded.tower, image_px=20)


def test_pixels_are_those_of_the_saved_image_processor() -> None:
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    processed = word_processor().image_processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalised(pixels), processed, rtol=0, atol=1e-6)


def test_features_are_those_that_llava_reads() -> None:
    model: LlavaForConditionalGeneration = tiny_llava(word_processor()).eval()
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoded = encode(model.model.vision_tower, pixels, torch.device("cpu"))
    expected = VLM(model).features(SimpleNamespace(pixel_values=normalised(pixels), image_inputs={}))
    torch.testing.assert_close(encoded, expected)
    projected = model.model.multi_modal_projector(encoded)
    stock = model.get_image_features(pixel_values=normalised(pixels), return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(list(stock)), projected)


def test_tower_learns_to_read_cells_then_freezes(dataset) -> None:
    settings = family(steps=150).embedded
    assert settings is not None
    corpus = read_corpus(Samples(dataset, "train"))
    tokenizer = word_processor().tokenizer
    words = cell_words(tokenizer([first.turns[0].answer for first, *_ in corpus.captions])["input_ids"], visual_tokens=4)
    torch.manual_seed(0)
    tower = new_tower(settings.tower, 16)
    read = train_tower(tower, corpus.images, words, settings.tower_training, torch.Generator().manual_seed(0), lambda *_: None)
    assert read > 0.9
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    assert features(tower, normalised(corpus.images[:2])).shape == (2, 4, 32)
