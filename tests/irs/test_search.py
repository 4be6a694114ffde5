"""The layer search: which images and instructions it compares, what it makes of attention, and the stage as a whole."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

from components.config.irs import IrsSettings
from components.dataset.shards import ImageRow, Samples, Turn
from components.digits.tokenizer import build_processor
from components.errors import DataError
from components.irs import __main__ as stage
from components.irs.search import attention_maps, draw_images, furthest_apart, measure, rank, standard_error
from components.irs.weighting import BACKGROUND
from components.models.load import Loaded, load
from components.models.template import Template
from components.records.dataset import Manifest
from components.records.irs import LayerChoice
from components.records.paths import DATASET, IRS, TEACHER
from components.records.teacher import TeacherChoice
from tests.shards import write_split
from tests.tried import keep_all

SETTINGS = IrsSettings(
    seed=3, images=6, instructions_per_image=3, batch_size=5, overlays=2,
    rule="irs", layer=None, weighting="mean", instruction_rows="all",
)  # fmt: skip
QUESTIONS = ["What is at the top?", "Is there a red one at the very bottom of it?", "How many?", "List all."]
LAYERS, NV, IMAGE_PX, PATCH_PX = 3, 16, 32, 8


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def row(index: int, questions: list[str] = QUESTIONS) -> ImageRow:
    """An image with a caption, and `questions` that each open a dialogue, the first one twice."""
    samples = [(f"{index}-caption", "caption", (Turn("<image>\nDescribe it.", "one"),))]
    dialogues = [(Turn(f"<image>\n{q}", "one"), Turn("How many?", "two")) for q in [*questions, questions[0]]]
    samples += [(f"{index}-{i}", "open", turns) for i, turns in enumerate(dialogues)]
    return ImageRow(f"image-{index}", png(index), tuple(samples))


def dataset(folder: Path, rows: list[ImageRow]) -> Samples:
    split = write_split(folder / "train", rows, images_per_shard=4)
    facts = {"source": "tests", "rows_in": split.samples, "rows_out": split.samples, "quarantined": 0, "digest": "0" * 64}
    Manifest(**facts, splits={"train": split}).write(folder / "manifest.json")
    return Samples(folder, "train")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return dataset(tmp_path_factory.mktemp("dataset"), [row(index) for index in range(10)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA of three layers."""
    processor = build_processor([*QUESTIONS, "one two Describe it."], Template(""), IMAGE_PX, PATCH_PX)
    tokenizer = processor.tokenizer
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=IMAGE_PX,
        patch_size=PATCH_PX, vision_use_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, image_seq_length=NV,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("teacher")
    LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder, "cpu")


def test_images_come_with_different_instructions_and_no_captions(samples: Samples) -> None:
    drawn = draw_images(samples, SETTINGS)
    assert len(drawn) == SETTINGS.images
    assert len({image[0].image_id for image in drawn}) == SETTINGS.images
    for image in drawn:
        assert len({s.image_id for s in image}) == 1
        assert len({s.turns[0].question for s in image}) == SETTINGS.instructions_per_image == len(image)
        assert all(s.kind != "caption" and len(s.turns) == 1 for s in image)


def test_the_seed_decides_which_images(samples: Samples) -> None:
    first, again, other = (draw_images(samples, SETTINGS.model_copy(update={"seed": seed})) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_fewer_images_than_asked_for_are_all_used(samples: Samples) -> None:
    drawn = draw_images(samples, SETTINGS.model_copy(update={"images": 500}))
    assert Counter(image[0].image_id for image in drawn) == {f"image-{index}": 1 for index in range(10)}


@pytest.mark.parametrize(
    ("rows", "usable"),
    [
        ([row(0)], "1 of 1"),
        ([row(0, ["How many?"]), row(1, ["How many?"])], "0 of 2"),
        ([row(0), row(1, ["How many?"])], "1 of 2"),
    ],
)
def test_too_few_images_or_no_pair_is_refused(tmp_path: Path, rows: list[ImageRow], usable: str) -> None:
    with pytest.raises(DataError, match=f"{usable} images have 3 different instructions.*params/irs.yaml"):
        draw_images(dataset(tmp_path, rows), SETTINGS)


def test_later_turns_are_instructions_too(tmp_path: Path) -> None:
    """The Cauldron and FineVision ask all questions about a picture in one row."""

    def dialogue(index: int) -> ImageRow:
        turns = tuple(Turn(f"<image>\n{q}" if not i else q, "one") for i, q in enumerate(QUESTIONS))
        return ImageRow(f"image-{index}", png(index), ((f"{index}", "open", turns),))

    drawn = draw_images(dataset(tmp_path, [dialogue(0), dialogue(1)]), SETTINGS)
    assert [len({sample.turns[0].question for sample in image}) for image in drawn] == [3, 3]
    assert all(sample.turns[0].question.startswith("<image>\n") and len(sample.turns) == 1 for i in drawn for sample in i)


def test_equal_images_of_several_rows_are_one_where_too_few_have_enough(tmp_path: Path) -> None:
    """Tar and Parquet files hold an image in each row."""
    rows = [
        ImageRow(f"{index}-{i}", png(index), ((f"{index}-{i}", "open", (Turn(f"<image>\n{q}", "one"),)),))
        for i, q in enumerate(QUESTIONS)
        for index in range(3)
    ]
    samples = dataset(tmp_path, [*rows, ImageRow("text", None, (("t", "text", (Turn("Why?", "So."),)),))])
    drawn = draw_images(samples, SETTINGS)
    assert {frozenset(sample.image for sample in image) for image in drawn} == {frozenset({png(index)}) for index in range(3)}
    assert all(len({sample.turns[0].question for sample in image}) == 3 for image in drawn)


def test_attention_is_the_models_own(loaded: Loaded, samples: Samples, folder: Path) -> None:
    """Against eager maps: all rows after the image, and those of the question's own words."""
    maps = attention_maps(loaded, samples, Template(""), SETTINGS)
    assert {rows: tuple(weights.shape) for rows, weights in maps.attention.items()} == dict.fromkeys(
        ("all", "words"), (LAYERS, SETTINGS.images, SETTINGS.instructions_per_image, NV)
    )
    assert maps.tokens.tolist() == [NV] * SETTINGS.images
    eager = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = loaded.processor.tokenizer
    for x, i in ((0, 0), (2, 1), (5, 2)):
        sample = maps.samples[x][i]
        question = sample.turns[0].question.removeprefix("<image>\n")
        image = Image.open(io.BytesIO(sample.image or b""))
        inputs = loaded.processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        ids = inputs["input_ids"][0]
        visual = ids == loaded.processor.image_token_id
        after = int(visual.nonzero().max()) + 1
        words = [tokenizer.decode(token).strip() not in ("", "ASSISTANT:") for token in ids[after:]]
        assert 0 < sum(words) < len(words)
        with torch.no_grad():
            eager_maps = eager(**inputs, output_attentions=True).attentions
        for layer in range(LAYERS):
            over_rows = eager_maps[layer][0][:, after:][:, :, visual].mean(0)
            torch.testing.assert_close(maps.attention["all"][layer, x, i], over_rows.mean(0), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(maps.attention["words"][layer, x, i], over_rows[words].mean(0), atol=1e-6, rtol=1e-4)


def test_of_images_that_are_shown_together_each_is_its_own(loaded: Loaded, tmp_path: Path) -> None:
    """What is asked before the last of them is no instruction; weights go by what follows each."""
    turns = (Turn("<image>\nHow many?", "one"), Turn("<image>\nList all.", "two"), Turn("Is there a red one?", "one"))
    rows = [ImageRow(f"pair-{n}", png(n), ((f"{n}", "open", turns),), (png(n + 5),)) for n in range(2)]
    settings = SETTINGS.model_copy(update={"instructions_per_image": 2})
    maps = attention_maps(loaded, dataset(tmp_path, rows), Template(""), settings)
    assert [len(of_image) for of_image in maps.samples] == [2] * 4 and maps.tokens.tolist() == [NV] * 4
    assert {of_image[0].images for of_image in maps.samples} == {(png(n),) for n in (0, 1, 5, 6)}
    assert maps.attention["all"].shape == (LAYERS, 4, 2, NV) and bool((maps.attention["words"].sum(-1) > 0).all())
    first, second = maps.attention["all"][:, 0], maps.attention["all"][:, 1]
    assert not torch.allclose(first, second) and rank(maps.attention["all"]).irs[0] > 0


def test_batches_do_not_matter(loaded: Loaded, samples: Samples) -> None:
    single, batched = (
        attention_maps(loaded, samples, Template(""), SETTINGS.model_copy(update={"batch_size": size})) for size in (1, 18)
    )
    for rows in ("all", "words"):
        torch.testing.assert_close(single.attention[rows], batched.attention[rows], atol=1e-6, rtol=1e-4)


def test_measure_ranks_the_layers(loaded: Loaded, samples: Samples) -> None:
    choice = measure(loaded, samples, Template(""), SETTINGS)
    assert len(choice.irs) == len(choice.standard_error) == LAYERS
    assert choice.irs[choice.layer] == max(choice.irs)
    assert sorted(choice.irs)[-2] == choice.irs[choice.runner_up]


def turned(angles: list[list[float]]) -> torch.Tensor:
    """(L, X, 2, 2): per layer and image two looks at the given angle."""
    return torch.tensor([[[[1.0, 0.0], [math.cos(a), math.sin(a)]] for a in layer] for layer in angles])


def test_choice_by_hand() -> None:
    choice = rank(turned([[0.0, 0.0, 0.0], [math.pi / 2, math.pi / 3, math.pi / 2], [0.1, 0.2, 0.3]]))
    assert choice.irs == pytest.approx([0, (1 + 0.5 + 1) / 3, np.mean(1 - np.cos([0.1, 0.2, 0.3]))])
    assert choice.standard_error == pytest.approx([0, np.std([1, 0.5, 1], ddof=1) / 3**0.5, choice.standard_error[2]])
    assert (choice.layer, choice.runner_up, choice.separated) == (1, 2, True)


def test_separated_by_the_paired_difference_not_by_each_layers_own_error() -> None:
    """Images differ a lot, the two layers hardly: the better one is better on every image by the same small amount."""
    spread = np.linspace(0.1, 0.9, 12)
    angles = [np.arccos(1 - spread).tolist(), np.arccos(1 - (spread + 0.02)).tolist()]
    choice = rank(turned(angles))
    assert choice.irs[1] - choice.irs[0] < choice.standard_error[1]
    assert choice.layer == 1
    assert choice.separated


def test_noise_is_not_separated_and_one_layer_has_no_runner_up() -> None:
    noise = rank(turned(np.random.default_rng(0).uniform(0.4, 0.6, (2, 30)).tolist()))
    assert not noise.separated
    alone = rank(turned([[0.1, 0.9]]))
    assert (alone.layer, alone.runner_up, alone.separated) == (0, 0, False)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20))
@hypothesis_settings(max_examples=40)
def test_standard_error_is_that_of_a_mean(values: list[float]) -> None:
    expected = np.std(values, ddof=1) / len(values) ** 0.5
    assert standard_error(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected, abs=1e-9)


def test_furthest_apart_is_the_pair_with_the_lowest_cosine() -> None:
    assert furthest_apart(torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0.1, 0], [0, 1, 1]])) == (0, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, str]:
    """The stage run in a working directory of its own, and its closing line."""
    root = tmp_path_factory.mktemp("stage")
    shutil.copytree(Path(__file__).parents[2] / "params", root / "params")
    text = (root / "params" / "irs.yaml").read_text(encoding="utf-8")
    for name, value in SETTINGS.model_dump().items():
        value = json.dumps(value)
        text = "\n".join(f"{name}: {value}" if line.startswith(f"{name}:") else line for line in text.splitlines())
    (root / "params" / "irs.yaml").write_text(text + "\n", encoding="utf-8")
    dataset(root / DATASET, [row(index) for index in range(10)])
    keep_all(root / DATASET)
    TeacherChoice(name="tiny", path=str(folder), sha256="0" * 64).write(root / TEACHER / "choice.json")
    stale = root / "reports" / "irs" / "overlay_9.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(root)
        patch.setenv("ALIGNTI_TRACKING_URI", "journal")
        patch.setenv("ALIGNTI_DEVICE", "cpu")
        patch.setenv("ALIGNTI_THREADS", "1")
        stage.main()
    return root, output.getvalue()


def test_stage_writes_choice_curve_and_overlays(finished: tuple[Path, str], loaded: Loaded, samples: Samples) -> None:
    root, output = finished
    choice = LayerChoice.read(root / IRS / "layer.json")
    ranking = measure(loaded, samples, Template(""), SETTINGS)
    assert {name: getattr(choice, name) for name in vars(ranking)} == vars(ranking)
    assert (choice.images, choice.pairs) == (6, 6 * 3)
    assert (choice.picked.layer, choice.picked.weighting, choice.picked.rows) == (choice.layer, "mean", "all")
    assert choice.views[0].irs == choice.irs and choice.region is None and choice.grids == [f"{NV} tokens"]
    saved = load_file(root / BACKGROUND)
    assert {rows: tuple(share.shape) for rows, share in saved.items()} == dict.fromkeys(("all", "words"), (LAYERS, NV))
    curve = json.loads((root / "reports/irs/curve.json").read_text(encoding="utf-8"))
    assert [point["layer"] for point in curve] == list(range(LAYERS))
    assert [point["irs"] for point in curve] == choice.irs
    assert [point["standard_error"] for point in curve] == choice.standard_error
    pictures = sorted(path.name for path in (root / "reports/irs").glob("*.png"))
    assert pictures == ["curve.png", "overlay_1.png", "overlay_2.png"], "and the stale one is gone"
    for name in pictures:
        assert min(Image.open(root / "reports/irs" / name).size) > 300
    assert len(output.splitlines()) == 1
    assert f"layer {choice.layer} has the highest IRS" in output
    assert "18 pairs on 6 images" in output
    assert "reports/irs" in output


def test_without_two_instructions_on_an_image_there_is_no_layer_and_only_arms_that_ask_are_refused(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "stage"
    shutil.copytree(finished[0], root)
    shutil.rmtree(root / DATASET)
    dataset(root / DATASET, [row(index, ["How many?"]) for index in range(4)])
    keep_all(root / DATASET)
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match="0 of 4 images have 3 different instructions"):
        stage.main()  # L_iva of the shipped arms asks for the layer
    study = Path("params/study.yaml")
    kd = {"weights": {"sft": 1.0, "kd": 1.0, "iva": 0.0, "tpa": 0.0}, "student": "student", "seed": 1}
    study.write_text(yaml.safe_dump({"arms": {"sft": kd, "kd": kd}}))
    stage.main()
    assert "search_layer: nothing to do, IRS compares" in capsys.readouterr().out
    assert LayerChoice.read_if_searched() is None and not list(Path("reports/irs").glob("*.png"))
    with pytest.raises(DataError, match=r"layer.json holds no LayerChoice: IRS compares"):
        LayerChoice.read(IRS / "layer.json")


def test_stage_journals_the_curve_and_the_pictures(finished: tuple[Path, str]) -> None:
    root, _ = finished
    (journal,) = (root / ".runs/journal").glob("*search_layer*.jsonl")
    events = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert {e["step"] for e in events if e["event"] == "metrics" and "irs" in e["values"]} >= set(range(LAYERS))
    assert sum(e["event"] == "artifact" for e in events) == 4
    assert events[-1]["event"] == "end"
    assert events[-1]["status"] == "FINISHED"
