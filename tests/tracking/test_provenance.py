from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.tracking import provenance
from components.tracking.provenance import Declared

ROOT = Path(__file__).parents[2]


def test_stages_are_declared_as_dvc_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    monkeypatch.chdir(ROOT)
    with Repo() as repo:
        stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
        assert len(stages) > 10
        for stage in stages:
            declared = Declared.read(stage.addressing)
            assert declared is not None
            deps = {dep.def_path for dep in stage.deps if not dep.def_path.startswith("params/")}
            assert (declared.command, set(declared.deps)) == (stage.cmd, deps)
            assert set(declared.outs) == {out.def_path for out in stage.outs}
    assert [Declared.read(name) for name in ("pipeline", "distill", "prepare@kd", "nothing@kd")] == [None] * 4


def test_digests_are_dvcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"data/b/ü.txt": "1", "data/a": "", "data/b.txt": "2", "data/b/c/d": "3", "file.bin": "4"}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data", "file.bin"], check=True, env=os.environ)
    assert provenance.raw() == {name: provenance.digest(Path(name)).md5 for name in ("data", "file.bin")}


def test_params_that_a_stage_does_not_read_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()

    def fingerprint(text: str) -> str:
        (tmp_path / "params/study.yaml").write_text(text)
        return Declared("distill@kd", "c", [], {"params/study.yaml": ["arms.kd"]}, []).fingerprint()

    assert fingerprint("arms: {kd: {seed: 1}, sft: {seed: 1}}") == fingerprint("arms: {kd: {seed: 1}}")
    assert fingerprint("arms: {kd: {seed: 2}}") != fingerprint("arms: {kd: {seed: 1}}")
