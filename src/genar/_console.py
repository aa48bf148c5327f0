"""What commands print: tables, progress bars, and where the results lie."""

import _thread
import gc
import inspect
import json as json_module
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import NoReturn

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from genar import processes
from genar.errors import InputError, LostProcessError, StoppedError

_N_SETS = 20
_TOLD_EVERY_S = 60
_WIDEST = 10_000  # characters of a table
_INTERRUPTED, _WRONG = 130, 2
_SOON_S = 0.05
_NO_MEMORY = ("can't allocate memory", "out of memory")  # of the processor's allocator, and of a GPU's
WRONG = "wrong input"
"""status beside exit code 2"""
_WIDTH = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 240
console = Console(highlight=False, markup=False, width=_WIDTH)
SHOWN = ("pcc_10", "pcc_50", "pcc_200", "pcc_fixed", "mse", "mae", "rvd", "n_undefined")


@contextmanager
def one_line():
    """Ends the process by what was raised within: one line on standard error, and the exit code that belongs to it."""
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _tell_unless_refused
    rank = processes.rank()  # at the end of a training Lightning forgets what tells it
    try:
        yield
    except InputError as error:
        _stop(f"error: {error}")
    except PermissionError as error:
        _stop(f"error: {error.filename}: no permission to write or read there; choose another place")
    except OSError as error:
        from genar.data.files import refusal

        if (told := refusal(error, error.filename or "output")) is None:
            raise
        _stop(f"error: {told}")
    except LostProcessError as error:
        _stop(f"error: {error}; start the same command again to go on", 1)
    except StoppedError as error:
        _stop("" if rank else str(error), error.exit_code)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        _stop(f"error: out of memory ({str(error).splitlines()[-1][-120:]}): make the model or its batches smaller", 1)
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != _INTERRUPTED:  # typer makes an exit of the interrupt
            raise
        _stop("" if rank else "interrupted; start the same command again to go on", _INTERRUPTED)


@contextmanager
def loading() -> Iterator[None]:
    """While a command imports what it needs, PyTorch and more: seconds, which a terminal is told of.

    Garbage is not looked for among their million objects meanwhile, which takes a fifth of the time, nor later.
    """
    told = Console(stderr=True).status("loading") if sys.stderr.isatty() and not processes.rank() else nullcontext()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with told:
            yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


def _tell_unless_refused(unraisable) -> None:
    """Closing a file on a full disk fails again, and again when it is forgotten; that was told already.

    An interrupt that came while an object was being removed has reached nobody: it comes once more.
    """
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        again = threading.Timer(_SOON_S, _interrupt)
        again.daemon = True
        again.start()
        return
    from genar.data.files import refusal

    if unraisable.exc_value is None or refusal(unraisable.exc_value, "") is None:
        sys.__unraisablehook__(unraisable)


def _interrupt() -> None:
    """As the user does: a main thread that waits is woken, where the system can."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _stop(line: str, exit_code: int = _WRONG) -> NoReturn:
    if line:
        print(" ".join(line.split()), file=sys.stderr)
    if exit_code == _WRONG and "--json" in sys.argv:
        tell_wrong(line.removeprefix("error: "))
    sys.exit(exit_code)


def tell_wrong(error: str) -> None:
    """The object that ``--json`` promises, where the input is wrong."""
    print(json_module.dumps({"status": WRONG, "error": " ".join(error.split())}))


def score_tables(result, note: str = "") -> Iterator[Table]:
    """A table a section, a row a method; ``result`` is that of a run."""
    for section, methods in result.scores.items():
        table = Table("method", *SHOWN, title=f"{section}, log2(1 + count)" + (f" ({note})" if note else ""))
        for method, scores in methods.items():
            values = (scores.summary[name] for name in SHOWN)
            table.add_row(method, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
        yield table


def interval_tables(result) -> Iterator[Table]:
    """A row a metric: the value and its interval of each method, then of each paired difference."""
    from genar.evaluation import intervals

    for rows, title, sign in (
        (result.intervals, "95 % intervals, bootstrap over the spots", ""),
        (result.differences, "paired differences", "+"),
    ):
        if rows:
            table = Table("metric", *rows, title=title)
            for metric in next(iter(rows.values())):
                table.add_row(metric, *(intervals.interval_in_words(values[metric], sign) for values in rows.values()))
            yield table


def check_table(result) -> Table:
    """A row a section: what was found, what each source says of the pixel size, and whether a run would work."""
    sources = Column("by", no_wrap=True)  # a value stands beside its source
    table = Table(
        "section", "format", "spots", "genes", "library (median)", "um/px", sources, "image px", "off tissue", "X"
    )
    asked = {
        "features": any(row.features is not None for row in result.sections),
        "genes missing": any(row.panel_missing is not None for row in result.sections),
    }
    for name in ("patient", *(name for name, one in asked.items() if one), "verdict"):
        table.add_column(name)
    for row in result.sections:
        empty = f" ({row.n_empty} empty)" if row.n_empty else ""
        library = "{min:,.0f}-{max:,.0f} ({median:,.0f})".format(**row.library_size) if row.library_size else "-"
        by = [f"{source} {value:.3f}" for source, value in row.mpp_by.items()] or ["--mpp" if row.mpp else "-"]
        if row.size_px:
            size, off = f"{row.size_px[0]} x {row.size_px[1]}", f"{row.n_off_tissue}, {row.n_outside_image} off image"
        else:
            size, off = "no image" if row.has_image is False else "-", "-"
        table.add_row(
            row.section, row.format, "-" if row.n_spots is None else f"{row.n_spots}{empty}",
            f"{row.n_genes or '-'} {row.species} {row.gene_names}".strip(), library,
            f"{row.mpp:.3f}" if row.mpp else "-",
            "\n".join(by + (["differ"] if row.mpp_agree is False else [])), size, off,
            {True: "raw", False: "not raw", None: "-"}[row.raw_counts], row.patient,
            *([", ".join(row.features or ()) or "none"] if asked["features"] else []),
            *([str(len(row.panel_missing or ()))] if asked["genes missing"] else []),
            "wrong" if row.faults else "warned" if row.warnings else "ok",
        )  # fmt: skip
    return table


def group_tables(found) -> Iterator[Table]:
    """The groups of genes, and what they are enriched in where that was asked, the least p first."""
    table = Table("group", "genes", "names")
    for number, genes in enumerate(found.groups):
        table.add_row(str(number), str(len(genes)), " ".join(sorted(genes)))
    yield table
    if found.sets is not None:
        n_shown = min(_N_SETS, len(found.sets))
        title = f"{n_shown} of {len(found.sets)} pairs of a group and a gene set"
        table = Table("group", "gene set", "shared", "expected", "p", "q", "genes", title=title)
        for row in found.sets.head(n_shown).itertuples():
            shared = f"{row.n_shared} of {row.n_set}"
            table.add_row(
                str(row.group), row.set, shared, f"{row.expected:.2f}", f"{row.p:.2g}", f"{row.q:.2g}", row.genes
            )
        yield table


_COUNTED = {"reading sections": "sections", "selecting genes": "sections", "writing pages": "pages"}  # not spots


def bar(quiet: bool, unit: str = "spots"):
    """Progress bars with rate and remaining time; where no terminal looks on, a line a minute of what takes longer."""
    rate = TextColumn("{task.fields[rate]}")
    counted = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), rate)

    @contextmanager
    def one(label: str, total: int):
        counts = _COUNTED.get(label, unit)
        if quiet or not console.is_terminal:
            yield _told(label, counts) if not quiet and not processes.rank() else lambda done, total: None
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counted, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(label, total=total, rate="")

            def tick(done: int, total: int) -> None:
                speed = progress.tasks[task].speed
                progress.update(task, completed=done, total=total, rate=f"{speed:.1f} {counts}/s" if speed else "")

            yield tick

    return one


def _told(label: str, counts: str) -> Callable[[int, int], None]:
    """Prints how far a stage is, once a minute."""
    last = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TOLD_EVERY_S and done < total:
            last = time.monotonic()
            console.print(f"{label}: {done:,} of {total:,} {counts}")

    return tick


def speaker(json: bool):
    """A function that prints a line: on standard error beside --json, nowhere for a process that is not the first."""
    if processes.rank():
        return lambda line: None
    return (lambda line: print(line, file=sys.stderr, flush=True)) if json else (lambda line: print(line, flush=True))


def tell_run(result, json: bool, note: str = "") -> None:
    if not json:
        for table in score_tables(result, note):
            console.print(table)
    finish(json, result.outputs, scores=summaries(result), seconds=result.seconds)


def summaries(result) -> dict:
    return {s: {m: scores.summary for m, scores in methods.items()} for s, methods in result.scores.items()}


def finish(json: bool, outputs: dict, status: str = "done", **figures) -> None:
    """Say where the results lie; with --json one object, NaN as null."""
    if json:
        from genar.data.files import json_ready

        facts = {"status": status, "outputs": {name: str(path) for name, path in outputs.items()}, **figures}
        print(json_module.dumps(json_ready(facts)))
        return
    width = max((len(name) for name in outputs), default=0)
    for name, path in outputs.items():
        print(f"{name:<{width}}  {path}")


def model_facts(name: str) -> dict:
    """What ``genar models`` tells of one: how it decodes, what it is, its card."""
    from genar.models import model_class

    cls = model_class(name)
    facts = {"name": name, "decodings": list(cls.decodings), "about": first_paragraph(cls.__doc__ or "")}
    own = {"unit": cls.unit, "inputs": list(cls.inputs), "training": dict(cls.train_defaults)}
    return {**facts, **own, **(asdict(cls.card) if cls.card else {})}


def first_paragraph(docstring: str) -> str:
    """Of a docstring, as plain text: on one line, without the marks of its roles and literals."""
    text = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    return re.sub(r"(?::[a-z]+:)?(`+)~?(.+?)\1", r"\2", text)


def print_rows(json: bool, name: str, rows: list[dict], columns: tuple[str, ...]) -> None:
    """A table; with --json one object that holds the rows under ``name``."""
    if json:
        return finish(json, {}, "done", **{name: rows})
    table = Table(*columns)
    for row in rows:
        table.add_row(*(", ".join(row[c]) if isinstance(row[c], list) else str(row[c]) for c in columns))
    show(table)


def is_watched(json: bool) -> bool:
    """Whether somebody looks on as it runs."""
    return not json and console.is_terminal


def show(table: Table) -> None:
    """Print a table; where not even its words find room in the terminal, each row as a table of its own: nothing is
    cut."""
    for column in table.columns:
        column.overflow = "fold"
    if Measurement.get(console, console.options.update(width=_WIDEST), table).minimum <= console.width:
        return console.print(table)
    if table.title:
        console.print(str(table.title))
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        rows.add_column(no_wrap=True)
        rows.add_column(overflow="fold")
        for column, cell in zip(table.columns, cells, strict=True):
            rows.add_row(str(column.header), str(cell))
        console.print(rows, "")
