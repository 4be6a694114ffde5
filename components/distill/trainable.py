"""Trainable parameters of the student and their learning rates: whole parts, or LoRA in the language model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from components.align_ti.step import AlignTI
from components.config.distill import DistillSettings, Lora
from components.errors import InputError
from components.models.attention import recomputing
from components.models.families import parts
from components.models.load import Loaded


def choose_trainable(student: Loaded, distill: DistillSettings) -> None:
    """Apply params/distill.yaml: freeze parts, add LoRA adapters, enable gradient checkpointing, compile layers.

    Raises InputError for `trainable.lora` if peft is missing or no module matches its targets.
    """
    trainable, model = distill.trainable, student.model
    for part, parameters in parts(model).items():
        for parameter in parameters:
            parameter.requires_grad_(getattr(trainable, part))
    if trainable.lora is not None:
        add_adapters(model, trainable.lora)
    if distill.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": partial(recomputing, model)})
    if distill.compile:
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True)


def parameter_groups(model: Any, distill: DistillSettings) -> list[dict[str, Any]]:
    """Optimiser parameter groups, one per trained part, with its name and learning rate."""
    trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in parts(model).items()}
    part_rates = distill.learning_rates.model_dump()
    return [
        {"name": name, "params": parameters, "lr": part_rates[name] or distill.optimiser.learning_rate}
        for name, parameters in trained.items()
        if parameters
    ]


def term_parameter_groups(module: AlignTI, distill: DistillSettings) -> list[dict[str, Any]]:
    """Optimiser parameter group of the loss terms' modules; empty without one."""
    parameters = list(module.term_modules.parameters())
    return [{"name": "terms", "params": parameters, "lr": distill.optimiser.learning_rate}] if parameters else []


def learning_rates(optimiser: Any) -> dict[str, float]:
    """Current learning rate for the log; one per group if initial rates differ."""
    groups = optimiser.param_groups
    if len({group["initial_lr"] for group in groups}) == 1:
        return {"lr": groups[0]["lr"]}
    return {f"lr_{group['name']}": group["lr"] for group in groups}


def add_adapters(model: Any, lora: Lora) -> None:
    """Inject LoRA adapters (arXiv 2106.09685) into the language model's modules named in `lora.targets`; freeze the rest of it.

    Injection is in place, so that the student keeps its class and attributes.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(
            "params/distill.yaml: trainable.lora needs peft: pip install -c constraints.txt -e '.[lora]'"
        ) from None
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    decoder = model.get_decoder()
    names = [name for name, _ in decoder.named_modules()]
    unmatched = [target for target in lora.targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    model.get_output_embeddings().requires_grad_(False)
    try:
        if unmatched:  # peft passes over them, if there are others
            raise ValueError(f"nothing is called {', '.join(unmatched)}")
        inject_adapter_in_model(config, decoder)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
        raise InputError(
            f"params/distill.yaml: trainable.lora.targets {list(lora.targets)}: {error}; the language model has"
            f" {', '.join(sorted(linear))}"
        ) from None
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "lora_embedding_A") and embeddings.weight is model.get_output_embeddings().weight:
        raise InputError(
            f"params/distill.yaml: trainable.lora.targets {list(lora.targets)}: this model's embeddings are its output"
            " head too, which adapters merged into them would change; leave them out"
        )


def merge_adapters(model: Any) -> None:
    """Merge all LoRA adapters into their base weights and restore the plain modules of stock transformers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.get_decoder().peft_config
