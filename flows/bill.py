"""Cost report of a full-size recipe in `alignti plan`: its runs, what each costs, what is missing here."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from components import cost
from components.config import recipes
from components.config.settings import Settings
from components.errors import InputError
from flows import costs


def show(name: str, settings: Settings, root: Path = Path(), console: Console | None = None) -> None:
    """Print the tables for `settings`, which are as near to recipe `name`; nothing if the cost model has nothing to go by.

    Of a model whose shape is not known it says so, and counts nothing; what is missing it lists all the same.
    """
    console = console or Console(highlight=False)
    try:
        now = costs.estimate(name, settings, root)
    except InputError as unknown:
        console.print(f"Costs are not counted: {unknown}.", "", sep="\n")
    else:
        if now is None:
            return
        console.print(_runs(name, now, root))
        console.print(_memory(now), _disk(now), _caveat(root), "", sep="\n")
    missing = _all_missing(name, settings, root)
    console.print(_missing(missing) if missing else "Everything that these runs read is here.")


def _runs(name: str, now: costs.Estimate, root: Path) -> Table:
    recipe = name.partition("/")[0]
    runs = [*(f"{recipe}/{phase}" for phase in recipes.phases(recipe, root)), recipe]
    table = Table(title=f"Runs of {recipe}, in order; {now.devices} x {now.device.title}", title_justify="left")
    for column in ("run", "GPU hours", "hours", "GiB a device", "GB of disk"):
        table.add_column(column, justify="left" if column == "run" else "right")
    total = 0.0
    for run in runs:
        found = now if run == name else costs.estimate(run, recipes.settings_with(run, root), root)
        assert found is not None
        total += found.device_hours
        here = " (these params)" if run == name else ""
        figures = (found.device_hours, found.device_hours / found.devices, found.gib, sum(found.disk.values()) / 1e9)
        table.add_row(run + here, *(f"{figure:,.1f}" if figure < 10 else f"{figure:,.0f}" for figure in figures))
    table.add_section()
    table.add_row("in all", f"{total:,.0f}", f"{total / now.devices:,.0f}", "", "")
    return table


def _memory(now: costs.Estimate) -> str:
    parts = ", ".join(f"{part} {size / cost.GIB:.1f}" for part, size in now.memory.items() if size)
    fits = (
        "fits"
        if now.gib < 0.9 * now.device.gib
        else "does NOT fit with room to spare; docs/scale.md says which knob saves what"
    )
    return f"Memory, GiB on each device in the dearest arm of this run: {parts}; {now.gib:.0f} of {now.device.gib:.0f}, {fits}."


def _disk(now: costs.Estimate) -> str:
    parts = ", ".join(f"{part} {size / 1e9:,.0f}" for part, size in now.disk.items())
    return f"Disk, GB: {parts} (images reckoned at {costs.IMAGE_BYTES / 1e3:.0f} kB each)."


def _caveat(root: Path) -> str:
    """What the hours are worth, by the step benchmark's results."""
    ratios = measured_ratios(root)
    worst = max((abs(counted / measured - 1) for counted, measured in ratios.values()), default=None)
    error = (
        "" if worst is None else f" Ratios between arms, counted so, are off by up to {worst:.0%} from those measured on a CPU."
    )
    counted, reported = costs.paper_hours(root)["align_ti"]
    return (
        f"Hours are an estimate: counted operations at {cost.UTILISATION:.0%} of the data sheet's rate, an assumed share,"
        f" with samples of assumed length.{error} What the paper reports for its own runs is"
        f" {reported / counted:.0f} times what is counted for them, on devices that it does not name (docs/recipes.md)."
    )


def measured_ratios(root: Path = Path()) -> dict[str, tuple[float, float]]:
    """Size and ratio of the step benchmark -> what counting operations says, and what was measured."""
    found = {}
    for path in sorted((root / "benchmarks/results").glob("step-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, counted in result.get("arithmetic", {}).items():
            found[f"{result['size']}: {name}"] = (counted, result["ratios"][name])
    return found


def _all_missing(name: str, settings: Settings, root: Path) -> list[costs.Missing]:
    """Of the runs that come before, and of this one. A model that one of them makes is missing in none."""
    recipe, _, phase = name.partition("/")
    phases = recipes.phases(recipe, root)
    before = phases[: phases.index(phase)] if phase else phases
    runs = [*(recipes.settings_with(f"{recipe}/{each}", root) for each in before), settings]
    found = [item for run in runs for item in costs.missing(run, root) if not costs.STUDENT_PATH.fullmatch(item.what)]
    return list(dict.fromkeys(found))


def _missing(found: list[costs.Missing]) -> Table:
    sizes = [item.size for item in found if item.size]
    unknown = len(found) - len(sizes)
    title = f"Not on this machine yet: about {sum(sizes) / 1e9:,.1f} GB" + (
        f" and {unknown} of unknown size" if unknown else ""
    )
    table = Table(title=title, title_justify="left")
    for column in ("what", "GB", "terms", "how it gets here"):
        table.add_column(column, overflow="fold", justify="right" if column == "GB" else "left")
    for item in found:
        table.add_row(item.what, f"{item.size / 1e9:,.1f}" if item.size else "?", item.terms, item.get)
    return table
