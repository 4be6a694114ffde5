"""The command line, `alignti`. Heavy imports stand inside the commands: `alignti --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from components.process import exit_from
from flows import commands

LONG_S = 3 * 3600

GROUPS = {
    "Start": ("init", "use", "check", "preview", "plan", "arms"),
    "Run": ("study", "evaluate", "replay", "reproduce"),
    "Look": ("runs", "compare", "leaderboard", "samples", "controls", "benchmarks", "try"),
    "Hand on": ("export", "push", "serve", "register", "promote"),
    "Operate": ("up", "down", "status", "deploy", "worker", "doctor", "sync"),
}


class Grouped(TyperGroup):
    """`--help` with the commands by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])


app = typer.Typer(
    cls=Grouped,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a multimodal model with Align-TI. `make repro` runs the whole job; these commands prepare and explain it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the start-up time
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"alignti {version('alignti')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _check_models(*names: str | None) -> None:
    """Raises InputError, before anything heavy is imported, for what is no arm, `teacher`, folder or ORG/NAME of the hub."""
    from components.config.load import load_settings
    from components.errors import unknown
    from components.records.paths import TEACHER_ARM

    known = [TEACHER_ARM, *load_settings().study.arms]
    for name in names:
        if name is not None and name not in known and "/" not in name and not Path(name).is_dir():
            raise unknown("model", name, known)


@app.command()
def use(recipe: str) -> None:
    """Merge params/recipes/RECIPE.yaml into params/ and print what changed."""
    from components.config import recipes

    recipes.merged(recipe)  # says what is wrong with it before anything is kept
    _keep_own()
    diff = recipes.use(recipe)
    for line in diff.splitlines():
        colour = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}.get(line[:1])
        typer.secho(line, fg=colour, bold=line.startswith(("+++", "---")))
    about = recipes.about(recipe)
    typer.echo(
        f"params/ {'now say' if diff else 'said already'} what recipe {recipe} says. On {about.hardware} the whole job takes"
        f" {about.time}: `make repro`, or `alignti plan` to see it first."
    )
    if before := recipes.phases(recipe) if "/" not in recipe else []:
        typer.echo(f"Before it, in this order: {', '.join(f'`alignti use {recipe}/{phase}`' for phase in before)}.")


def _keep_own() -> None:
    from components.config import recipes

    if kept := recipes.keep_own():
        typer.echo(f"params/ held values that no recipe has; they are kept: `cp {kept}/*.yaml params/` brings them back.")


@app.command()
def init(
    data: Annotated[Path, typer.Option(help="Your rows: JSON or JSONL (docs/data.md).")],
    images: Annotated[Path, typer.Option(help="The folder that their images are in.")],
    teacher: Annotated[str, typer.Option(help="A checkpoint folder, or ORG/NAME@COMMIT of the hub.")],
    student: Annotated[str, typer.Option(help="Likewise.")],
    name: Annotated[str, typer.Option(help="Of the recipe that is made.")] = "own",
) -> None:
    """Look at your data and models, and make a recipe and params/ for them: what was chosen, and why."""
    from components.own_data.asked import Asked

    asked = Asked(data, images, teacher, student, name)
    asked.check()

    from components.config import recipes
    from components.config.load import load_settings
    from components.config.local_paths import not_here
    from components.dataset.__main__ import unseen_by_dvc
    from components.errors import SettingsError
    from components.own_data.init import init as look

    seen, choices = look(asked)
    for line in (*seen, "", *choices):
        typer.echo(line)
    _keep_own()
    recipes.use(name)
    settings = load_settings()
    if missing := not_here(settings):
        raise SettingsError(f"params/ name what is not here: {', '.join(missing)}")
    for unseen in unseen_by_dvc(settings):
        typer.secho(unseen, fg=typer.colors.YELLOW)
    if not Path("data").is_dir():  # stage `prepare` depends on it, wherever the rows are
        from flows import dvc

        dvc.fetch("data.dvc")
    typer.echo(
        f"\nparams/ now say what {asked.recipe} says: `alignti preview` shows what is trained on, `dvc repro` runs it all."
    )


@app.command()
def plan() -> None:
    """Say for each stage whether it would run, why, and how long that takes."""
    from components.config.load import load_settings
    from components.config.local_paths import not_here
    from flows.plan import plan as make_plan

    settings = load_settings()
    steps, basis, recipe = make_plan(settings)
    width = max(len(step.stage) for step in steps)
    for step in steps:
        state = typer.style("would run" if step.reasons else "cached   ", fg=typer.colors.YELLOW if step.reasons else None)
        time = _duration(step.seconds) if step.reasons and step.seconds is not None else " " * 8
        typer.echo(f"{step.stage:{width}}  {state} {time}  {'; '.join(step.reasons)}".rstrip())
    running = [step for step in steps if step.reasons]
    if not running:
        typer.echo("Nothing to do: `make repro` would run no stage.")
        return
    total = sum(step.seconds or 0 for step in running)
    unknown = [step.stage for step in running if step.seconds is None]
    but = f", not counting {', '.join(unknown)}: never timed" if unknown else ""
    in_all = f"{total / 60:.1f} min" if total < LONG_S else f"{total / 3600:,.0f} h"
    long = f"about {in_all}, one at a time{but}" if len(unknown) < len(running) else "how long was never timed"
    typer.echo(f"{len(running)} of {len(steps)} stages would run: {long}.")
    typer.echo(f"Times: {basis}. DVC restores a stage at once instead if it has run on the same inputs before.")
    if missing := not_here(settings):
        typer.secho(f"Not here, so it would fail: {', '.join(missing)}.", fg=typer.colors.RED)
    if recipe is not None and settings.models.family == "pretrained":
        from flows import cost_report

        cost_report.show(recipe, settings)


def _duration(seconds: float) -> str:
    return f"{seconds:6.0f} s" if seconds < LONG_S else f"{seconds / 3600:6.1f} h"


@app.command()
def check(
    all_recipes: bool = typer.Option(False, "--all-recipes", help="Also merge each recipe into these params and check that."),
    data: bool = typer.Option(False, "--data", help="Also try every row of the data as the stages will; writes nothing."),
) -> None:
    """Check params/, and that the data and models they name are here: every problem at once; exit code 2 if there is one."""
    from importlib.util import find_spec

    from components.config import recipes
    from components.config.load import load_settings
    from components.config.local_paths import not_here
    from components.errors import SettingsError

    def own() -> None:
        settings = load_settings()
        if missing := not_here(settings):
            raise SettingsError(f"params/ name what is not here: {', '.join(missing)}")
        if away := [name for name in settings.runtime.trackers if find_spec(name) is None]:
            raise SettingsError(f"params/runtime.yaml: trackers: not installed: pip install {' '.join(away)}, or leave it out")

    problems = []
    checks = {"params/": own}
    if all_recipes:
        checks |= {f"recipe {name}": lambda name=name: recipes.merged(name) for name in recipes.names()}  # type: ignore[misc]
    for what, run in checks.items():
        try:
            run()
        except SettingsError as error:
            problems.append(str(error))
        else:
            typer.echo(f"{what}: fine")
    if problems:
        raise SettingsError("\n".join(problems))
    if data:
        from components.own_data import check as tried

        settings = load_settings()
        folders, missing = tried.at_hand(settings.models)
        found = tried.try_data(settings, folders.values(), settings.runtime.workers)
        for line in tried.report(found, settings, folders, missing):
            typer.echo(line)
        tried.accept(found, settings)
        typer.echo("data: fine")


@app.command()
def preview(each: int = typer.Option(2, min=1, help="Samples of each kind.")) -> None:
    """Show samples as the student reads them, with what is trained on in colour: here, and as reports/preview.html."""
    from components.config.load import load_settings
    from components.own_data import preview as page
    from components.own_data.check import at_hand

    settings = load_settings()
    found = page.preview(settings, at_hand(settings.models)[0], each)
    for line in page.lines(found):
        typer.echo(line)
    typer.echo(f"-> {page.write_page(found)}")


@app.command()
def sync() -> None:
    """Send the run journals that MLflow has not taken yet."""
    from components.config.load import load_settings
    from components.errors import InputError, TryAgainError
    from components.tracking.mlflow_sync import sync as send
    from components.tracking.stage_run import JOURNAL_ONLY

    uri = load_settings().runtime.tracking_uri
    if uri == JOURNAL_ONLY:
        raise InputError(
            "params/runtime.yaml: tracking_uri is `journal`; name an MLflow address there or in ALIGNTI_TRACKING_URI"
        )
    try:
        sent, live = send(uri)
    except ImportError:
        raise InputError("MLflow is not installed here: pip install -c constraints.txt -e '.[pipeline]'") from None
    except Exception as error:  # MLflow, its server and its database raise all sorts
        raise TryAgainError(
            f"MLflow does not take the journals ({' '.join(str(error).split())[:300]}); nothing is lost"
        ) from error
    typer.echo(f"{sent} journal(s) sent{f', {live} still being written' if live else ''}.")


@app.command()
def leaderboard(
    measure: bool = typer.Option(
        False, "--measure", help="First time every model's answers: tokens/s, time to first token, memory."
    ),
) -> None:
    """Write reports/leaderboard.*: our students and their teacher beside the published rows."""
    from components.config.load import load_settings
    from components.evaluate import leaderboard as board
    from components.evaluate.kits import table
    from components.evaluate.kits.command import current
    from components.records.compare import Comparison
    from components.records.models import ModelIndex
    from components.records.paths import MODELS, REPORTS, STUDENTS, TEACHER, TEACHER_ARM
    from components.records.teacher import TeacherChoice

    settings = load_settings()
    comparison = Comparison.read(REPORTS / "compare.json")
    index, teacher = ModelIndex.read(MODELS / "index.json"), TeacherChoice.read(TEACHER / "choice.json")
    if measure:
        from components.evaluate import speed
        from components.runtime import prepare_torch

        models = [(TEACHER_ARM, Path(teacher.path)), *((arm, STUDENTS / arm / "model") for arm in comparison.arms)]
        speed.measure(models, settings, prepare_torch(settings.runtime, seed=0)).write(speed.SPEED)
    asked = {who.removeprefix("vlmeval/"): told.figures for who, told in table.read(current).tasks.items() if "vlmeval/" in who}
    made = board.write(board.build(comparison, index, teacher, settings.study.arms, board.read_speed(), asked))
    typer.echo(f"leaderboard: {len(comparison.arms)} arms beside the published rows -> {', '.join(map(str, made))}")


@app.command()
def benchmarks(name: Annotated[str | None, typer.Argument(help="One of them, with its prompt.")] = None) -> None:
    """List the benchmarks: what each asks, how it is scored, where to get it, and what is not verified."""
    from components.errors import InputError
    from components.evaluate.benchmarks import BENCHMARKS
    from components.evaluate.statistics import noise_unpaired

    if name is not None and name not in BENCHMARKS:
        raise InputError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    for key in [name] if name else BENCHMARKS:
        entry = BENCHMARKS[key]
        items = f"{entry.items:,} questions" if entry.items else "number of questions not verified"
        typer.secho(f"{key}: {entry.title}, {entry.split}, {items}{' (paper)' if entry.in_paper else ''}", bold=True)
        typer.echo(f"  score    {entry.metric}: {entry.rule}")
        typer.echo(f"  licence  {entry.licence or 'not verified'}")
        if entry.independent:
            gap = 100 * noise_unpaired(0.5, entry.independent, 0.95)
            typer.echo(f"  noise    two scores less than {gap:.1f} points apart may differ by chance (unpaired, 95%, near 50)")
        typer.echo(f"  get      {entry.get}")
        for point in entry.open_points:
            typer.echo(f"  open     {point}")
        if name is not None:
            typer.echo("  prompt   " + entry.prompt.replace("\n", "\n           "))


@app.command()
def samples(
    most: int = typer.Option(2000, "--most", min=1, help="Samples on the page; the first ones of the evaluated split."),
) -> None:
    """Write reports/samples.html: each image and question with all answers, and where the teacher looked."""
    from components.config.load import load_settings
    from components.dataset.shards import Samples
    from components.evaluate import samples as page
    from components.evaluate.load_results import read
    from components.models.load import load
    from components.records.compare import Comparison
    from components.records.irs import LayerChoice
    from components.records.paths import DATASET, IRS, REPORTS, TEACHER, TEACHER_ARM
    from components.records.teacher import TeacherChoice
    from components.runtime import prepare_torch

    settings = load_settings()
    comparison, layer = Comparison.read(REPORTS / "compare.json"), LayerChoice.read(IRS / "layer.json").picked.layer
    predictions = read(comparison.arms).predictions
    teacher = load(Path(TeacherChoice.read(TEACHER / "choice.json").path), prepare_torch(settings.runtime, seed=0))
    asked = predictions[TEACHER_ARM][:most]
    looks = page.looks(teacher, Samples(DATASET, comparison.split), asked, layer, settings)
    path = page.write(comparison, predictions, looks, layer, most)
    typer.echo(f"samples: {len(asked):,} questions with every answer, {path.stat().st_size / 2**20:.1f} MiB -> {path}")


@app.command()
def controls(
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms, or `teacher`; all without it.")] = None,
) -> None:
    """Write reports/controls.*: every model without its image, and what the test split shares with the training data."""
    from components.config.load import load_settings
    from components.errors import unknown
    from components.records.paths import STUDENTS, TEACHER, TEACHER_ARM
    from components.records.teacher import TeacherChoice

    settings = load_settings()
    known = [TEACHER_ARM, *settings.study.arms]
    for name in arm or ():
        if name not in known:
            raise unknown("arm", name, known)
    from components.evaluate import blind_baselines as measured

    folders = {TEACHER_ARM: Path(TeacherChoice.read(TEACHER / "choice.json").path)}
    folders |= {name: STUDENTS / name / "model" for name in settings.study.arms}
    found = measured.measure([(name, folders[name]) for name in arm or known], settings)
    made = measured.write(found)
    blind = ", ".join(f"{name} {max(m.blank, m.other):.1%} of {m.seeing:.1%}" for name, m in found.models.items())
    twins = found.contamination.exact + found.contamination.near
    typer.echo(f"controls: right without the image {blind}; {twins} test images have a twin in training -> {made[1]}")


@app.command()
def replay(dump: Path) -> None:
    """Rerun a step that stopped with a loss that was not finite, sample by sample, and say which sample's which term it is."""
    from components.distill.replay import replay as findings_of

    found = 0
    for found, finding in enumerate(findings_of(dump), 1):  # noqa: B007
        typer.echo(str(finding))
    if not found:
        typer.echo(f"{dump}: every term of every sample and every gradient is finite here, one sample at a time.")


@app.command()
def up(
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; any but loopback needs ALIGNTI_SERVER_AUTH=user:password."
    ),
    mlflow_port: int = typer.Option(5000, min=1, max=65535),
    prefect_port: int = typer.Option(4200, min=1, max=65535),
    postgres: str = typer.Option(
        None, envvar="ALIGNTI_POSTGRES", show_envvar=True, help="postgresql://user:password@host:port, for a pool of machines."
    ),
) -> None:
    """Start the MLflow and Prefect servers of this folder, and wait until they answer."""
    from flows import servers

    ready = servers.up(host, {"mlflow": mlflow_port, "prefect": prefect_port}, postgres, typer.echo)
    for server in ready:
        typer.echo(f"{server.name}: {server.page}")
    typer.echo("`alignti deploy` and `alignti worker` find them by themselves. For other commands in this shell:")
    for name in ("ALIGNTI_TRACKING_URI", "PREFECT_API_URL"):
        typer.echo(f"  export {name}={servers.client_environment()[name]}")


@app.command()
def down() -> None:
    """Stop the workers and the servers of this folder, and all that they started."""
    from flows import pool, servers

    workers = ["the workers"] if pool.stop_workers() else []
    stopped = [*workers, *(server.name for server in servers.down())]
    typer.echo(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def status() -> None:
    """Say whether the servers of this folder run and answer."""
    from flows import servers

    for name, state in servers.report():
        typer.echo(f"{name:8} {state}")


@app.command()
def deploy(
    at_once: int = typer.Option(
        None, min=1, help="Flow runs at a time on this pool; else as many as this machine has devices."
    ),
) -> None:
    """Make the work pools, queues and limits, and the deployments of prefect.yaml, on the server that is up."""
    from flows import pool

    for line in pool.deploy(at_once):
        typer.echo(line)


@app.command()
def worker(count: int = typer.Option(None, min=1, help="How many; else one per GPU, or one without GPUs.")) -> None:
    """Run workers that take flow runs from the pool `gpu` (one per GPU) or `cpu`, until stopped with Ctrl-C."""
    from flows import pool

    pool.work(count, typer.echo)


@app.command()
def doctor(
    free_slots: bool = typer.Option(False, "--free-slots", help="Free them, too."),
    prune: int = typer.Option(None, min=0, metavar="DAYS", help="Delete the branches runs/... of flow runs older than that."),
) -> None:
    """List what dead flow runs still hold: slots of pools, queues and deployments, and worktrees."""
    from flows import cleanup_stale_runs, workspace

    if prune is not None:
        typer.echo(f"deleted {len(workspace.prune(prune))} branch(es) runs/... older than {prune} days")
    said = list(cleanup_stale_runs.free() if free_slots else (leak.what for leak in cleanup_stale_runs.leaks()))
    for what in said:
        typer.echo(f"{'freed' if free_slots else 'leaked'}: {what}")
    if not cleanup_stale_runs.reachable():
        typer.echo("No Prefect server is up here (`alignti up`), so only this folder was looked at.")
    if not said:
        typer.echo("Nothing is held by a run that is dead.")
    elif not free_slots:
        typer.echo("`alignti doctor --free-slots` frees what leaked.")


study = typer.Typer(help="What params/studies/*.yaml ask for.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(study, name="study")


@study.command("list")
def list_studies() -> None:
    """Say which studies there are, what each is for, and how many arms it has."""
    from components.study import expand

    for name in expand.names():
        typer.echo(f"{name:16} {len(expand.cells(name)):4} arms  {expand.read(name).about}")


@study.command("expand")
def expand_study(name: str) -> None:
    """Make the study's arms those of params/study.yaml, for `make repro` to run, and print what changed."""
    from components.study import expand

    expand.read(name)
    _keep_own()
    diff = expand.expand(name)
    typer.echo(diff or f"params/study.yaml says already what study {name} says.")


@study.command("run")
def run_study(
    name: str,
    parallel: int = typer.Option(None, min=1, help="Arms at a time; else one, or over the pool as many as workers take."),
    recipe: str = typer.Option(None),
    pool: bool = typer.Option(False, "--pool", help="Hand the arms out to the workers of the pool."),
) -> None:
    """Run what is missing of a study, in a workspace of its own, and record it."""
    from components.config import recipes
    from components.study import expand
    from flows.servers import client_environment, use_running

    expand.read(name)
    if recipe is not None:
        recipes.about(recipe)
    if pool:
        client_environment()  # says what is not up
    use_running()
    from flows.study import study as flow

    outcomes = flow(name, parallel, recipe, pool)
    typer.echo(f"study {name}: {len(outcomes)} arms run and recorded; `alignti compare {name}` says what they show.")


@app.command()
def compare(study: str) -> None:
    """Say what a study shows, from its runs in MLflow: reports/studies/STUDY/compare.{md,csv,html}."""
    from components.study import expand

    plan = expand.read(study)
    from components.config.load import load_settings
    from components.errors import without_login
    from components.study import compare as comparison
    from components.study import report
    from components.tracking.outcome import page
    from flows.servers import use_running

    use_running()
    settings = load_settings()
    runs = comparison.recorded(settings.runtime.tracking_uri, settings.runtime.experiment, study)
    cells = [cell.name for cell in expand.cells(study)]
    result = comparison.compare(study, runs, cells, plan.baselines, settings.evaluate.confidence)
    written = report.write(result, plan.about, settings.evaluate.confidence)
    typer.echo(report.standing(result))
    typer.echo(f"-> {', '.join(map(str, written))}")
    address = without_login(settings.runtime.tracking_uri)
    if address.startswith("http"):
        typer.echo(f"in MLflow: {page(address, [run.id for run in result.runs], result.runs[0].experiment)}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder, or ORG/NAME[@REVISION] of the hub.")],
    port: int = typer.Option(8000, min=1, max=65535, help="Where to listen."),
    host: str = typer.Option("127.0.0.1", help="An address of this machine; one that is open to others needs a key."),
) -> None:
    """Serve MODEL behind an OpenAI-compatible API until interrupted."""
    _check_models(model)
    import signal

    from components.config.load import load_settings
    from components.evaluate.kits.serve import served
    from components.records.paths import RUNS
    from components.release.model import find
    from components.runtime import prepare_torch

    log, settings = RUNS / "serve" / f"{port}.log", load_settings()
    device = prepare_torch(settings.runtime, seed=0)
    with served(find(model, settings).path, device.type, log, host, port) as endpoint:
        typer.echo(f"{endpoint.url}/v1 serves the model named {endpoint.model}; log: {log}; Ctrl-C ends it")
        signal.pause()


Kits = Annotated[list[str] | None, typer.Option(help="own, vlmeval or lm-eval; all of them if not given.")]
Arms = Annotated[list[str] | None, typer.Option(help="Arms, `teacher`, before-STUDENT; else the teacher and every arm.")]
Tasks = Annotated[list[str] | None, typer.Option(help="Tasks of the kit's own, or as docs/kits.md says; else our questions.")]


@app.command()
def evaluate(
    kit: Kits = None,
    arm: Arms = None,
    task: Tasks = None,
    blank: bool = typer.Option(False, "--blank", help="vlmeval's tasks with a plain grey image in each image's place."),
) -> None:
    """Measure students with the field's own kits, beside our own scores: reports/kits.md."""
    from components.config.load import load_settings
    from components.errors import unknown
    from components.records.paths import TEACHER_ARM

    known = [TEACHER_ARM, *load_settings().study.arms]
    for name in arm or ():
        if name not in known and not name.startswith("before-"):
            raise unknown("arm", name, known)
    from components.evaluate.kits.command import evaluate as run

    run(kit or (), arm or (), task or (), blank)


@app.command()
def arms() -> None:
    """List the arms: student, seed, weights, and the score of those that have one."""
    from components.config.load import load_settings
    from components.records.evaluate import Scores
    from components.records.paths import SCORES

    for name, arm in load_settings().study.arms.items():
        weights = " ".join(f"{term} {weight:g}" for term, weight in dict(arm.weights).items() if weight)
        file = SCORES / name / "scores.json"
        score = f"{Scores.read(file).exact_match:.1%}" if file.is_file() else "-"
        typer.echo(f"{name:20} {score:>6}  {arm.student:12} seed {arm.seed:<4} {weights}")


@app.command()
def runs() -> None:
    """List the runs of this folder, the latest last: name, status, recipe and commit; `alignti reproduce` takes the name."""
    from components.tracking import history

    for run in history.recorded():
        typer.echo(f"{run.name:60} {run.status:9} {run.recipe or '-':24} {run.commit[:10]}")


@app.command("try")
def try_model(
    student: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder, or ORG/NAME[@REVISION] of the hub.")],
    question: str,
    image: Annotated[
        list[Path], typer.Option(help="What the question is about: JPEG, PNG, WebP, GIF, BMP or TIFF. Again for another.")
    ],
    vs: Annotated[str | None, typer.Option(help="Another model, to answer beside it.")] = None,
    look: Annotated[bool, typer.Option("--look", help="Write a picture of where each looked.")] = False,
    longest: Annotated[int, typer.Option("--max-new-tokens", min=1, help="An answer is cut there.")] = 256,
) -> None:
    """Ask a model a question about images, each where <image> stands in it or first: its answer as it comes, with timings."""
    from components.errors import InputError

    _check_models(student, vs)
    for path in image:
        if not path.is_file():
            raise InputError(f"--image {path}: no such file")
    from components.config.load import load_settings
    from components.release.generate import run

    run([student] if vs is None else [student, vs], image, question, load_settings(), longest, look)


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="An arm, `teacher`, a folder (LoRA adapters too), or ORG/NAME of the hub.")],
    folder: Path,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; else as the weights are stored.")] = None,
    shard: Annotated[str, typer.Option("--max-shard-size", help="The largest file of weights.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is at FOLDER.")] = False,
) -> None:
    """Write a model to FOLDER for others, with its full card, and read it back to see that it answers as before."""
    from components.errors import InputError

    _check_models(student)
    from components.config.load import load_settings
    from components.release.export import DTYPES
    from components.release.export import export as write

    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    typer.echo(str(write(student, folder, load_settings(), dtype, shard, force)))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="As `alignti export` writes it.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME")],
    yes: Annotated[bool, typer.Option("--yes-upload", help="Upload; without it nothing leaves this machine.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository is private without it.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that holds files.")] = False,
) -> None:
    """Upload a model's folder to the hub; without --yes-upload say what would go there, and what its licences leave open."""
    from components.release import push as hub

    upload = hub.plan(folder, repo, private=not public)
    typer.echo(str(upload))
    if yes:
        typer.echo(f"uploaded: {hub.push(upload, update)}")
    else:
        typer.echo("Nothing was uploaded; add --yes-upload to do it.")


for _command in (commands.register, commands.promote, commands.reproduce):
    app.command()(_command)


def main() -> None:
    exit_from(lambda: app(windows_expand_args=False))


if __name__ == "__main__":
    main()
