"""Write the results under benchmarks/results into docs/performance.md, between its markers: `python -m benchmarks.table`"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.io import write_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN = "<!-- benchmarks: written by `python -m benchmarks.table`; do not edit -->"
END = "<!-- benchmarks: end -->"


@dataclass(frozen=True)
class Goal:
    title: str
    ratio: str  # its name in the results
    bound: float
    at_least: bool = False
    others: str = ""


GOALS = (
    Goal("Align-TI step / vanilla KD step, trained-student entropy", "align_ti_vs_kd", 1.18, others="paper 1.43"),
    Goal("the same, L_iva over 64 drawn visual rows an image", "align_ti_rows_vs_kd", 1.10),
    Goal(
        "Align-TI step / vanilla KD step, worst-case draws (d = 4 distinct)", "align_ti_vs_kd_worst", 1.60, others="paper 1.43"
    ),
    Goal("peak memory Align-TI / vanilla KD", "memory_align_ti_vs_kd", 1.03, others="paper 1.07"),
    Goal("peak memory of the divergence / full logits", "memory_divergence_vs_full_logits", 0.10, others="Liger 0.16"),
    Goal("Align-TI step / plain reference of the same loss", "align_ti_vs_reference", 0.5),
    Goal("KD-only tokens/s / TRL's trainer", "kd_vs_trl", 1.2, at_least=True, others="1.0"),
    Goal("KD on samples of mixed length, samples/s / TRL's trainer", "mixed_vs_trl", 1.5, at_least=True, others="1.0"),
    Goal("`prepare` / Pillow alone decoding the same JPEG images, images/s", "prepare_rate_vs_pillow", 0.80, at_least=True),
    Goal("KD step on JPEG images from shards, with loaders / on batches in memory", "loading_vs_memory", 1.05),
    Goal("memory of `prepare`, most rows / fewest", "memory_of_prepare", 1.20),
    Goal("IRS search / plain teacher forward", "search_vs_plain", 1.10, others="eager 3x"),
    Goal("evaluation in sorted batches / one by one, samples/s", "batched_vs_one_by_one", 5.0, at_least=True),
    Goal("bridge to VLMEvalKit: CPU time beside generation / generation", "bridge_overhead", 0.10),
    Goal("IRS search / plain teacher forward, memory", "memory_search_vs_plain", 1.05, others="eager O(L^2)"),
    Goal("flow and tracking beyond DVC's own, share of the work's time", "orchestration_beyond_dvc", 0.03),
)


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The command line of `python -m benchmarks.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there too")
    return parser


def report(result: dict[str, Any], target: Path | None = None) -> str:
    """Markdown of the result with all its ratios, as in docs/performance.md; also written to `target` as JSON."""
    if target:
        write_text(target, json.dumps(result, indent=2) + "\n")
    return "\n".join(_run(result, with_ratios=True))


def load() -> list[dict[str, Any]]:
    """All results, in order of file name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def render(results: list[dict[str, Any]]) -> str:
    """Markdown: the goals against what was measured, then each run with its arms."""
    parts = ["| what | goal | paper / peer | measured |", "|---|---|---|---|"]
    parts += [_goal(goal, results) for goal in GOALS]
    for result in results:
        with_ratios = result["benchmark"] in ("prepare", "orchestration")
        parts += ["", *_run(result, with_ratios)]
    return "\n".join(parts)


def _goal(goal: Goal, results: list[dict[str, Any]]) -> str:
    cells = []
    for result in results:
        if goal.ratio in result["ratios"]:
            value = result["ratios"][goal.ratio]
            met = value >= goal.bound if goal.at_least else value <= goal.bound
            spread = result.get("quartiles", {}).get(goal.ratio)
            bound = result.get("arithmetic", {}).get(goal.ratio)
            cells.append(
                f"{result['size']} **{value:.2f}**"
                + ("" if spread is None else f" ({spread[0]:.2f}..{spread[1]:.2f})")
                + (" ✓" if met else " ✗" if bound is None else f" ✗, arithmetic alone {bound:.2f}")
            )
    sign = "≥" if goal.at_least else "≤"
    return f"| {goal.title} | {sign} {goal.bound:.2f} | {goal.others} | {'; '.join(cells) or 'not measured'} |"


def _run(result: dict[str, Any], with_ratios: bool) -> list[str]:
    about, arms = result["about"], result["arms"]
    columns = {
        "seconds": ("s", "{:.4g}"),
        "cpu_seconds": ("CPU s of all processes", "{:.4g}"),
        "of_kd": ("of `kd`'s", "{:.2f}"),
        "load": ("load", "{:.1f}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "pairs_per_second": ("pairs/s", "{:,.1f}"),
        "share_waited": ("of it waiting for the batch", "{:.1%}"),
        "samples_per_second": ("samples/s", "{:,.1f}"),
        "ms_per_question": ("ms a question", "{:,.2f}"),
        "images_per_second": ("images/s", "{:,.0f}"),
        "rows_per_second": ("rows/s", "{:,.0f}"),
        "padding": ("padding", "{:.0%}"),
        "peak_mib": ("peak MiB", "{:,.1f}"),
        "tflop": ("TFLOP", "{:.3g}"),
        "share_of_peak": ("of a large product's rate", "{:.0%}"),
        "bytes_per_row": ("bytes a row", "{:.0f}"),
        "angle": ("angle", "{:.2f}°"),
        "norm": ("norm", "{:.3f}"),
        "noise": ("noise", "{:.3f}"),
        "noise_of_mean": ("of the mean", "{:.3f}"),
        "ribbon_rows_per_step": ("ribbon rows per response token", "{:.2f}"),
    }
    used = [key for key in columns if any(arm.get(key) for arm in arms.values())]
    clock = f", {result['repeats']} interleaved repeats, medians; {result['clock']}" if "repeats" in result else ""
    lines = [
        f"### `{result['benchmark']}`, {result['size']}",
        "",
        f"{about[0].upper()}{about[1:]}. {result['machine']}, {result['date']}, torch {result['torch']}{clock}.",
        "",
        "| | " + " | ".join(columns[key][0] for key in used) + " |",
        "|---|" + "---:|" * len(used),
    ]
    for name, arm in arms.items():
        cells = [columns[key][1].format(arm[key]) if arm.get(key) is not None else "" for key in used]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | not measured: {why} |" for name, why in result.get("not_measured", {}).items()]
    if equal := result.get("difference_from_reference"):
        lines += [
            "",
            f"Engine = reference: loss within {equal['loss']:.0e}, gradient within {equal['gradient']:.0e} (relative).",
        ]
    if result.get("parts"):
        lines += ["", "Share of a step's time:", ""]
        lines += [f"- {arm}: " + ", ".join(f"{p} {s:.0%}" for p, s in parts.items()) for arm, parts in result["parts"].items()]
    if with_ratios:
        lines += ["", *(f"{name}: {value:.2f}" for name, value in result["ratios"].items())]
    return lines


def refresh(page: str, table: str) -> str:
    """Page with the text between its markers replaced. Raises ValueError unless each marker occurs once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN!r} and {END!r} once each")
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    page = PAGE.read_text()
    PAGE.write_text(refresh(page, render(load())))


if __name__ == "__main__":
    main()
