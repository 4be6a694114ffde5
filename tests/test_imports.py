"""Imports point one way, and what distils on a GPU box needs nothing of the pipeline."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.graph_of_code import ROOT, closure, imports, modules, names_of

# A room may import from those of a lower level, and itself. The command line stands above everything.
LEVELS = [
    {"errors"},
    {"io", "align_ti", "process"},
    {"records"},
    {"config"},
    {"runtime", "tracking", "report"},
    {"dataset"},
    {"models"},
    {"digits"},
    {"irs", "rows"},
    {"teacher_cache", "teacher_answers"},
    {"distill", "evaluate"},
    {"cost"},  # reads what the training loop holds
    {"teacher"},  # scores candidates with the metrics of `evaluate`
    {"study", "model_registry", "release", "own_data"},
    {"flows"},
    {"cli"},
]
# Modules that take the toy data or the toy family where params/ say so.
TO_THE_TOY = {"components.dataset.prepare", "components.models.__main__"}

# What a box that only distils may lack.
PIPELINE_ONLY = {"dvc", "prefect", "mlflow", "matplotlib", "scipy", "sklearn", "typer", "rich", "ruamel", "pyarrow", "PIL"}
DISTILS = (
    "components.align_ti",
    "components.irs.score",
    "components.models",
    "components.teacher_cache",
    "components.teacher_answers",
    "components.distill",
)


def room(module: str) -> str:
    first, *rest = module.split(".")
    return "flows" if first == "flows" else rest[0] if rest else ""


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if name in rooms)


def test_every_room_has_a_level() -> None:
    assert {room(module) for module in modules()} - {""} <= set.union(*LEVELS)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    importer = room(module)
    for imported in imports(module):
        target = room(imported) if imported.split(".")[0] in ("components", "flows") else ""
        if target and target != importer and not (target == "digits" and module in TO_THE_TOY):
            assert level(target) < level(importer), f"{module} imports {imported}"


def test_there_are_no_circles() -> None:
    for module in modules():
        for imported in imports(module) & set(modules()):
            assert module not in closure(imported) or module == imported or module in _packages(imported), (module, imported)


def test_benchmarks_import_in_no_circle() -> None:
    scripts = {f"benchmarks.{path.stem}": path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    TopologicalSorter({name: set(names_of(ast.parse(text).body)) & set(scripts) for name, text in scripts.items()}).prepare()


def _packages(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("components.align_ti") or m == "components.irs.score"])
def test_the_method_imports_torch_and_nothing_else_of_weight(module: str) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "components", "annotated_types"}  # the last: bounds of options
    assert {name.split(".")[0] for name in imports(module)} <= allowed
    assert {room(name) for name in imports(module) if name.startswith("components.")} <= {room(module)}


WITHOUT = """
import importlib, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
for module in {wanted!r}:
    importlib.import_module(module)
assert not {absent!r} & set(sys.modules)
"""


def test_what_distils_imports_without_the_pipelines_packages() -> None:
    needed = [m for m in modules() if any(m == room or m.startswith(f"{room}.") for room in DISTILS)]
    code = WITHOUT.format(absent=PIPELINE_ONLY, wanted=needed)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_the_interface_to_dvc_calls_it() -> None:
    calling = {m for m in modules() if any(name.split(".")[0] == "dvc" for name in imports(m))}
    assert calling == {"flows.dvc", "flows.dvc_locks"}
