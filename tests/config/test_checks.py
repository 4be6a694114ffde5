"""What the params of several files say against each other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.align_ti import terms
from components.align_ti.terms import Needs
from components.align_ti.watch import Map, Watch
from components.config.load import load_settings
from components.errors import SettingsError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reads:
    """A term that reads attention maps of the student, or hidden states."""

    hidden: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(in_student=Watch(hidden=(0,)) if self.hidden else Watch((Map(0),)))


def put(root: Path, file: str, values: dict[str, Any]) -> None:
    path = root / "params" / f"{file}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_flex_attention_is_refused_where_a_term_reads_attention_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, names = terms.term_class, terms.names()
    monkeypatch.setattr(terms, "term_class", lambda name: Reads if name == "reads" else real(name))
    monkeypatch.setattr(terms, "names", lambda: [*names, "reads"])
    shutil.copytree(ROOT / "params", tmp_path / "params")
    arm: dict[str, Any] = {"weights": {"sft": 1.0, "reads": 1.0}, "student": "student", "seed": 1}
    put(tmp_path, "study", {"arms": {"read": arm}})
    put(tmp_path, "evaluate", {"baselines": ["read"]})
    load_settings(tmp_path)
    put(tmp_path, "distill", {"gradient_checkpointing": True})
    with pytest.raises(SettingsError, match=r"flex_attention: arms\.read has reads, .*; set it to false"):
        load_settings(tmp_path)
    put(tmp_path, "study", {"arms": {"read": arm | {"reads": {"hidden": True}}}})
    load_settings(tmp_path)
    put(tmp_path, "study", {"arms": {"read": arm}})
    put(tmp_path, "distill", {"flex_attention": False})
    load_settings(tmp_path)


KD = {"sft": 1.0, "kd": 1.0}
ROLLOUTS = {"share": 0.5, "temperature": 1.0, "top_p": None, "max_new_tokens": 8, "reuse": 1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a layer beyond the student's": (
        {"weights": {"received": 1.0}, "received": {"layers": [[9, [0]]]}},
        "layer 9 of the student",
    ),
    "a layer beyond the teachers'": ({"weights": {"cka": 1.0}, "cka": {"teacher_layer": 99}}, "layer 99 of the teacher"),
    "no layers": ({"weights": {"received": 1.0}, "received": {"layers": []}}, r"received\.layers: .*at least 1 item"),
    "a share above 1": ({"weights": {"va_kd": 1.0}, "va_kd": {"share": 3.0}}, "less than or equal to 1"),
    "image dependence that nobody keeps": (
        {"weights": {"va_kd": 1.0}, "va_kd": {"cached": True}},
        r"weights\.va_kd: the teacher's blurred evidence is not kept; give teacher_signals .*kinds: \[blurred\]",
    ),
    "image dependence of answers that others write": (
        {"weights": {"va_kd": 1.0}, "va_kd": {"cached": True}, "answers": "teacher"},
        r"blurred evidence is of the data's answers, and this arm's are generated: set va_kd\.cached to false",
    ),
    "evidence of answers that others write": (
        {"weights": {"mcd": 1.0}, "rollouts": ROLLOUTS},
        r"gradient evidence is of the data's answers, and this arm's are generated: set its weight to 0",
    ),
    "nothing to keep": ({"weights": {"va_kd": 1.0}, "va_kd": {"by": "random", "cached": True}}, "random takes no pass"),
    "a negative weight": ({"weights": {"tad": 1.0}, "tad": {"beta": -1.0}}, "greater than or equal to 0"),
    "no tokens at the top": ({"weights": {"tad": 1.0}, "tad": {"top": 0}}, "greater than or equal to 1"),
    "a control that changes nothing": (
        {"weights": KD | {"iva": 1.0}, "iva": {"weighting": "uniform", "layer": None, "change": "permuted"}},
        r"iva: `change` is permuted, .*: all weights are equal",
    ),
    "a mixture of one": (
        {"weights": KD, "divergence": {"kind": "skewed", "mix": 1.0, "temperature": 1.0}},
        "trains nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_train_are_refused_before_anything_runs(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    shutil.copytree(ROOT / "params", tmp_path / "params")
    put(tmp_path, "study", {"arms": {"odd": {"weights": KD, "student": "student", "seed": 1} | options}})
    put(tmp_path, "evaluate", {"baselines": ["odd"]})
    with pytest.raises(SettingsError, match=message):
        load_settings(tmp_path)


def test_rollouts_with_divided_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    arm = {"weights": {"kd": 1.0}, "student": "student", "seed": 1, "rollouts": ROLLOUTS}
    put(tmp_path, "study", {"arms": {"gkd": arm}})
    put(tmp_path, "evaluate", {"baselines": ["gkd"]})
    load_settings(tmp_path)
    put(tmp_path, "runtime", {"accelerate": "fsdp2"})
    with pytest.raises(SettingsError, match=r"accelerate is fsdp2, which divides .*; set it to null or ddp"):
        load_settings(tmp_path)
