"""Write hours and memory into the headers of the recipes for GPUs, and all headers into docs/recipes.md:
`python -m flows.recipe_page`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.config import recipes
from components.io import write_text
from flows import costs

SCALED = "digits-large"  # by digits, whose times were measured
PAGE = Path("docs/recipes.md")
BEGIN, END = "<!-- recipes: written by `python -m flows.recipe_page` -->", "<!-- recipes: end -->"


def estimated(name: str, root: Path = Path()) -> dict[str, Any]:
    """`time` with `memory` or `seconds` for a recipe's header, by the cost model; empty where its own were measured."""
    settings = recipes.settings_with(name, root)
    if name == SCALED:
        seconds = costs.scaled_seconds(
            settings, recipes.settings_with("digits", root), recipes.about("digits", root).seconds or {}
        )
        rounded = {stage: float(f"{value:.2g}") for stage, value in seconds.items()}
        arms = len(settings.study.arms)
        total = sum(value * (arms if stage in ("distill", "evaluate") else 1) for stage, value in seconds.items())
        return {"time": f"at most {_rounded(total / 3600)} h on 2 CPU cores; an estimate (docs/recipes.md)", "seconds": rounded}
    found = costs.estimate(name, settings, root)
    if found is None:
        return {}
    hours, here = found.device_hours, found.device_hours / found.devices
    return {
        "time": f"about {_rounded(hours)} GPU hours, {_rounded(here)} h on these; an estimate (docs/recipes.md)",
        "memory": f"about {_rounded(found.gib)} GiB on each GPU; an estimate (docs/recipes.md)",
    }


def headers(root: Path = Path()) -> dict[Path, str]:
    """The text of every recipe's file with its header's estimates brought up to date; a phase has its own."""
    texts: dict[Path, str] = {}
    yaml = recipes.round_trip()
    for name in recipes.names(root):
        path = root / "params/recipes" / f"{name.partition('/')[0]}.yaml"
        document: Any = yaml.load(texts.get(path) or path.read_text(encoding="utf-8"))
        phase = name.partition("/")[2]
        part = document.get("phases", {}).get(phase) if phase else document
        if part is None:  # of the recipe that this one is like
            continue
        for key, said in estimated(name, root).items():
            about = part.setdefault("about", yaml.map())
            if isinstance(said, dict):
                about[key].update(said)  # as it is written, on one line
            else:
                about[key] = said
        texts[path] = recipes.text_of(document)
    return texts


def table(root: Path = Path()) -> str:
    lines = ["| recipe | hardware | time | memory of a device | what to expect |", "|---|---|---|---|---|"]
    seen = set()
    for name in recipes.names(root):
        said = recipes.overlay(name, root)
        if repr(said) in seen:  # a teacher's run, told of its first student
            continue
        seen.add(repr(said))
        about = recipes.about(name, root)
        cells = (f"`{name}`", about.hardware, about.time, about.memory or "", about.result)
        lines.append(f"| {' | '.join(cell.replace(' (docs/recipes.md)', '') for cell in cells)} |")
    return "\n".join(lines)


def refreshed(page: str, root: Path = Path()) -> str:
    """The page with what stands between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(root)}\n\n{END}{rest.partition(END)[2]}"


def _rounded(figure: float) -> str:
    return f"{figure:.1f}" if figure < 10 else f"{figure:,.0f}"


def main() -> None:
    for path, text in headers().items():
        if text != path.read_text(encoding="utf-8"):
            write_text(path, text)
    write_text(PAGE, refreshed(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
