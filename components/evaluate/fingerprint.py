"""Fingerprint of a score: its measurement conditions; scores are compared only if fingerprints are equal.

A difference between two scores is one between two models only if all else is equal: questions, prompts, decoding, judge,
software and dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.io import sha256
from components.models.template import Template
from components.records.evaluate import Fingerprint

if TYPE_CHECKING:
    from components.config.evaluate import EvaluateSettings
    from components.dataset.shards import Samples
    from components.models.load import Loaded

KIT = "alignti"
JUDGE = "exact match of the normalised answer"
# Modules that decide the stage's scores; their hash is the kit version.
CODE = [Path(__file__).with_name(name) for name in ("generate.py", "likelihood.py", "metrics.py")]
SCORERS = Path(__file__).with_name("scorers.py")


def for_evaluate(
    loaded: Loaded, samples: Samples, rows: Sequence[int], template: Template, settings: EvaluateSettings
) -> Fingerprint:
    """Fingerprint of the stage `evaluate`: greedy answers to `rows` of one split, matched with the references."""
    dtype, device = str(loaded.model.dtype).removeprefix("torch."), loaded.model.device.type
    code = [*CODE, SCORERS] if settings.scorers else CODE
    judge = ", ".join([JUDGE, *settings.scorers])
    conditions = {"kit": KIT, "kit_version": sha256(code)[:12], "judge": judge, "dtype": dtype, "device": device}
    return build(loaded.processor, samples, rows, template, settings, **conditions)


def build(
    processor: Any, samples: Samples, rows: Sequence[int], template: Template, settings: EvaluateSettings, **conditions: str
) -> Fingerprint:
    """Fingerprint of greedy answers to `rows`; `conditions`: kit, kit_version, judge, dtype and device."""
    import transformers

    return Fingerprint(
        dataset=f"{samples.manifest.source}/{settings.split}",
        dataset_hash=digest(shard.sha256 for shard in samples.record.shards),
        prompt_hash=prompt_hash(processor, samples, rows, template),
        decoding={"do_sample": False, "max_new_tokens": settings.max_new_tokens},
        transformers=transformers.__version__,
        **conditions,
    )


def prompt_hash(processor: Any, samples: Samples, rows: Sequence[int], template: Template) -> str:
    """Digest of the first prompt of each sample, rendered by the chat template."""
    image, chat_template = processor.image_token, template.of(processor)
    return digest(
        chat_template.render(sample.turns, [image] * len(sample.upto(1).images), answer=False).text
        for sample in (samples[row] for row in rows)
    )


def digest(texts: Iterable[str]) -> str:
    """sha256 over length-prefixed texts, so that their boundaries count."""
    hasher = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", errors="surrogatepass")
        hasher.update(len(encoded).to_bytes(8, "big") + encoded)
    return hasher.hexdigest()


def differences(first: Fingerprint | None, second: Fingerprint | None) -> list[str]:
    """Differing fields, as `field: value of first, not value of second`; empty if the scores are comparable."""
    if first is None or second is None:
        return ["no fingerprint: it is not known how it was measured"]
    pairs = ((name, getattr(first, name), getattr(second, name)) for name in Fingerprint.model_fields)
    return [f"{name.replace('_', ' ')}: {_format(a)}, not {_format(b)}" for name, a, b in pairs if a != b]


def _format(value: str | dict[str, bool | int | float | str]) -> str:
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value  # hash, abbreviated
    return " ".join(f"{key}={setting}" for key, setting in sorted(value.items()))
