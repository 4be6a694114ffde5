from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import DataError, TryAgainError
from components.tracking import provenance
from components.tracking.provenance import Declaration

ROOT = Path(__file__).parents[2]


def test_stages_are_declared_as_dvc_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    monkeypatch.chdir(ROOT)
    with Repo() as repo:
        stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
        assert len(stages) > 10
        for stage in stages:
            declared = Declaration.read(stage.addressing)
            assert declared is not None
            deps = {dep.def_path for dep in stage.deps if not dep.def_path.startswith("params/")}
            assert (declared.command, set(declared.deps)) == (stage.cmd, deps)
            assert set(declared.outs) == {out.def_path for out in stage.outs}
    assert [Declaration.read(name) for name in ("pipeline", "distill", "prepare@kd", "nothing@kd")] == [None] * 4


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


@pytest.mark.parametrize("text", ["", "outs:\n- md5: e3eda713", "outs:\n- md5: 'e3", "\udcff"])
def test_a_damaged_dvc_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.dvc").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"data\.dvc is damaged; `git checkout data\.dvc`"):
        provenance.raw()


def test_a_number_as_dvc_writes_it_is_the_number_of_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("rate: 2.0e-5\n")
    Path("dvc.lock").write_text("stages: {train: {params: {params.yaml: {rate: 2e-05}}}}\n")
    assert provenance.of_other_params(["train"]) == set()
    Path("params.yaml").write_text("rate: 3.0e-5\n")
    assert provenance.of_other_params(["train"]) == {"train"}


def test_params_that_a_stage_does_not_read_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()

    def fingerprint(text: str) -> str:
        (tmp_path / "params/study.yaml").write_text(text)
        return Declaration("c", [], {"params/study.yaml": ["arms.kd"]}, []).fingerprint()

    assert fingerprint("arms: {kd: {seed: 1}, sft: {seed: 1}}") == fingerprint("arms: {kd: {seed: 1}}")
    assert fingerprint("arms: {kd: {seed: 2}}") != fingerprint("arms: {kd: {seed: 1}}")


REWRITING = """
import fcntl, sys, time
from pathlib import Path
whole = Path("dvc.lock").read_text()
print("at it", flush=True)
for _ in range(60):
    with open(".dvc/tmp/lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with open("dvc.lock", "w") as file:
            file.flush()
            time.sleep(0.01)
            file.write(whole)
"""


def test_a_lock_file_that_another_stage_rewrites_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance.locked() == {}
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/lock").touch()
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  one:\n    outs:\n    - {path: made, md5: abc}\n")
    with subprocess.Popen([sys.executable, "-c", REWRITING], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        while writer.poll() is None:
            assert provenance.locked() == {"one": {"made": "abc"}}
    assert writer.returncode == 0


SLOWLY = """
import fcntl, time
from pathlib import Path
held = open(".dvc/tmp/lock")
fcntl.flock(held, fcntl.LOCK_EX)
with open("dvc.lock", "w") as file:
    print("at it", flush=True)
    for line in ("schema: '2.0'", "stages:", "  one: {outs: [{path: a, md5: x}]}", "  two: {outs: [{path: b, md5: y}]}"):
        time.sleep(0.3)
        print(line, file=file, flush=True)
print("still held", flush=True)
time.sleep(60)
"""


def test_a_rewrite_that_takes_long_is_waited_for_and_a_lock_held_for_something_else_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file is valid YAML of fewer stages: a study of 93 arms lost one so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "PATIENCE_S", 0.1)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/lock").touch()
    with subprocess.Popen([sys.executable, "-c", SLOWLY], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        assert provenance.locked() == {"one": {"a": "x"}, "two": {"b": "y"}}
        assert provenance.locked() and writer.poll() is None
        writer.kill()


def test_an_empty_lock_file_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.lock").touch()
    with pytest.raises(TryAgainError, match=r"dvc.lock is being written, or is broken"):
        provenance.locked()


def test_a_repository_that_git_does_not_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    provenance.warn_without_commit()
    assert capfd.readouterr().err == "", "an export without its history"
    subprocess.run(["git", "init", "-q"], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    provenance.warn_without_commit()
    stderr = capfd.readouterr().err
    assert "recorded without its commit" in stderr and "dubious ownership" in stderr and "safe.directory" in stderr
