"""The command line: argv -> config -> call. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from federa.errors import InputError, RunError

app = typer.Typer(
    help="Federated low-rank fine-tuning of language models (FeDeRA, arXiv 2404.18848).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True, highlight=False, soft_wrap=True)

flower = typer.Typer(help="Runs over real sites, with Flower as the network.", no_args_is_help=True)
app.add_typer(flower, name="flower")
TAKE_UP = "`federa resume DIR` takes a run up after its last saved round, the same `federa study` a study"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see examples/.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, as in client.lr=1e-4.")]
Output = Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Default: runs/ and the config's name.")]


@app.command()
def run(
    config: ConfigFile,
    set: Set = None,
    output: Output = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run a baseline instead: pooled, local, head-only, linear-probe.")
    ] = None,
    yardsticks: Annotated[bool, typer.Option("--yardsticks", help="Score four baselines beside the run.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Tell where a round's time goes; trace.json.")] = False,
) -> None:
    """Run a configuration; a folder that holds the same run is taken up where it stopped. Under torchrun the cohorts
    of a round are spread over its processes."""
    from federa import baselines, ranks, simulation
    from federa.config import anchored, load_config
    from federa.metrics import METRICS
    from federa.progress import RunProgress
    from federa.report import ResultRow

    resolved = anchored(load_config(config, set or []))
    folder = output or Path("runs") / (f"{config.stem}-{baseline}" if baseline else config.stem)
    if ranks.count() > 1:
        if baseline is not None or yardsticks:
            raise InputError("--baseline, --yardsticks: run in one process, got torchrun; run them without it")
        if ranks.join() > 0:
            return ranks.serve()
    with ranks.leading(), RunProgress(console) as watch:
        if baseline is not None:
            row = baselines.run_baseline(baseline, resolved, folder, watch)
            judged = METRICS[resolved.task.name]
            watch.table([ResultRow(row["name"], *(metric.value(row) for metric in judged), row["note"])], judged)
            return
        simulation.run(resolved, folder, watch=_profiled(watch, folder) if profile else watch)
        if yardsticks:
            baselines.yardsticks(resolved, folder, watch)
        watch.summary(folder)


@app.command()
def resume(directory: RunDir, set: Set = None) -> None:
    """Take a stopped run up after its last saved round; --set may change server.retries and server.min_updates."""
    from federa import ranks, simulation
    from federa.flower.project import is_over_sites, resume_project
    from federa.progress import RunProgress

    if ranks.count() > 1 and ranks.join() > 0:
        return ranks.serve()
    with ranks.leading(), RunProgress(console) as watch:
        if is_over_sites(directory):
            watch.bars.stop()
            resume_project(directory, set or [])
        simulation.resume(directory, overrides=set or [], watch=watch)
        watch.summary(directory)


def _profiled(watch, folder: Path):
    from federa.profile import RoundProfile

    return RoundProfile(watch, folder / "trace.json", console)


@app.command()
def evaluate(
    directory: RunDir,
    round: Annotated[str, typer.Option(help="A saved round, 'last' or 'best'.")] = "last",
) -> None:
    """Score a run's saved model on its test set."""
    from federa.rounds import test_scores
    from federa.simulation import restore

    experiment, state = restore(directory, _round(directory, round))
    scores = test_scores(experiment)
    console.print(f"round {state.round}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


@app.command()
def export(
    directory: RunDir,
    format: Annotated[str, typer.Option(help="peft, merged or residual.")] = "peft",
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: DIR/FORMAT.")] = None,
    round: Annotated[str, typer.Option(help="A saved round, 'last' or 'best'.")] = "last",
) -> None:
    """Write a run's model for others: a PEFT adapter, a merged checkpoint, or the residual base with its adapter."""
    from federa.export import check_export
    from federa.export import export as export_model
    from federa.simulation import restore

    path = output or directory / format
    check_export(format, path)
    experiment, _ = restore(directory, _round(directory, round))
    with _writing(path):
        export_model(experiment, format, path)


@app.command()
def partition(
    config: ConfigFile,
    set: Set = None,
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture.")] = Path("partition.png"),
) -> None:
    """Show who holds what: a table, and a picture of labels over clients."""
    from federa.config import load_config
    from federa.experiment import partition_of
    from federa.progress import partition_table
    from federa.report import plot_partition

    corpus, shares, counts = partition_of(load_config(config, set or []))
    console.print(partition_table(corpus, shares, counts))
    with _writing(output):
        plot_partition(counts, corpus.strata, output, shares.convention, shares.names)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see examples/studies/.")],
    set: Set = None,
    output: Output = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try every cell with small random models.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0, help="Ask, or stop, before a study predicted to take more."),
    ] = None,
) -> None:
    """Compare methods on a grid of data, heterogeneity and seeds, each with its own learning rate."""
    from federa.study import dry_run as try_out
    from federa.study import run_study
    from federa.study.progress import StudyProgress

    with StudyProgress(console) as watch:
        if dry_run:
            path = try_out(config, output or Path("runs") / f"{config.stem}-dry-run", overrides=set or [], watch=watch)
        else:
            folder = output or Path("runs") / config.stem
            confirm = watch.confirm if console.is_terminal else None
            path = run_study(config, folder, overrides=set or [], budget=budget, confirm=confirm, watch=watch)
    console.print(f"study    {path}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="A run or a study, or runs to compare.")],
    output: Annotated[Path, typer.Option(metavar="HTML", help="Of a comparison.")] = Path("comparison.html"),
) -> None:
    """Write a run's report.html or a study's study.html again, or compare several runs on one page."""
    from federa.folder import RunFolder
    from federa.report import write_comparison, write_report
    from federa.study.report import is_study, write_study

    if len(directories) == 1 and is_study(directories[0]):
        with _writing(directories[0] / "study.html"):
            write_study(directories[0])
        return
    folders = [RunFolder.open(directory).path for directory in directories]
    path = folders[0] / "report.html" if len(folders) == 1 else output
    with _writing(path):
        write_report(folders[0]) if len(folders) == 1 else write_comparison(folders, output)


@app.command()
def worker(
    socket: Annotated[Path, typer.Argument(metavar="SOCKET", help="A path; only its owner may open it.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keeps runs' initial factors. Default: the user's cache.")
    ] = None,
) -> None:
    """Keep a site's model in memory, for the Flower processes that ask; started again whenever it dies."""
    from federa.flower.worker import site_folder, supervise

    supervise(socket, folder or site_folder())


@flower.command("init")
def flower_init(
    config: ConfigFile,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    set: Set = None,
    sites: Annotated[int | None, typer.Option(metavar="N", help="SuperNodes. Default: one a client.")] = None,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The SuperLink's, as the sites reach it.")
    ] = "127.0.0.1:8000",
    tls: Annotated[bool, typer.Option("--tls/--insecure", help="Certificates and keys, or plain text.")] = True,
) -> None:
    """Write all that a deployment needs: project file, certificates, keys and a README with the commands."""
    from federa.flower.project import init_project

    path = init_project(config, directory, sites=sites, address=address, insecure=not tls, overrides=set or [])
    console.print(f"wrote {path}; {path / 'README.md'} says how to start", soft_wrap=True, markup=False, emoji=False)


@app.command()
def doctor() -> None:
    """Show versions, devices, which kernel paths are active, and why others are not."""
    from federa.doctor import print_report

    print_report(console)


def _round(directory: Path, round: str) -> int | None:
    from federa.simulation import best_round

    if round == "last":
        return None
    if round == "best":
        return best_round(directory)
    if not re.fullmatch("[0-9]{1,10}", round):
        raise InputError(f"--round: must be a number, 'last' or 'best', got {round[:60]!r}")
    return int(round)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says that `path` is written, or why it cannot be."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--output: must be a place that can be written, got {path}: {error}") from None
    console.print(f"wrote {path}", soft_wrap=True, markup=False, emoji=False)


def main() -> None:
    """The entry point `federa`."""
    try:
        app()
    except InputError as error:
        _fail(2, str(error))
    except RunError as error:
        _fail(1, str(error))
    except OSError as error:
        _fail(1, f"the system refused: {error}; {TAKE_UP}")
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != 130:  # 130 is typer's for Ctrl-C, without a word
            raise
        _fail(130, f"interrupted; {TAKE_UP}")


def _fail(code: int, message: str) -> NoReturn:
    """Ends the process with one line, whatever the message quotes."""
    errors.print(f"federa: {' '.join(message.split())}", style="bold red", markup=False, emoji=False)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
