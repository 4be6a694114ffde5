"""Worktrees of flow runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import InputError, TryAgainError
from flows import dvc, workspace
from tests.flows.conftest import git


@pytest.mark.parametrize(
    ("git_says", "error"),
    [
        ("unable to write loose object file: No space left on device", TryAgainError),
        ("pathspec 'params' did not match any files", InputError),
    ],
)
def test_a_run_whose_results_git_does_not_take_leaves_no_worktree(
    project: Path, git_says: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    git("init", "--quiet")
    (project / ".dvc/config").write_text("")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    run_git = workspace._git

    def refusing(*args: str) -> str:
        if args[0] != "add":
            return run_git(*args)
        (project / "bin").mkdir()
        (project / "bin/git").write_text(f'#!/bin/sh\necho "fatal: {git_says}" >&2; exit 128\n')
        (project / "bin/git").chmod(0o700)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{project}/bin:/bin")
            return run_git(*args)

    monkeypatch.setattr(workspace, "_git", refusing)
    with pytest.raises(error, match=r"`git add` failed in .*/workspaces/mine: fatal: "), workspace.workspace("mine"):
        pass
    assert Path.cwd() == project
    assert not list(workspace.WORKSPACES.glob("*"))


def test_signatures_and_hooks_of_the_users_git_are_not_for_runs(project: Path) -> None:
    """A key that is not there, `dvc install`'s hook that checks out what no cache has yet, and one that rewrites messages."""
    git("init", "--quiet")
    (project / ".dvc/config").write_text("")
    (project / "params").mkdir(exist_ok=True)
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    for hook in ("post-checkout", "prepare-commit-msg", "post-commit"):
        (project / ".git/hooks" / hook).write_text("#!/bin/sh\necho 'refused' >&2; exit 1\n")
        (project / ".git/hooks" / hook).chmod(0o700)
    git("config", "commit.gpgsign", "true")
    git("config", "gpg.program", "/bin/false")
    with workspace.workspace("mine"):
        (Path("params") / "study.yaml").write_text("arms: {}\n")
    assert "Run mine" in workspace._git("log", "-1", "--format=%s", "runs/mine")


def test_a_branch_of_the_users_called_runs_is_no_run(project: Path) -> None:
    git("init", "--quiet")
    git("add", "dvc.yaml")
    git("commit", "--quiet", "-m", "all")
    git("branch", "runs")
    assert workspace.prune(0) == []


def test_a_workspace_runs_its_own_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PYTHONSAFEPATH `python -m components.X` is the installed project's, so that of the folder as it is."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    (project / "own.py").write_text("print('own')")
    said = subprocess.run([sys.executable, "-m", "own"], env=dvc.environment(), capture_output=True, text=True).stdout
    assert said == "own\n"
