"""Which model a name means, and LoRA adapters folded into theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.config.settings import Settings
from components.errors import InputError, ModelError, TryAgainError
from components.models.load import load
from components.models.template import Template
from components.release import model as module
from components.release.model import find, open_model, template_of
from tests.families import toy


def test_a_name_is_an_arm_the_teacher_a_folder_or_a_hub_id(
    project: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find("align_ti", settings).path == Path("artifacts/students/align_ti/model")
    assert find("teacher", settings).path == Path("artifacts/models/teachers/base")
    folder = find("artifacts/models/teachers/base", settings)
    assert (folder.name, folder.arm) == ("base", None)
    requests = []

    def snapshot(*args: str | None) -> Path:
        requests.append(args)
        return project

    monkeypatch.setattr(module, "snapshot", snapshot)
    find("org/model", settings)
    find("org/model@0123abc", settings)
    assert requests == [("org/model", None), ("org/model", "0123abc")]


def test_a_name_that_is_none_of_these_is_refused_with_the_names_that_there_are(project: Path, settings: Settings) -> None:
    with pytest.raises(InputError, match=r"no model 'align'; .*there are teacher, sft, .*align_ti"):
        find("align", settings)
    with pytest.raises(ModelError, match=r"artifacts/students/sft/model: no such folder; .*`dvc repro` does"):
        open_model(find("sft", settings).path, "cpu")


def test_without_a_network_a_hub_id_asks_to_try_again(
    project: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "hub"))
    with pytest.raises(TryAgainError, match="the hub cannot be reached"):
        find("org/model", settings)


def test_our_own_are_asked_as_trained_and_others_with_their_own_template(project: Path, settings: Settings) -> None:
    ours, foreign = find("align_ti", settings), find("artifacts/models/teachers/base", settings)
    loaded = open_model(foreign.path, "cpu")
    assert template_of(ours, loaded, settings) == Template.from_settings(settings.models.template)
    assert template_of(foreign, loaded, settings).style == "processor"
    endless = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
        "{{ c['text'] + ' ' if c['type'] == 'text' else '<image>\n' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    for unusable in (endless, None):
        loaded.processor.chat_template = loaded.processor.tokenizer.chat_template = unusable
        assert template_of(foreign, loaded, settings) == Template.from_settings(settings.models.template)


@pytest.fixture
def adapter(project: Path) -> Path:
    """Adapters that change something, as peft saves them."""
    from peft import LoraConfig, get_peft_model

    base = load(Path("artifacts/students/align_ti/model"), "cpu")
    adapted = get_peft_model(base.model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    adapted.save_pretrained("adapter")
    with torch.no_grad():
        batch = toy.collator("llava_onevision", train=False)([toy.SAMPLES[1]])
        torch.save(adapted(input_ids=batch.input_ids).logits, "logits.pt")
    return Path("adapter")


def test_adapters_are_folded_into_their_model(adapter: Path) -> None:
    folded = open_model(adapter, "cpu")
    assert type(folded.model).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert not [name for name, _ in folded.model.named_parameters() if "lora" in name]
    batch = toy.collator("llava_onevision", train=False)([toy.SAMPLES[1]])
    with torch.no_grad():
        logits = folded.model(input_ids=batch.input_ids).logits
        unadapted = load(Path("artifacts/students/align_ti/model"), "cpu").model(input_ids=batch.input_ids).logits
    torch.testing.assert_close(logits, torch.load("logits.pt"), atol=1e-5, rtol=0)
    assert (logits - unadapted).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled adapters are not read"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "does not say which model"),
        (lambda f: _say(f, base_model_name_or_path="gone"), "'gone' is no folder here and no ORG/NAME"),
        (lambda f: _rename(f, "layers.0", "layers.7"), r"do not fit .*: 2 tensors belong to no part of it, .*layers\.7"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused(change: Callable[[Path], object], message: str, adapter: Path) -> None:
    change(adapter)
    with pytest.raises(ModelError, match=message):
        open_model(adapter, "cpu")


def _rename(folder: Path, part: str, other: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(part, other): tensor for name, tensor in load_file(file).items()}, file)


def _say(folder: Path, **values: str) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_processor_of_another_model_is_refused(project: Path) -> None:
    file = Path("artifacts/students/align_ti/model/processor_config.json")
    file.write_text(file.read_text().replace('"num_image_tokens": 4', '"num_image_tokens": 9'))
    with pytest.raises(ModelError, match=r"writes 51 image tokens .* the model makes 24 features"):
        open_model(Path("artifacts/students/align_ti/model"), "cpu")
