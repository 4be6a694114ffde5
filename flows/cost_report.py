"""Cost report of a full-size recipe in `alignti plan`: its runs, what each costs, what is missing here."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from components.config import recipes
from components.config.settings import Settings
from components.cost.downloads import STUDENT_PATH, Missing, missing
from components.cost.estimate import IMAGE_BYTES, Estimate, estimate
from components.cost.step import GIB, UTILISATION
from components.errors import InputError

CAVEAT = (
    f"Hours are an estimate: counted operations at {UTILISATION:.0%} of the data sheet's rate, an assumed share, with samples"
    " of assumed length. docs/recipes.md says how far such counts were from what was measured, and from the paper's hours."
)


def show(name: str, settings: Settings, root: Path = Path(), console: Console | None = None) -> None:
    """Print the cost tables for `settings`, nearest to recipe `name`; nothing if the recipe has no data for the cost model.

    With a model of unknown shape only a note and the missing downloads are printed.
    """
    console = console or Console(highlight=False)
    try:
        now = estimate(name, settings, root)
    except InputError as unknown:
        console.print(f"Costs are not counted: {unknown}.", "", sep="\n")
    else:
        if now is None:
            return
        console.print(_runs(name, now, root))
        console.print(_memory(now), _disk(now), CAVEAT, "", sep="\n")
    absent = _all_missing(name, settings, root)
    console.print(_missing(absent) if absent else "Everything that these runs read is here.")


def _runs(name: str, now: Estimate, root: Path) -> Table:
    recipe = name.partition("/")[0]
    runs = [*(f"{recipe}/{phase}" for phase in recipes.phases(recipe, root)), recipe]
    table = Table(title=f"Runs of {recipe}, in order; {now.devices} x {now.device.title}", title_justify="left")
    for column in ("run", "GPU hours", "hours", "GiB a device", "GB of disk"):
        table.add_column(column, justify="left" if column == "run" else "right")
    total = 0.0
    for run in runs:
        found = now if run == name else estimate(run, recipes.settings_with(run, root), root)
        assert found is not None
        total += found.device_hours
        here = " (these params)" if run == name else ""
        figures = (found.device_hours, found.device_hours / found.devices, found.gib, sum(found.disk.values()) / 1e9)
        table.add_row(run + here, *(f"{figure:,.1f}" if figure < 10 else f"{figure:,.0f}" for figure in figures))
    table.add_section()
    table.add_row("in all", f"{total:,.0f}", f"{total / now.devices:,.0f}", "", "")
    return table


def _memory(now: Estimate) -> str:
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in now.memory.items() if size)
    fits = (
        "fits"
        if now.gib < 0.9 * now.device.gib
        else "does NOT fit with room to spare; docs/scale.md says which knob saves what"
    )
    return f"Memory, GiB on each device in the dearest arm of this run: {parts}; {now.gib:.0f} of {now.device.gib:.0f}, {fits}."


def _disk(now: Estimate) -> str:
    parts = ", ".join(f"{part} {size / 1e9:,.0f}" for part, size in now.disk.items())
    return f"Disk, GB: {parts} (images reckoned at {IMAGE_BYTES / 1e3:.0f} kB each)."


def _all_missing(name: str, settings: Settings, root: Path) -> list[Missing]:
    """Missing downloads of the earlier runs and of this one, without models made by one of them."""
    recipe, _, phase = name.partition("/")
    phases = recipes.phases(recipe, root)
    before = phases[: phases.index(phase)] if phase else phases
    runs = [*(recipes.settings_with(f"{recipe}/{each}", root) for each in before), settings]
    found = [item for run in runs for item in missing(run, root) if not STUDENT_PATH.fullmatch(item.name)]
    return list(dict.fromkeys(found))


def _missing(found: list[Missing]) -> Table:
    sizes = [item.size for item in found if item.size]
    unknown = len(found) - len(sizes)
    title = f"Not on this machine yet: about {sum(sizes) / 1e9:,.1f} GB" + (
        f" and {unknown} of unknown size" if unknown else ""
    )
    table = Table(title=title, title_justify="left")
    for column in ("what", "GB", "terms", "how it gets here"):
        table.add_column(column, overflow="fold", justify="right" if column == "GB" else "left")
    for item in found:
        table.add_row(item.name, f"{item.size / 1e9:,.1f}" if item.size else "?", item.licence, item.instructions)
    return table
