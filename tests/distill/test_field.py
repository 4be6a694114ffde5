"""The field's terms through the whole stage, and the state that one of them keeps in checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.align_ti import terms
from components.align_ti.terms.taid import Interpolation
from components.config.load import load_settings
from components.distill.__main__ import distill
from components.errors import Interrupted
from components.tracking.journal import Run
from tests.distill.conftest import write_params
from tests.distill.test_scale import StopsAt


def test_the_interpolation_follows_the_published_schedule() -> None:
    losses, steps = [3.0, 2.5, 2.6, 1.0, 0.9, 0.2], 50
    found = Interpolation(0.2, 0.05)
    t, momentum, before = 0.2, 0.0, None
    for s, loss in enumerate(losses):
        found.stepped(torch.tensor(loss), s / steps)
        if before is not None:
            momentum = 0.99 * momentum + 0.01 * (before - loss) / before
            t = min(1.0, max(0.2 + 0.8 * s / steps, t + 0.05 / (1 + math.exp(-momentum)) * (1 - t)))
        before = loss
        assert float(found.t) == pytest.approx(t, rel=1e-6)
    found.stepped(torch.tensor(0.1), 0.9)
    assert float(found.t) == pytest.approx(0.92)


def test_every_term_trains_through_the_stage_and_resumes_to_the_same_bytes(workplace: Path) -> None:
    weights = {"sft": 1.0} | {name: 0.1 for name in terms.names() if name not in terms.CORE}
    write_params(workplace, "study", {"arms": {"all": {"weights": weights, "student": "student", "seed": 1}}})
    write_params(workplace, "evaluate", {"baselines": ["all"]})
    settings = load_settings()
    folder = Path("artifacts/students/all")

    def trained(run: Run) -> tuple[bytes, list[str]]:
        distill("all", settings.arm("all"), settings, run)
        return (folder / "model/model.safetensors").read_bytes(), (folder / "losses.jsonl").read_text().splitlines()

    whole = trained(Run(None))
    assert all(json.loads(whole[1][-1])[name] > 0 for name in weights)
    shutil.rmtree(folder)
    with pytest.raises(Interrupted):
        trained(StopsAt(2))
    (checkpoint,) = Path(".runs/distill").rglob("step-*")
    assert load_file(checkpoint / "model.safetensors")["method.term_modules.taid.t"] > 0.4
    assert trained(Run(None)) == whole
