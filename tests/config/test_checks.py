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
