"""The command line, `alignti`: a module for each group of `--help`. Heavy imports are local to the commands, so that
`--help` and checks of names are fast."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from components.cli import hand_on, look, operate, run, start
from components.process import exit_from

GROUPS = {
    "Start": ("init", "use", "check", "preview", "plan", "arms"),
    "Run": ("study", "evaluate", "replay", "reproduce"),
    "Look": ("runs", "compare", "leaderboard", "samples", "controls", "benchmarks", "try"),
    "Hand on": ("export", "push", "serve", "register", "promote"),
    "Operate": ("up", "down", "status", "deploy", "worker", "doctor", "sync"),
}


class GroupedHelp(TyperGroup):
    """`--help` with the commands by group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])


app = typer.Typer(
    cls=GroupedHelp,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a multimodal model with Align-TI. `make repro` runs the whole job; these commands prepare and explain it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the start-up time
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"alignti {version('alignti')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for _group in (start, run, look, hand_on, operate):
    app.add_typer(_group.app)


def main() -> None:
    exit_from(_command)


def _command() -> None:
    try:
        app(windows_expand_args=False)
    except SystemExit as error:
        if error.code == 130:  # typer's exit code for Ctrl-C; ours is 143
            raise KeyboardInterrupt from None
        if isinstance(error.__context__, BrokenPipeError):  # typer's exit code is 1, which is no failure of a command's
            raise error.__context__ from None
        raise
