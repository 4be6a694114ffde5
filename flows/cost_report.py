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
        cost = estimate(name, settings, root)
    except InputError as error:
        console.print(f"Costs are not counted: {error}.", "", sep="\n")
    else:
        if cost is None:
            return
        console.print(_runs_table(name, cost, root))
        console.print(_memory(cost), _disk(cost), CAVEAT, "", sep="\n")
    downloads = _missing_downloads(name, settings, root)
    console.print(_downloads_table(downloads) if downloads else "Everything that these runs read is here.")


def _runs_table(name: str, current: Estimate, root: Path) -> Table:
    recipe = name.partition("/")[0]
    runs = [*(f"{recipe}/{phase}" for phase in recipes.phases(recipe, root)), recipe]
    table = Table(title=f"Runs of {recipe}, in order; {current.devices} x {current.device.title}", title_justify="left")
    for column in ("run", "GPU hours", "hours", "GiB a device", "GB of disk"):
        table.add_column(column, justify="left" if column == "run" else "right")
    total = 0.0
    for run in runs:
        cost = current if run == name else estimate(run, recipes.settings_with(run, root), root)
        assert cost is not None
        total += cost.device_hours
        note = " (these params)" if run == name else ""
        figures = (cost.device_hours, cost.device_hours / cost.devices, cost.gib, sum(cost.disk.values()) / 1e9)
        table.add_row(run + note, *(f"{figure:,.1f}" if figure < 10 else f"{figure:,.0f}" for figure in figures))
    table.add_section()
    table.add_row("in all", f"{total:,.0f}", f"{total / current.devices:,.0f}", "", "")
    return table


def _memory(cost: Estimate) -> str:
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in cost.memory.items() if size)
    fits = (
        "fits"
        if cost.gib < 0.9 * cost.device.gib
        else "does NOT fit with room to spare; docs/scale.md says which knob saves what"
    )
    return (
        f"Memory, GiB on each device in the dearest arm of this run: {parts}; {cost.gib:.0f} of {cost.device.gib:.0f}, {fits}."
    )


def _disk(cost: Estimate) -> str:
    parts = ", ".join(f"{part} {size / 1e9:,.0f}" for part, size in cost.disk.items())
    return f"Disk, GB: {parts} (images reckoned at {IMAGE_BYTES / 1e3:.0f} kB each)."


def _missing_downloads(name: str, settings: Settings, root: Path) -> list[Missing]:
    """Missing downloads of the earlier runs and of this one, without models made by one of them."""
    recipe, _, phase = name.partition("/")
    phases = recipes.phases(recipe, root)
    earlier_phases = phases[: phases.index(phase)] if phase else phases
    runs = [*(recipes.settings_with(f"{recipe}/{earlier}", root) for earlier in earlier_phases), settings]
    items = [item for run in runs for item in missing(run, root) if not STUDENT_PATH.fullmatch(item.name)]
    return list(dict.fromkeys(items))


def _downloads_table(items: list[Missing]) -> Table:
    sizes = [item.size for item in items if item.size]
    unknown = len(items) - len(sizes)
    title = f"Not on this machine yet: about {sum(sizes) / 1e9:,.1f} GB" + (
        f" and {unknown} of unknown size" if unknown else ""
    )
    table = Table(title=title, title_justify="left")
    for column in ("what", "GB", "terms", "how it gets here"):
        table.add_column(column, overflow="fold", justify="right" if column == "GB" else "left")
    for item in items:
        table.add_row(item.name, f"{item.size / 1e9:,.1f}" if item.size else "?", item.licence, item.instructions)
    return table
