"""The cost model beside what was measured, into docs/recipes.md: `python -m benchmarks.costs`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import flops
from benchmarks.shapes import SIZES, batch
from benchmarks.table import load
from components import cost
from components.config import recipes
from components.cost import Holding, Way
from components.io import write_text
from flows import costs
from flows.bill import measured_ratios

PAGE = Path(__file__).parents[1] / "docs/recipes.md"
BEGIN, END = "<!-- cost model: written by `python -m benchmarks.costs` -->", "<!-- cost model: end -->"
ARMS = ("kd", "align_ti", "align_ti_worst")
CHUNK_MIB = 40.0

PAPER_GIB = {"kd": 70.6, "align_ti": 75.6}  # of the same table of the paper as flows.costs.PAPER_HOURS


def render() -> str:
    """Ratios of time, memory, and the paper's own figures."""
    return "\n".join([*_ratios(), "", *_memory(load()), "", *_paper(Path(__file__).parents[1])])


def _ratios() -> list[str]:
    lines = ["| ratio of a step's time | counted | measured | error |", "|---|---:|---:|---:|"]
    for name, (counted, measured) in measured_ratios(Path(__file__).parents[1]).items():
        lines.append(f"| {name} | {counted:.2f} | {measured:.2f} | {counted / measured - 1:+.0%} |")
    return lines


def _memory(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| peak memory of a step, MiB | counted | measured | error |", "|---|---:|---:|---:|"]
    for result in results:
        if result["benchmark"] != "step" or result["size"] not in SIZES:
            continue
        for arm in ARMS:
            counted, measured = peak_mib(result, arm), result["arms"][arm]["peak_mib"]
            lines.append(f"| {result['size']}: {arm} | {counted:,.0f} | {measured:,.0f} | {counted / measured - 1:+.0%} |")
    return lines


def peak_mib(result: dict[str, Any], arm: str) -> float:
    """Of an arm of the step benchmark, by the cost model."""
    size = SIZES[result["size"]]
    student, teacher = size.model(size.student), size.model(size.teacher)
    rows = round(result["arms"][arm]["ribbon_rows_per_step"] * result["response_tokens"])
    held = Holding(
        trained=student.projector + student.language.weights,
        wide=4,
        teacher_bytes=4,
        checkpointed=False,
        chunk_rows=CHUNK_MIB * 2**20 / (4 * size.student.vocabulary),
        continues=True,
    )
    work = flops.work_of(batch(size, torch.device("cpu")), rows)
    return sum(cost.memory(student, teacher, work, Way(flops.TERMS.get(arm, flops.ALL)), held).values()) / 2**20


def _paper(root: Path) -> list[str]:
    found = costs.estimate(costs.PAPER, recipes.settings_with(costs.PAPER, root), root)
    assert found is not None
    title = f"GPU hours here, {found.device.title} | GPU hours in the paper, device not named"
    lines = [f"| `{costs.PAPER}`, one epoch of an arm | {title} | paper / here |", "|---|---:|---:|---:|"]
    hours = costs.paper_hours(root)
    for arm, (here, paper) in hours.items():
        lines.append(f"| {arm} | {here:,.0f} | {paper} | {paper / here:.1f} |")
    ours, theirs = (hours["align_ti"][i] / hours["kd"][i] for i in range(2))
    lines.append(f"| align_ti / kd | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |")
    kd, align_ti = PAPER_GIB.values()
    a100 = cost.UTILISATION * hours["kd"][0] / hours["kd"][1] * found.device.peak / cost.DEVICES["a100-80gb"].peak
    return [
        *lines,
        "",
        f"The paper's hours for KD would be {a100:.0%} of an A100's rate. Its peak memory is {kd} GiB for KD and {align_ti}",
        f"GiB for Align-TI ({align_ti / kd:.2f} times), at a batch per device that it does not state; passes of 4 samples, as",
        f"in this recipe, are counted at {found.gib:.0f} GiB for Align-TI.",
    ]


def refresh(page: str, tables: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    write_text(PAGE, refresh(PAGE.read_text(encoding="utf-8"), render()))
